"""Images to uint8 tiles: decode, choose the aspect-ratio grid, resize, cut.

Tiles stay uint8 `[I, S, S, 3]` on the host; normalisation happens inside the patch embedding on the device.
The grid is InternVL's dynamic tiling: the whole image is stretched over the grid of `tile_size` squares whose
aspect ratio is nearest, and a thumbnail follows when there is more than one tile.

| picture | becomes |
| --- | --- |
| EXIF orientation, in a PNG also behind the pixels | turned upright, also for the choice of the grid |
| alpha, in any mode (RGBA, LA, PA), a transparent palette entry or colour | blended over white |
| CMYK, YCbCr, palette, greyscale, 1-bit | Pillow's conversion to RGB |
| greyscale of 9 to 16 bits (PNG, TIFF) | its upper 8 bits, white and black as the file means them |
| 32-bit integer and floating point | clipped at 0 and 255, as Pillow does |
| animated (GIF, WebP, APNG), several pages | its first frame |
| over `MAX_PIXELS`, truncated, not a picture, of a kind that is not in `FORMATS` | an `ImageError` naming it |

With `compat="reference"` a picture is what `Image.open(path).convert("RGB")` gives, as in the public reference
implementation: EXIF is ignored, alpha dropped unblended, 16-bit values clipped at 255; and of grids that are equally
near and of equal area the first is taken in the order of the reference's Python set.
"""

import io
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmrm_fast.data.types import FieldError
from mmrm_fast.ops.resize_bicubic import resize_bicubic

MAX_PIXELS = 178_956_970  # Pillow's own decompression-bomb limit, enforced here as an error
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # what people send; EPS would run Ghostscript
FORMATS += ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()
EXIF_ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags
WHITE_IS_ZERO = 0
MAX_CHUNKS = 1 << 16  # of a PNG that are looked through for an orientation behind its pixels
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)
SPECIAL = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip
NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class ImageError(FieldError):
    """An image that cannot be used; the message names the file and the reason."""

    def __init__(self, reason: str):
        super().__init__("img_path", reason)


Compat = Literal["reference"] | None
Source = str | Path | bytes | BinaryIO  # a picture's path, content or open file


@dataclass(frozen=True)
class Tiling:
    """How an image becomes tiles: `tile_size` pixels a side, `min_tiles` to `max_tiles`, thumbnail or not.

    `pad2square` pads a picture that becomes one tile only because `max_tiles` is 1, with `pad_colour` (the mean of the
    normalisation, `mean_colour`), instead of stretching it. `compat="reference"` decodes as the reference does.
    """

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    pad2square: bool = False
    pad_colour: tuple[int, int, int] = (123, 116, 103)
    compat: Compat = None

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles, thumbnail included, that an image of `width` x `height` pixels becomes."""
        columns, rows = choose_grid(width, height, self)
        count = columns * rows
        return count + 1 if self.thumbnail and count > 1 else count


def mean_colour(normalize_type: str) -> tuple[int, int, int]:
    """The mean of a normalisation as a uint8 colour, rounded down, for `pad2square`."""
    return tuple(int(value * 255) for value in NORMALIZATION[normalize_type][0])


@lru_cache
def tile_grids(min_tiles: int, max_tiles: int, compat: Compat = None) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with `min_tiles <= columns * rows <= max_tiles`, by area, then by columns.

    The reference sorts a Python set by area alone: among equal areas the order is that of the set, which for pairs of
    small integers depends on the values and on the order of insertion, not on the process.
    """
    found = {(c, r) for n in range(min_tiles, max_tiles + 1) for c in range(1, n + 1) for r in range(1, n + 1)
             if min_tiles <= c * r <= max_tiles}  # fmt: skip
    return tuple(sorted(found, key=lambda grid: (grid[0] * grid[1], () if compat else grid)))


def choose_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """The (columns, rows) nearest in aspect ratio; of equals, the larger if the image fills over half of it."""
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in tile_grids(tiling.min_tiles, tiling.max_tiles, tiling.compat):
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
    columns, rows = choose_grid(*image.size, tiling)
    if tiling.pad2square and tiling.max_tiles == 1:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tiling.pad_colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    options = {"columns": columns, "rows": rows, "thumbnail": tiling.thumbnail and columns * rows > 1}
    return resize_bicubic(np.asarray(image), tile_size=tiling.tile_size, **options)


def white_tile(tile_size: int) -> np.ndarray:
    """What the ablations and the proxy see in place of a picture: one white tile, uint8 `[1, S, S, 3]`."""
    return np.full((1, tile_size, tile_size, 3), 255, np.uint8)


