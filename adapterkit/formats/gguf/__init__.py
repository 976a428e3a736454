"""GGUF LoRA adapters, as llama.cpp and everything built on it load them."""
