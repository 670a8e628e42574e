"""Rewards handed out over HTTP."""
