"""Of every test of an op."""

import pytest
import torch


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """So that a value which an op leaves unset is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
