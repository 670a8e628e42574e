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

from benchmarks.harness import Case, Check, Options, Row, bounded, interleaved, make_row, relative_error
from mmrm_fast.data.images import NORMALIZATION, Tiling, choose_grid, load_image, load_tiles
from mmrm_fast.ops.patchify import patchify
from mmrm_fast.ops.resize_bicubic import resize_bicubic, resize_bicubic_ref

PATCH, SIDE = 14, 448
SHAPES = {1: (1024, 1024, 1), 3: (1024, 512, 2), 7: (1024, 683, 6)}  # tiles: width, height, most tiles of the grid
MEAN, STD = NORMALIZATION["imagenet"]


def cases(options: Options) -> Iterator[Case]:
    """One case a number of tiles, and the op on the largest."""
    for tiles in SHAPES:
        yield Case(f"{tiles} tiles", partial(case_rows, tiles, options))
    yield Case("resize_bicubic", partial(op_rows, max(SHAPES), options))


def case_rows(tiles: int, options: Options) -> Iterator[Row]:
    """Verify and time one image."""
    width, height, most = SHAPES[tiles]
    tiling = Tiling(tile_size=SIDE, max_tiles=most)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        photograph(width, height).save(path, quality=90)
        ours, theirs = partial(our_rows, path, tiling), partial(reference_pixels, path, tiling)
        result, expected = ours(), to_rows(theirs())
        assert len(expected) == tiles * (SIDE // PATCH) ** 2
        timings = interleaved([ours, theirs, partial(load_image, path)], repeats=options.repeats, min_seconds=0)
    bound = bounded(timings[0], timings[2].median, "Pillow's decoding")
    bound["details"]["images/s"] = 1 / timings[0].median
    yield make_row(
        "preprocess", f"preprocess {tiles} tiles", "float32", ours=timings[0], baseline="reference", theirs=timings[1],
        checks=[Check(relative_error(result, expected), 1e-5)], **bound,
    )  # fmt: skip


def op_rows(tiles: int, options: Options) -> Iterator[Row]:
    """Verify and time the stretching alone, every bit compared."""
    width, height, most = SHAPES[tiles]
    image = np.asarray(photograph(width, height))
    columns, rows = choose_grid(width, height, Tiling(tile_size=SIDE, max_tiles=most))
    ours = partial(resize_bicubic, image, columns=columns, rows=rows, tile_size=SIDE, thumbnail=True)
    theirs = partial(resize_bicubic_ref, image, columns, rows, SIDE, True)
    error = 0.0 if np.array_equal(ours(), theirs()) else float("inf")
    timings = interleaved([ours, theirs], repeats=options.repeats)
    case = f"resize_bicubic {width} x {height} to {tiles} tiles"
    yield make_row(
        "preprocess", case, "uint8", ours=timings[0], baseline="Pillow", theirs=timings[1], checks=[Check(error, 0.0)]
    )


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with noise: compresses about as a photograph does."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 100, width // 100, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8))


def our_rows(path: Path, tiling: Tiling) -> Tensor:
    """Normalised patch rows."""
    tiles = torch.from_numpy(np.require(load_tiles(path, tiling), requirements="W"))
    return patchify(tiles, MEAN, STD, patch_size=PATCH, dtype=torch.float32)


def reference_pixels(path: Path, tiling: Tiling) -> Tensor:
    """Normalised tiles [I, 3, S, S]."""
    image = Image.open(path).convert("RGB")
    columns, rows = grid(image, tiling)
    sheet = image.resize((columns * SIDE, rows * SIDE))
    boxes = [(x * SIDE, y * SIDE, (x + 1) * SIDE, (y + 1) * SIDE) for y in range(rows) for x in range(columns)]
    tiles = [sheet.crop(box) for box in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((SIDE, SIDE)))
    return torch.stack([normalized(tile) for tile in tiles])


def grid(image: Image.Image, tiling: Tiling) -> tuple[int, int]:
    """Columns and rows whose aspect ratio is nearest; of equals, the larger if the image fills over half of it."""
    counts = range(1, tiling.max_tiles + 1)
    grids = [(c, r) for c in counts for r in counts if c * r <= tiling.max_tiles]
    aspect, best, best_distance = image.width / image.height, (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        distance = abs(aspect - columns / rows)
        fills = image.width * image.height > 0.5 * SIDE * SIDE * columns * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (columns, rows), distance
    return best


def normalized(tile: Image.Image) -> Tensor:
    """To RGB, resized to its own size, to a float tensor [3, S, S] in 0..1, then mean and standard deviation."""
    tile = tile.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(tile, copy=True)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def to_rows(pixels: Tensor) -> Tensor:
    """[I, 3, S, S] to patch rows [I * patches, 3 * P * P], as a convolution of patch size reads them."""
    return torch.nn.functional.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
