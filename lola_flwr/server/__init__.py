"""The server's side of a run, apart from any transport."""
