"""What the fine-tuning apps share: keys of a run, devices, rounds, what is kept."""
