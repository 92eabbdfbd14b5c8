"""Classification of rows by an MLP."""
