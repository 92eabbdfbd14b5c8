"""Messages with nothing in them, or with arrays that nobody looks at."""
