"""Image classification by a small CNN, with NumPyClient."""
