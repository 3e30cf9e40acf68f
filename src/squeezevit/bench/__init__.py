"""Honest measurement: alternating rounds, minimum and median, and the limit that no reducer can beat."""