@contextmanager
def opened(sources: Sequence[str | bytes]) -> Iterator[tuple[Source, ...]]:
    """The pictures' files, each opened once however often it is read; a path that cannot be opened stays a path."""
    with ExitStack() as stack:
        files = list(sources)
        for place, source in enumerate(sources):
            if not isinstance(source, bytes):
                with suppress(OSError, ImageError):
                    refuse_special(source)
                    files[place] = stack.enter_context(open(source, "rb"))
        yield tuple(files)


def refuse_special(path: str | Path) -> None:
    """Raise `ImageError` where something else than a regular file is at a path: it may never open, or never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in SPECIAL.items() if is_kind(mode)), "something else")
        raise ImageError(f"{path}: {kind}, not a regular file")


def described(source: Source) -> str:
    """A picture's path, or what it is, for messages."""
    if isinstance(source, bytes):
        return f"an encoded image of {len(source)} bytes"
    return str(source.name if isinstance(source, io.IOBase) else source)


def open_image(source: Source) -> Image.Image:
    """Open an image file, or its bytes, lazily (header only), refusing what is not one.

    Raises:
        ImageError: missing, empty, not an image, or over `MAX_PIXELS`.
    """
    name = described(source)
    try:
        if isinstance(source, str | Path):
            refuse_special(source)
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such image file") from None
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: {kind_of_file(source)}; save it as one of {', '.join(FORMATS)}") from None
    except Exception as error:  # a malformed file raises whatever its parser meets
        raise ImageError(f"{name}: {error or type(error).__name__}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{name}: {image.width} x {image.height} pixels is over the limit of {MAX_PIXELS}")
    image.filename = ""  # else Pillow maps a TIFF into memory, where turning it sideways mixes up its rows
    return image


def kind_of_file(source: Source) -> str:
    """What a file that is not read is, by its first bytes."""
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return kind_of_file(file)
    if not isinstance(source, bytes):
        source.seek(0)
        source = source.read(16)
    Image.init()
    head = source[:16].ljust(16, b"\xff")
    kind = next((kind for kind, (_, accept) in Image.OPEN.items() if accept and accept(head) is True), None)
    return f"pictures of kind {kind} are not read" if kind and kind not in FORMATS else "not an image"


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, of what Pillow decodes, without decoding; 1 where it is unreadable."""
    if image.format == "TIFF":
        return 1  # turned by Pillow, as its size is
    try:
        exif = Image.Image.getexif(image)  # a PNG's own method would decode the picture
        if image.format == "PNG" and EXIF_ORIENTATION not in exif:
            exif = Image.Exif()
            exif.load(exif_of_chunks(image.fp))
        return exif.get(EXIF_ORIENTATION, 1)
    except Exception:  # malformed EXIF raises whatever its parser meets
        return 1


def exif_of_chunks(file: BinaryIO) -> bytes:
    """The eXIf chunk of a PNG wherever it stands, empty without one; the file is left at its place."""
    place = file.tell()
    file.seek(8)
    try:
        for _ in range(MAX_CHUNKS):
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, io.SEEK_CUR)
    except struct.error:
        pass  # the end
    finally:
        file.seek(place)
    return b""


def image_size(source: Source, compat: Compat = None) -> tuple[int, int]:
    """(width, height) as shown, EXIF orientation applied, read from the header alone. Raises `ImageError`."""
    with open_image(source) as image:
        return image.size[::-1] if not compat and orientation(image) in SIDEWAYS else image.size


def load_image(source: Source, compat: Compat = None) -> Image.Image:
    """Decode an image to RGB: upright by its EXIF orientation, transparency blended over white.

    Raises:
        ImageError: as `open_image`, and for truncated or corrupt content.
    """
    with open_image(source) as image:
        try:
            if compat:
                return image.convert("RGB")
            turn = UPRIGHT.get(orientation(image))
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                image = Image.fromarray(upper_bits(image))
            elif image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("RGB")
        except Exception as error:  # as in `open_image`
            raise ImageError(f"{described(source)}: {error or type(error).__name__}") from None
    return image.transpose(turn) if turn is not None else image


def upper_bits(image: Image.Image) -> np.ndarray:
    """The upper 8 bits of greyscale that has more, which Pillow would clip, uint8 [height, width]."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    (bits,) = tags.get(BITS_PER_SAMPLE, (16,))
    values = np.asarray(image)
    shown = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        shown = 255 - shown
    return np.where(values == image.info.get("transparency", -1), np.uint8(255), shown)


def load_tiles(source: Source, tiling: Tiling) -> np.ndarray:
    """Decode and tile one image: uint8 `[I, S, S, 3]`."""
    return tile_image(load_image(source, tiling.compat), tiling)
