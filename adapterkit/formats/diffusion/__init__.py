"""LoRA of image and video models: kohya's, diffusers' and ComfyUI's spellings of one adapter."""
