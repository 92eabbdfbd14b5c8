"""A run on the disk: configuration, directory, records, checkpoints, trackers."""
