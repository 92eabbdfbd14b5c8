"""An autoencoder of signals, as a module with its own training step."""
