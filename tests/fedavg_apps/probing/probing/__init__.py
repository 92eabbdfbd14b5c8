"""A new classifier on a frozen body."""
