"""A step, and a run of them."""
