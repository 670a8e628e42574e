"""pixel_shuffle_norm, forward and with backward, against transformers' sequence: slice, two permutes, LayerNorm.

Results are verified against that sequence in float32: on the CPU torch sums LayerNorm's bfloat16 weight gradient in
bfloat16, which is wrong by several per cent here. Part of the ratio is that our outputs ask for huge pages; torch's do
with THP_MEM_ALLOC_ENABLE=1. The bound is a copy of the hidden states into new memory, once for the forward pass and 1.5
times for the backward, which reads two such tensors and writes one. In bfloat16 half as many bytes take the same
arithmetic, which then bounds it: one pass over a value in registers costs what its two bytes do.
"""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import InternVLModel

from benchmarks.harness import (
    Check,
    Options,
    Row,
    bandwidth,
    bounded,
    fresh_memory,
    interleaved,
    make_row,
    relative_error,
)
from mmrm_fast.ops.pixel_shuffle_norm import pixel_shuffle_norm

NUM_TILES, GRID, CHANNELS = 16, 32, 1024
EPS = 1e-5
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
PASSES = {"forward": 1.0, "forward+backward": 2.5}  # copies of the hidden states that as many bytes pass in
BASELINE = "eager"


def rows(options: Options) -> Iterator[Row]:
    """One row a dtype and pass."""
    for dtype, passes in product(BOUNDS, PASSES):
        inputs = make_inputs(dtype)
        sides = [*make_sides(inputs, passes).values(), make_copy(inputs[0])]
        ours, theirs, copy = interleaved(sides, repeats=options.repeats)
        what = f"copy at {bandwidth(2 * inputs[0].nbytes, copy.median)}"
        yield make_row(
            "ops", case(dtype, passes), str(dtype).removeprefix("torch."), ours=ours, baseline=BASELINE, theirs=theirs,
            checks=checks(inputs, passes), **bounded(ours, PASSES[passes] * copy.median, what),
        )  # fmt: skip


def case(dtype: torch.dtype, passes: str) -> str:
    """The row's name."""
    size = f"{NUM_TILES} x {1 + GRID**2:,} x {CHANNELS:,}"
    return f"pixel_shuffle_norm {size} {passes}, {str(dtype).removeprefix('torch.')}"


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias and the gradient of the rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((NUM_TILES, 1 + GRID**2, CHANNELS), 4 * CHANNELS, 4 * CHANNELS, (NUM_TILES * GRID**2 // 4, 4 * CHANNELS))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def make_copy(hidden_ITC: Tensor) -> Callable[[], Tensor]:
    """The bound: hidden states read and as many rows written."""
    return lambda: fresh_memory(*hidden_ITC.shape, dtype=hidden_ITC.dtype).copy_(hidden_ITC)


def make_sides(inputs: tuple[Tensor, ...], passes: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Both implementations on the same inputs; each returns the rows or the gradients of the inputs."""
    grad = inputs[-1]
    leaves = [t.detach().requires_grad_(passes != "forward") for t in inputs[:-1]]

    def side(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        if passes == "forward":
            return lambda: (function(*leaves),)
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    return {"ours": side(ours), BASELINE: side(eager)}


def ours(hidden_ITC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Our rows."""
    return pixel_shuffle_norm(hidden_ITC, weight, bias, eps=EPS)


def eager(hidden_ITC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The baseline's rows."""
    squares = hidden_ITC[:, 1:].reshape(NUM_TILES, GRID, GRID, CHANNELS)
    shuffled = InternVLModel.pixel_shuffle(None, squares, scale_factor=0.5)
    return layer_norm(shuffled.reshape(-1, 4 * CHANNELS), weight.shape, weight, bias, EPS)


def checks(inputs: tuple[Tensor, ...], passes: str) -> list[Check]:
    """Errors of our rows or gradients against the baseline's in float32."""
    results = make_sides(inputs, passes)["ours"]()
    exact = make_sides(tuple(t.float() for t in inputs), passes)[BASELINE]()
    bound = BOUNDS[inputs[0].dtype]
    return [Check(relative_error(result.float(), e), bound) for result, e in zip(results, exact, strict=True)]


@pytest.mark.parametrize("side", ["ours", BASELINE])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_pixel_shuffle_norm(benchmark, dtype, passes, side):
    inputs = make_inputs(dtype)
    assert all(check.passed for check in checks(inputs, passes))
    benchmark.group = case(dtype, passes)
    benchmark(make_sides(inputs, passes)[side])
