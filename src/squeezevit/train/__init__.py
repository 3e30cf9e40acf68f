"""Fine-tuning with reduced tokens."""
