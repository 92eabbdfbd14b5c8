"""The causal simulation: prompts and completions, and the Flower app that tunes on them."""
