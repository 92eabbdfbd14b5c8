"""A SuperNode that stays: it runs every message's ClientApp in its own process."""
