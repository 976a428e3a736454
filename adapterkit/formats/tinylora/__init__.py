"""TinyLoRA files and checkpoints."""
