"""A merged GGUF file (placeholder)."""
