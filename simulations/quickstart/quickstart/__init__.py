"""The shortest complete app: devices train a classifier's LoRA adapter together."""
