"""Low-latency cooperative fine-tuning of transformers, as a Flower strategy."""
