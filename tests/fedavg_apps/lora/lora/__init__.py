"""A language model with LoRA adapters, which alone are exchanged."""
