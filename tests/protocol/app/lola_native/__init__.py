"""An app whose devices may be native ones."""
