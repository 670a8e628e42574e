"""A packed batch to one reward a response."""
