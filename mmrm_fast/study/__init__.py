"""Whether a model holds elsewhere."""
