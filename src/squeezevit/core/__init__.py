"""What a method says, how a block is cut, proved, attached and run, and what is traced and counted. Imports no room above."""
