"""patchify against eager torch: to float, normalise, unfold.

The bound is a copy into new memory of as many bytes as the tiles and the rows have together.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import unfold

from benchmarks.baselines import normalize
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
from mmrm_fast.data.images import NORMALIZATION
from mmrm_fast.ops.patchify import patchify

NUM_TILES, SIDE, PATCH_SIZE = 16, 448, 14
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
CASES = tuple((dtype,) for dtype in BOUNDS)
BASELINE = "eager"


def rows(options: Options) -> Iterator[Row]:
    """One row a dtype."""
    for (dtype,) in CASES:
        sides = make_sides(dtype, device=options.device)
        half = torch.ones(NUM_TILES * SIDE**2 * 3 * (1 + dtype.itemsize) // 2, dtype=torch.uint8, device=options.device)
        ours, theirs, copy = interleaved([*sides.values(), half.clone], repeats=options.repeats)
        what = f"copy at {bandwidth(2 * half.nbytes, copy.median)}"
        yield make_row(
            "ops", title(dtype), str(dtype).removeprefix("torch."), ours=ours, baseline=BASELINE, theirs=theirs,
            checks=checks(sides), device=options.device.type, **bounded(ours, copy.median, what),
        )  # fmt: skip


def title(dtype: torch.dtype) -> str:
    """The row's name."""
    return f"patchify {NUM_TILES} tiles of {SIDE}, {str(dtype).removeprefix('torch.')}"


def make_sides(dtype: torch.dtype, *, device: torch.device = CPU) -> Sides:
    """Both implementations on the same tiles; each returns the patch rows."""
    generator = torch.Generator().manual_seed(0)
    tiles_ISSC = torch.randint(256, (NUM_TILES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator).to(device)
    mean, std = NORMALIZATION["imagenet"]

    def ours() -> tuple[Tensor]:
        return (patchify(tiles_ISSC, mean, std, patch_size=PATCH_SIZE, dtype=dtype),)

    def eager() -> tuple[Tensor]:
        pixels_ICSS = normalize(tiles_ISSC, mean, std, dtype)
        return (unfold(pixels_ICSS, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1),)

    return {"ours": ours, BASELINE: eager}


def checks(sides: Sides) -> list[Check]:
    """The error of our rows."""
    (result,), (expected,) = sides["ours"](), sides[BASELINE]()
    return [Check(relative_error(result.float(), expected.float()), BOUNDS[result.dtype])]
