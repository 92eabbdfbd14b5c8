"""The vision example: a Flower app that trains a small vision transformer."""
