"""Sequence classification with Hugging Face Transformers."""
