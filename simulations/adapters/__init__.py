"""Every tuner of ``peft`` on tiny models: divided, saved, read back and merged."""
