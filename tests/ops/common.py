"""What the tests of several ops share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def widened(*values) -> list:
    """Floating-point tensors in float64, all else as it is."""
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def is_same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Equal bits, dtypes and shapes."""
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, expected, strict=True))


def is_same_for_any_thread_count(function: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether results have the same bits on 1, 2, 3 and 7 threads."""
    before, runs = torch.get_num_threads(), []
    for num_threads in (1, 2, 3, 7):
        torch.set_num_threads(num_threads)
        runs.append(function())
    torch.set_num_threads(before)
    return all(is_same(run, runs[0]) for run in runs[1:])


def assert_as_exact(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice the reference's, plus the rounding of the result and of the arithmetic."""
    assert actual.dtype == reference.dtype and actual.shape == reference.shape
    if actual.numel():
        arithmetic = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
        floor = (torch.finfo(actual.dtype).eps / 2 + 8 * arithmetic) * exact.abs().max()
        error, allowed = ((t.double() - exact).abs().max() for t in (actual, reference))
        assert error <= 2 * allowed + floor
