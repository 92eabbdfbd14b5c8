"""Messages with nothing in them."""
