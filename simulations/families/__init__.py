"""Every model class of transformers that can be built tiny, tried with this library."""
