"""resize_bicubic: a uint8 image stretched over a grid of tiles, with the bits of Pillow's `Image.resize`.

H, W the image's height and width, S pixels a tile side, I = columns * rows tiles, one more with the thumbnail.
"""

import numpy as np
import PIL
from PIL import Image

from mmrm_fast.ops.native import native

CHANNELS = 3
LONGEST = 1 << 16  # pixels of a side; longer ones are left to Pillow, so that memory stays in proportion to the image
TALLEST = 100  # heights over widths; some versions of Pillow have a rule of their own for what is taller


def resize_bicubic(
    image_HWC: np.ndarray, *, columns: int, rows: int, tile_size: int, thumbnail: bool = False
) -> np.ndarray:
    """The image at columns * S by rows * S pixels, cut into tiles, and a thumbnail.

    Cubic convolution (Keys 1981, a = -1/2) widened by the scale where it reduces, along one axis after the other. The
    weights sum to 1 in float64 and are rounded to 22 fractional bits, sums are int32, what lies between the axes is
    uint8: integer arithmetic, so the same bits on every CPU. One thread: whoever prepares many images has processes.

    Args:
        image_HWC: [H, W, 3] uint8, at least one pixel.
        columns, rows: of the grid.
        tile_size: S, pixels.
        thumbnail: one tile more, the whole image.

    Returns:
        [I, S, S, 3] uint8, tiles row by row, the thumbnail last; every bit is `resize_bicubic_ref`'s.

    Raises:
        ValueError: a wrong shape or dtype, an empty image or grid.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != CHANNELS or not image_HWC.size:
        raise ValueError(f"the image must be [H, W, 3] uint8, got {list(image_HWC.shape)} {image_HWC.dtype}")
    if min(columns, rows, tile_size) < 1:
        raise ValueError(f"a grid of {columns} x {rows} tiles of {tile_size} pixels is empty")
    height, width = image_HWC.shape[:2]
    if native() is None or max(height, width) > LONGEST or height > TALLEST * width:
        return resize_bicubic_ref(image_HWC, columns, rows, tile_size, thumbnail)
    return resize_bicubic_cpu(image_HWC, columns, rows, tile_size, thumbnail)


def resize_bicubic_cpu(image_HWC, columns, rows, tile_size, thumbnail):
    """`resize_bicubic_ref` in C++, without the interpreter lock."""
    image_HWC, count = np.ascontiguousarray(image_HWC), columns * rows
    tiles = np.empty((count + thumbnail, tile_size, tile_size, CHANNELS), np.uint8)
    for part, grid in [(tiles[:count], (columns, rows)), (tiles[count:], (1, 1))][: 1 + thumbnail]:
        out_size = grid[0] * tile_size, grid[1] * tile_size
        vertical_first = is_vertical_first(image_HWC.shape[1::-1], out_size)
        native().resize_bicubic_cpu(image_HWC, part, *grid, vertical_first)
    return tiles


def is_vertical_first(size: tuple[int, int], out_size: tuple[int, int]) -> bool:
    """Which axis the installed Pillow resizes first, (width, height) to (width, height).

    The order shows in the last bits, since what lies between is rounded and clipped. Before version 13 it is always the
    horizontal axis.
    """
    less_width, less_height = size[0] - out_size[0], size[1] - out_size[1]
    is_reduced_more = less_height > 0 and less_height > 2 * less_width
    return is_reduced_more and int(PIL.__version__.partition(".")[0]) >= 13


def resize_bicubic_ref(image_HWC, columns, rows, tile_size, thumbnail):
    """What the op means, in Pillow."""
    image, side = Image.fromarray(image_HWC), tile_size
    sheet = np.asarray(image.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
    tiles = sheet.reshape(rows, side, columns, side, CHANNELS).swapaxes(1, 2).reshape(-1, side, side, CHANNELS)
    last = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))[None]] if thumbnail else []
    return np.concatenate([tiles, *last])
