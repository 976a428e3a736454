"""MLX-LM adapters: `adapters.safetensors` with the arguments of their training."""
