"""LoraConfig of PEFT: what it declares and selects, and the one that a file carries itself."""
