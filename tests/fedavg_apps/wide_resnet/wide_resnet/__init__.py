"""A residual network with BatchNorm, and aggregation of its own."""
