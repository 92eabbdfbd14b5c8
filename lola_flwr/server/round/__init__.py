"""One round, from its problem to its record."""
