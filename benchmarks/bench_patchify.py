"""patchify against eager torch: to float, normalise, unfold.

Part of the ratio is that our output asks for huge pages; torch's do with THP_MEM_ALLOC_ENABLE=1. The bound is a copy
into new memory of as many bytes as the tiles and the rows have together.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import unfold

from benchmarks.baselines import normalize
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
from mmrm_fast.images import NORMALIZATION
from mmrm_fast.ops.patchify import patchify

NUM_TILES, SIDE, PATCH_SIZE = 16, 448, 14
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
BASELINE = "eager"


def rows(options: Options) -> Iterator[Row]:
    """One row a dtype."""
    for dtype in BOUNDS:
        sides = make_sides(dtype)
        ours, theirs, copy = interleaved([*sides.values(), make_copy(dtype)], repeats=options.repeats)
        what = f"copy at {bandwidth(NUM_TILES * SIDE**2 * 3 * (1 + dtype.itemsize), copy.median)}"
        yield make_row(
            "ops", case(dtype), str(dtype).removeprefix("torch."), ours=ours, baseline=BASELINE, theirs=theirs,
            checks=checks(sides, dtype), **bounded(ours, copy.median, what),
        )  # fmt: skip


def case(dtype: torch.dtype) -> str:
    """The row's name."""
    return f"patchify {NUM_TILES} tiles of {SIDE}, {str(dtype).removeprefix('torch.')}"


def make_copy(dtype: torch.dtype) -> Callable[[], Tensor]:
    """The bound: half of the bytes read, half of them written."""
    source = torch.ones(NUM_TILES * SIDE * SIDE * 3 * (1 + dtype.itemsize) // 2, dtype=torch.uint8)
    return lambda: fresh_memory(len(source), dtype=torch.uint8).copy_(source)


def make_sides(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Both implementations on the same tiles; each returns the patch rows."""
    generator = torch.Generator().manual_seed(0)
    tiles_ISSC = torch.randint(256, (NUM_TILES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    mean, std = NORMALIZATION["imagenet"]

    def ours() -> Tensor:
        return patchify(tiles_ISSC, mean, std, patch_size=PATCH_SIZE, dtype=dtype)

    def eager() -> Tensor:
        pixels_ICSS = normalize(tiles_ISSC, mean, std, dtype)
        return unfold(pixels_ICSS, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)

    return {"ours": ours, BASELINE: eager}


def checks(sides: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> list[Check]:
    """The error of our rows."""
    return [Check(relative_error(sides["ours"]().float(), sides[BASELINE]().float()), BOUNDS[dtype])]


@pytest.mark.parametrize("side", ["ours", BASELINE])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_patchify(benchmark, dtype, side):
    sides = make_sides(dtype)
    assert all(check.passed for check in checks(sides, dtype))
    benchmark.group = case(dtype)
    benchmark(sides[side])
