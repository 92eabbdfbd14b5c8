"""Train a model whose sub-networks are spread over devices, as D2FT does."""
