"""pixel_shuffle_norm, forward and with backward, against transformers' sequence: slice, two permutes, LayerNorm.

Results are verified against that sequence in float32: on the CPU torch sums LayerNorm's bfloat16 weight gradient in
bfloat16, which is wrong by several per cent here. The bound is a copy of the hidden states into new memory, once for
the forward pass and 1.5 times for the backward, which reads two such tensors and writes one. In bfloat16 half as many
bytes take the same arithmetic, which then bounds it: one pass over a value in registers costs what its two bytes do.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import InternVLModel

from benchmarks.harness import (
    CPU,
    Check,
    Options,
    Row,
    Sides,
    bandwidth,
    bounded,
    interleaved,
    make_row,
    relative_error,
)
from mmrm_fast.ops.pixel_shuffle_norm import pixel_shuffle_norm

NUM_TILES, GRID, CHANNELS = 16, 32, 1024
EPS = 1e-5
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
PASSES = {"forward": 1.0, "forward+backward": 2.5}  # copies of the hidden states that as many bytes pass in
CASES = tuple(product(BOUNDS, PASSES))
BASELINE, EXACT = "eager", "eager, float32"


def rows(options: Options) -> Iterator[Row]:
    """One row a dtype and pass."""
    for dtype, passes in CASES:
        sides = make_sides(dtype, passes, device=options.device)
        copied = torch.ones(NUM_TILES, 1 + GRID**2, CHANNELS, dtype=dtype, device=options.device)
        functions = [sides["ours"], sides[BASELINE], copied.clone]
        ours, theirs, copy = interleaved(functions, repeats=options.repeats)
        what = f"copy at {bandwidth(2 * copied.nbytes, copy.median)}"
        yield make_row(
            "ops", title(dtype, passes), str(dtype).removeprefix("torch."), ours=ours, baseline=BASELINE, theirs=theirs,
            checks=checks(sides), device=options.device.type, **bounded(ours, PASSES[passes] * copy.median, what),
        )  # fmt: skip


def title(dtype: torch.dtype, passes: str) -> str:
    """The row's name."""
    size = f"{NUM_TILES} x {1 + GRID**2:,} x {CHANNELS:,}"
    return f"pixel_shuffle_norm {size} {passes}, {str(dtype).removeprefix('torch.')}"


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias and the gradient of the rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((NUM_TILES, 1 + GRID**2, CHANNELS), 4 * CHANNELS, 4 * CHANNELS, (NUM_TILES * GRID**2 // 4, 4 * CHANNELS))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def make_sides(dtype: torch.dtype, passes: str, *, device: torch.device = CPU) -> Sides:
    """Both implementations on the same inputs, and what they are verified against; each returns rows or gradients."""
    inputs = [t.to(device) for t in make_inputs(dtype)]

    def side(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        *leaves, grad = (t.to(dtype) for t in inputs)
        if passes == "forward":
            return lambda: (function(*leaves),)
        leaves = [t.detach().requires_grad_() for t in leaves]
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    return {"ours": side(ours, dtype), BASELINE: side(eager, dtype), EXACT: side(eager, torch.float32)}


def ours(hidden_ITC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Our rows."""
    return pixel_shuffle_norm(hidden_ITC, weight, bias, eps=EPS)


def eager(hidden_ITC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The baseline's rows."""
    squares = hidden_ITC[:, 1:].reshape(NUM_TILES, GRID, GRID, CHANNELS)
    shuffled = InternVLModel.pixel_shuffle(None, squares, scale_factor=0.5)
    return layer_norm(shuffled.reshape(-1, 4 * CHANNELS), weight.shape, weight, bias, EPS)


def checks(sides: Sides) -> list[Check]:
    """Errors of our rows or gradients against the baseline's in float32."""
    results = zip(sides["ours"](), sides[EXACT](), strict=True)
    return [Check(relative_error(result.float(), exact), BOUNDS[result.dtype]) for result, exact in results]
