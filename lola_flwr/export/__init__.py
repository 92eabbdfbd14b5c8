"""Training steps as programs for devices without PyTorch, and what runs them."""
