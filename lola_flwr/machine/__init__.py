"""The machine at hand: its memory, its heap, and files that are whole."""
