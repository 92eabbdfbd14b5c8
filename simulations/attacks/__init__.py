"""Attacks on a run, against the server as it is: `python -m simulations.attacks`."""
