"""Rewards judged: benchmarks, calibration, best-of-N, reports."""
