"""Images to uint8 tiles: decode, choose the aspect-ratio grid, resize, cut.

Tiles stay uint8 `[I, S, S, 3]` on the host; normalisation happens inside the patch embedding on the device.
The grid is InternVL's dynamic tiling: the whole image is stretched over the grid of `tile_size` squares whose
aspect ratio is nearest, and a thumbnail follows when there is more than one tile.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # Pillow's own decompression-bomb limit, enforced here as an error
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class ImageError(ValueError):
    """An image that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Tiling:
    """How an image becomes tiles: `tile_size` pixels a side, `min_tiles` to `max_tiles`, thumbnail or not."""

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles, thumbnail included, that an image of `width` x `height` pixels becomes."""
        columns, rows = choose_grid(width, height, self)
        count = columns * rows
        return count + 1 if self.thumbnail and count > 1 else count


@lru_cache
def tile_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with `min_tiles <= columns * rows <= max_tiles`, by area, then by columns."""
    sides = range(1, max_tiles + 1)
    grids = [(c, r) for c in sides for r in sides if min_tiles <= c * r <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def choose_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """The (columns, rows) nearest in aspect ratio; of equals, the larger if the image fills over half of it."""
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in tile_grids(tiling.min_tiles, tiling.max_tiles):
        distance = abs(aspect - columns / rows)
        fills = area > 0.5 * tiling.tile_size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (columns, rows), distance
    return best


def tile_image(image: Image.Image, tiling: Tiling) -> np.ndarray:
    """Stretch an RGB image over its grid and cut it, row by row, thumbnail last.

    Returns:
        uint8 `[I, S, S, 3]`, S = `tiling.tile_size`, I = `tiling.num_tiles(*image.size)`.
    """
    size = tiling.tile_size
    columns, rows = choose_grid(*image.size, tiling)
    sheet = np.asarray(image.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
    tiles = sheet.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if tiling.thumbnail and columns * rows > 1:
        thumbnail = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, thumbnail[None]])
    return np.ascontiguousarray(tiles)


def open_image(path: str | Path) -> Image.Image:
    """Open an image lazily (header only), refusing what is not one.

    Raises:
        ImageError: missing, empty, not an image, or over `MAX_PIXELS`.
    """
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not an image that Pillow can read") from None
    except (OSError, Image.DecompressionBombError, ValueError) as error:
        raise ImageError(f"{path}: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{path}: {image.width} x {image.height} pixels is over the limit of {MAX_PIXELS}")
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, from what the header says before the pixels; 1 where it is unreadable."""
    try:
        return Image.Image.getexif(image).get(EXIF_ORIENTATION, 1)  # a PNG's own method would decode the picture
    except Exception:  # malformed EXIF raises whatever its parser meets
        return 1


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) as shown, EXIF orientation applied, read from the header alone. Raises `ImageError`."""
    with open_image(path) as image:
        return image.size[::-1] if orientation(image) in SIDEWAYS else image.size


def load_image(path: str | Path) -> Image.Image:
    """Decode an image to RGB: upright by its EXIF orientation, transparency blended over white.

    Raises:
        ImageError: as `open_image`, and for truncated or corrupt content.
    """
    with open_image(path) as image:
        turn = UPRIGHT.get(orientation(image))
        try:
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            if image.mode.startswith("I;16"):  # Pillow would clip it at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"{path}: {error}") from None
    return image.transpose(turn) if turn is not None else image


def load_tiles(path: str | Path, tiling: Tiling) -> np.ndarray:
    """Decode and tile one image file: uint8 `[I, S, S, 3]`."""
    return tile_image(load_image(path), tiling)
