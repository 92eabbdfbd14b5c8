"""Recorded conversations of a device with its server; `recorded` makes them."""
