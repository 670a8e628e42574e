"""Checkpoint folders in and out."""
