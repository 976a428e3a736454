"""LoRA of hand-written code, by dialect."""
