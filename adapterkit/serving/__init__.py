"""What an engine is given to run: adapters with scales, and its settings."""
