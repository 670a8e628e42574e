"""Records on disk to packed batches; no model, no rank."""
