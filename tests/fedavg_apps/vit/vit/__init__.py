"""Image classification by a vision transformer."""
