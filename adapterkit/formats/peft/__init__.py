"""PEFT adapters: `adapter_config.json` with weights, and what trainers make of them."""
