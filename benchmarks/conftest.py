"""`pytest benchmarks --benchmark-only`: the op cases under pytest-benchmark."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch loads, see run.py
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def pytest_configure(config):
    """Tests live in bench_ops.py here."""
    config.addinivalue_line("python_files", "bench_ops.py")
