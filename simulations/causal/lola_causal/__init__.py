"""The causal simulation: prompts with completions, and the app that tunes on them."""
