"""Image classification by a small CNN."""
