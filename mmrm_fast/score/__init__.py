"""Rewards written down, on Ray."""
