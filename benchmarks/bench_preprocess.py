"""Images/s from JPEG photographs of up to a megapixel to the model's input, at 1, 3 and 7 tiles.

Ours: Pillow decodes, `resize_bicubic` stretches and cuts to uint8 tiles with Pillow's bits; `patchify` normalises
them to patch rows (on the device in training). The bound is the decoding, which is on both sides.
`reference`: the reference implementation's pipeline on one image: Pillow decodes, stretches and crops every tile, each
is made a float tensor and normalised as torchvision defines it (rebuilt here), and all are stacked.
Both end in float32, compared pixel by pixel.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import unfold

from benchmarks.harness import Baseline, Bound, Case, Check, Comparison, Options, Row, compare, relative_error
from benchmarks.models import PATCH_SIZE, photograph
from mmrm_fast.data.images import NORMALIZATION, Tiling, choose_grid, load_image, load_tiles
from mmrm_fast.ops.patchify import patchify

SIDE = 448
SHAPES = {1: (1024, 1024, 1), 3: (1024, 512, 2), 7: (1024, 683, 6)}  # tiles: width, height, most tiles of the grid
MEAN, STD = NORMALIZATION["imagenet"]


def cases(options: Options) -> Iterator[Case]:
    """One case a number of tiles."""
    for tiles in SHAPES:
        yield Case(f"{tiles} tiles", partial(rows, tiles, options))


def rows(tiles: int, options: Options) -> Iterator[Row]:
    """Verify and time one image."""
    width, height, most = SHAPES[tiles]
    tiling = Tiling(tile_size=SIDE, max_tiles=most)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        photograph(width, height).save(path, quality=90)
        ours, theirs = partial(our_rows, path, tiling), partial(reference_pixels, path, tiling)
        expected = unfold(theirs(), PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
        assert len(expected) == tiles * (SIDE // PATCH_SIZE) ** 2
        baseline = Baseline(theirs, [Check(relative_error(ours(), expected), 1e-5)])
        comparison = Comparison(
            "preprocess", f"preprocess {tiles} tiles", torch.float32, ours, {"reference": baseline},
            bound=lambda: Bound(partial(load_image, path), "Pillow's decoding"), count=(1, "images"),
        )  # fmt: skip
        yield from compare(comparison, options)


def our_rows(path: Path, tiling: Tiling) -> Tensor:
    """Normalised patch rows."""
    tiles = torch.from_numpy(np.require(load_tiles(path, tiling), requirements="W"))
    return patchify(tiles, MEAN, STD, patch_size=PATCH_SIZE, dtype=torch.float32)


def reference_pixels(path: Path, tiling: Tiling) -> Tensor:
    """Normalised tiles [I, 3, S, S]."""
    image = Image.open(path).convert("RGB")
    columns, rows = choose_grid(*image.size, tiling)
    sheet = image.resize((columns * SIDE, rows * SIDE))
    boxes = [(x * SIDE, y * SIDE, (x + 1) * SIDE, (y + 1) * SIDE) for y in range(rows) for x in range(columns)]
    tiles = [sheet.crop(box) for box in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((SIDE, SIDE)))
    return torch.stack([normalized(tile) for tile in tiles])


def normalized(tile: Image.Image) -> Tensor:
    """To RGB, resized to its own size, to a float tensor [3, S, S] in 0..1, then mean and standard deviation."""
    tile = tile.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(tile, copy=True)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std
