"""What text alone can tell of a preference."""
