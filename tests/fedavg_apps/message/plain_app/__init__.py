"""A FedAvg project."""
