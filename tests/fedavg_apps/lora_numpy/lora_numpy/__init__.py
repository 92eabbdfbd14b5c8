"""A language model with LoRA adapters, with NumPyClient."""
