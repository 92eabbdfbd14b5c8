"""What training a block costs a device: operations, memory, payload."""
