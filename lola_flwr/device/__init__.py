"""The device's side of a run, apart from any transport."""
