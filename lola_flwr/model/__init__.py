"""The model: its blocks, how it is loaded, and back-propagation down to a block."""
