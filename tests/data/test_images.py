"""Images to tiles: the grid of an aspect ratio, the pieces in order, kinds of pictures, errors naming the file."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmrm_fast.data import images
from mmrm_fast.data.images import (
    ImageError,
    Tiling,
    choose_grid,
    image_size,
    load_image,
    load_tiles,
    opened,
    tile_grids,
    tile_image,
)

SMALL = Tiling(56, 1, 6)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def bands(width, height):
    """Smooth, so that JPEG keeps it; red on the left, blue at the bottom."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 - 255 * x / width, 0 * x, 255 * y / height], -1).astype(np.uint8))


@pytest.fixture
def save(tmp_path):
    def write(image, name="picture.png", **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return write


# the grid


def test_grids_are_sorted_by_area_then_by_columns():
    assert tile_grids(1, 4) == ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1))


def test_grids_leave_out_areas_below_the_minimum():
    assert tile_grids(3, 4) == ((1, 3), (3, 1), (1, 4), (2, 2), (4, 1))


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "columns", "rows"),
    [
        (448, 448, 12, 1, 1),
        (10, 10, 12, 1, 1),
        (633, 633, 12, 1, 1),  # 2 x 2 fits as well, but the picture does not fill half of it
        (634, 634, 12, 2, 2),  # now it does
        (2000, 2000, 12, 3, 3),
        (896, 448, 12, 2, 1),
        (448, 896, 12, 1, 2),
        (1344, 896, 6, 3, 2),
        (1344, 896, 5, 2, 2),  # 3 x 2 is over the limit; 1, 2 are equally near to 1.5, so the largest that is half full
        (320, 240, 6, 3, 2),  # nearest wins, however small the picture
        (500, 420, 6, 1, 1),
        (1600, 400, 12, 4, 1),
        (1600, 400, 3, 3, 1),
        (10000, 1, 6, 6, 1),
        (1, 10000, 6, 1, 6),
        (5000, 3000, 1, 1, 1),
    ],
)
def test_the_grid_is_the_nearest_in_aspect_ratio(width, height, max_tiles, columns, rows):
    assert choose_grid(width, height, Tiling(448, 1, max_tiles)) == (columns, rows)


def internvl_grid(width, height, tiling):
    """InternVL's `find_closest_aspect_ratio`, written out."""
    sides = range(1, tiling.max_tiles + 1)
    grids = [(c, r) for c in sides for r in sides if tiling.min_tiles <= c * r <= tiling.max_tiles]
    best, nearest = (1, 1), float("inf")
    for c, r in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - c / r)
        if distance < nearest:
            best, nearest = (c, r), distance
        elif distance == nearest and width * height > 0.5 * tiling.tile_size**2 * c * r:
            best = (c, r)
    return best


@pytest.mark.parametrize("limits", [(1, 6), (1, 12), (2, 8)])
def test_random_sizes_get_the_grid_of_internvl(limits):
    tiling = Tiling(448, *limits)
    for width, height in np.random.default_rng(0).integers(1, 3000, (300, 2)).tolist():
        assert choose_grid(width, height, tiling) == internvl_grid(width, height, tiling)


@pytest.mark.parametrize(
    ("width", "height", "tiling", "num_tiles"),
    [
        (56, 56, SMALL, 1),  # one tile has no thumbnail
        (112, 56, SMALL, 3),
        (168, 112, SMALL, 7),
        (168, 112, Tiling(56, 1, 6, thumbnail=False), 6),
        (56, 56, Tiling(56, 2, 6), 5),  # 2 x 2, the nearest of at least two tiles, and a thumbnail
        (168, 112, Tiling(56, 1, 1), 1),
    ],
)
def test_the_thumbnail_counts_as_a_tile_when_there_are_several(width, height, tiling, num_tiles):
    assert tiling.num_tiles(width, height) == num_tiles


# the tiles


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 3), (3, 2), (2, 2)])
def test_tiles_are_the_pieces_row_by_row(columns, rows):
    image = noise(columns * 56, rows * 56)
    pieces = [
        np.asarray(image.crop((56 * column, 56 * row, 56 * column + 56, 56 * row + 56)))
        for row in range(rows)
        for column in range(columns)
    ]
    assert np.array_equal(tile_image(image, Tiling(56, 1, 6, thumbnail=False)), pieces)


def test_tiles_are_cut_from_the_picture_stretched_over_the_grid():
    image = noise(150, 70)
    sheet = np.asarray(image.resize((112, 56), Image.Resampling.BICUBIC))
    tiles = tile_image(image, SMALL)
    assert np.array_equal(np.concatenate([tiles[0], tiles[1]], axis=1), sheet)


def test_the_thumbnail_is_the_whole_picture_and_comes_last():
    image = noise(170, 110)
    tiles = tile_image(image, SMALL)
    assert tiles.shape == (7, 56, 56, 3)
    assert np.array_equal(tiles[-1], image.resize((56, 56), Image.Resampling.BICUBIC))


def test_tiles_are_contiguous_bytes():
    tiles = tile_image(noise(170, 110), SMALL)
    assert tiles.dtype == np.uint8
    assert tiles.flags.c_contiguous


@pytest.mark.parametrize("orientation", [1, 6], ids=["upright", "sideways"])
def test_the_header_tells_how_many_tiles_there_will_be(save, orientation):
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    for width, height in np.random.default_rng(1).integers(1, 400, (40, 2)).tolist():
        path = save(noise(width, height), "picture.jpg", exif=exif)
        assert SMALL.num_tiles(*image_size(path)) == len(load_tiles(path, SMALL))


# kinds of pictures

WRITTEN = {  # formats and the modes that Pillow writes in them
    "png": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "jpg": ("L", "RGB", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"),
    "gif": ("L", "P", "RGB"),
    "bmp": ("1", "L", "P", "RGB"),
    "avif": ("RGB", "RGBA"),
}
TURNED = ("png", "jpg", "webp", "tiff", "avif")  # formats that carry an orientation
CASES = [
    (kind, mode, orientation)
    for kind, modes in WRITTEN.items()
    for mode in modes
    for orientation in (range(1, 9) if kind in TURNED else (1,))
]
needs_avif = pytest.mark.skipif("AVIF" not in images.FORMATS, reason="Pillow without AVIF")


def picture(mode, width=60, height=30):
    """Smooth bands in a mode, half transparent where it has alpha."""
    image = bands(width, height)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


def by_pillow(path):
    """A picture as Pillow shows it, over white; from bytes, as it mixes up the rows of mapped TIFFs turned sideways."""
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes())))
    if shown.has_transparency_data:
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown.convert("RGBA"))
    return shown.convert("RGB")


@pytest.mark.parametrize(
    ("kind", "mode", "orientation"),
    [pytest.param(*case, marks=needs_avif if case[0] == "avif" else ()) for case in CASES],
)
def test_a_picture_is_what_pillow_shows_upright_and_its_size_is_told_without_decoding(save, kind, mode, orientation):
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    path = save(picture(mode), f"picture.{kind}", **({"exif": exif} if kind in TURNED and orientation > 1 else {}))
    try:
        expected = by_pillow(path)
    except OSError:  # before 13 Pillow cannot read the YCbCr TIFFs that it writes
        with pytest.raises(ImageError):
            load_image(path)
        return
    assert expected.size == ((60, 30) if orientation < 5 else (30, 60))
    for source in (path, path.read_bytes()):
        assert image_size(source) == expected.size
        assert np.array_equal(load_image(source), expected)


@pytest.mark.parametrize(("ending", "kind"), [("jp2", "JPEG2000"), ("ppm", "PPM"), ("ico", "ICO"), ("pcx", "PCX")])
def test_a_picture_of_a_kind_that_few_send_is_refused_by_name(save, ending, kind):
    path = save(noise(40, 30), f"picture.{ending}")
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match=f"kind {kind} are not read; save it as one of PNG"):
            image_size(source)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_behind_the_pixels_of_a_png_turns_it(save, orientation):
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    path = save(bands(60, 30))
    content, end = path.read_bytes(), b"IEND"
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    place = content.index(end) - 4
    path.write_bytes(content[:place] + chunk + content[place:])
    expected = by_pillow(path)
    assert image_size(path) == expected.size == ((60, 30) if orientation < 5 else (30, 60))
    assert np.array_equal(load_image(path), expected)


DEEP = np.linspace(0, 65_535, 24 * 10).astype(np.uint16).reshape(10, 24)


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "white is zero.tiff"])
def test_greyscale_of_more_than_8_bits_is_scaled_to_8(tmp_path, name):
    path = tmp_path / name
    if "white" in name:
        Image.fromarray(65_535 - DEEP).save(path, tiffinfo={images.PHOTOMETRIC: 0})
    else:
        Image.fromarray(DEEP).save(path)
    loaded = np.asarray(load_image(path))
    assert np.abs(loaded[..., 0].astype(int) - (DEEP >> 8)).max() <= 1
    assert (loaded == loaded[..., :1]).all()


def test_a_transparent_grey_of_16_bits_is_white(save):
    path = save(Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), transparency=100 * 257)
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("alpha", "shown"), [(0, (255, 255, 255)), (255, (200, 0, 0)), (51, (244, 204, 204))])
def test_transparency_is_blended_over_white(save, alpha, shown):
    path = save(Image.new("RGBA", (8, 8), (200, 0, 0, alpha)))
    assert np.abs(np.asarray(load_image(path), int) - shown).max() <= 1


def test_a_transparent_palette_entry_is_white(save):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    assert load_image(save(image, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_is_white(save):
    path = save(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


def grey_alpha():
    return Image.merge("LA", [Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 255)])


KINDS = {
    "greyscale": (lambda: Image.new("L", (8, 8), 100), "a.png", (100, 100, 100)),
    "greyscale with alpha": (grey_alpha, "a.png", (100, 100, 100)),
    "black and white": (lambda: Image.new("1", (8, 8), 1), "a.png", (255, 255, 255)),
    "palette": (lambda: Image.new("RGB", (8, 8), (200, 0, 0)).quantize(4), "a.png", (200, 0, 0)),
    "GIF": (lambda: Image.new("RGB", (8, 8), (200, 0, 0)).quantize(4), "a.gif", (200, 0, 0)),
    "CMYK": (lambda: Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", (255, 0, 0)),
    "CMYK TIFF": (lambda: Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.tiff", (255, 0, 0)),
    "WebP": (lambda: Image.new("RGB", (8, 8), (200, 0, 0)), "a.webp", (200, 0, 0)),
    "YCbCr JPEG": (lambda: Image.new("YCbCr", (8, 8), (76, 85, 255)), "a.jpg", (254, 0, 0)),
    "palette with alpha": (lambda: Image.new("RGBA", (8, 8), (200, 0, 0, 255)).quantize(4), "a.png", (200, 0, 0)),
    "32-bit integers": (lambda: Image.new("I", (8, 8), 300), "a.tiff", (255, 255, 255)),
    "floating point": (lambda: Image.new("F", (8, 8), 100.0), "a.tiff", (100, 100, 100)),
    "16-bit TIFF": (lambda: Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), "a.tiff", (100, 100, 100)),
    "16-bit greyscale": (lambda: Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)), "a.png", (100, 100, 100)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_becomes_rgb(save, kind):
    make, name, colour = KINDS[kind]
    loaded = load_image(save(make(), name))
    assert loaded.mode == "RGB"
    assert np.abs(np.array(loaded.getpixel((4, 4)), int) - colour).max() <= 3


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_of_several_frames_the_first_is_taken(save, name):
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    path = save(first, name, save_all=True, append_images=[second])
    assert np.abs(np.array(load_image(path).getpixel((4, 4)), int) - (200, 0, 0)).max() <= 8


def test_the_bytes_of_a_file_are_as_good_as_the_file(save):
    path = save(noise(170, 110))
    assert image_size(path.read_bytes()) == (170, 110)
    assert np.array_equal(load_tiles(path.read_bytes(), SMALL), load_tiles(path, SMALL))


# padding and the reference's habits


@pytest.mark.parametrize(("width", "height", "corner"), [(100, 40, (0, 30)), (40, 101, (30, 0)), (50, 50, (0, 0))])
def test_padding_puts_the_picture_in_the_middle_of_a_square(width, height, corner):
    image = noise(width, height)
    square = Image.new("RGB", (max(width, height),) * 2, (1, 2, 3))
    square.paste(image, corner)
    padded = tile_image(image, Tiling(56, 1, 1, pad2square=True, pad_colour=(1, 2, 3)))
    assert np.array_equal(padded[0], square.resize((56, 56), Image.Resampling.BICUBIC))


def test_tiles_of_a_grid_are_never_padded():
    image = noise(170, 110)
    assert np.array_equal(tile_image(image, Tiling(56, 1, 6, pad2square=True)), tile_image(image, SMALL))


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_reference_ignores_orientation(save, orientation):
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    path = save(bands(60, 30), exif=exif)
    assert image_size(path, "reference") == load_image(path, "reference").size == (60, 30)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_the_reference_drops_alpha_unblended(save, mode):
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0)) if mode != "LA" else Image.new("LA", (8, 8), (200, 0))
    image = image.quantize(4) if mode == "P" else image
    path = save(image)
    assert load_image(path, "reference").getpixel((0, 0)) == Image.open(path).convert("RGB").getpixel((0, 0))
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_grids_of_the_reference_are_sorted_by_area_alone():
    grids = tile_grids(1, 12, "reference")
    assert sorted(grids) == sorted(tile_grids(1, 12))
    assert [columns * rows for columns, rows in grids] == sorted(columns * rows for columns, rows in grids)


@pytest.mark.parametrize(("low", "high"), [(1, 4), (1, 6), (1, 12), (2, 9)])
def test_the_tie_order_of_the_reference_is_that_of_its_set(low, high):
    ratios = set()
    for area in range(low, high + 1):
        ratios.update((i, j) for i in range(1, area + 1) for j in range(1, area + 1) if low <= i * j <= high)
    assert tile_grids(low, high, "reference") == tuple(sorted(ratios, key=lambda grid: grid[0] * grid[1]))


# what is not a picture


def png_header(width, height):
    """A PNG that promises `width` x `height` pixels and holds none."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    framed = (struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def encoded(name, **options):
    buffer = io.BytesIO()
    noise(200, 150).save(buffer, name, **options)
    return buffer.getvalue()


UNUSABLE = {
    "empty": (b"", "not an image"),
    "text": (b"not a picture\n", "not an image"),
    "truncated JPEG": (encoded("JPEG")[:5000], "truncated"),
    "truncated PNG": (encoded("PNG")[:5000], "truncated"),
    "PNG without pixels": (png_header(20, 20), ""),
    "decompression bomb": (png_header(30_000, 30_000), "pixels"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_file_is_an_error_naming_it(tmp_path, kind):
    content, reason = UNUSABLE[kind]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"picture\.png: ") as caught:
        load_tiles(path, SMALL)
    assert reason in str(caught.value)


def size_or_error(path):
    try:
        return image_size(path)
    except ImageError:
        return "error"


@pytest.mark.parametrize("kind", UNUSABLE)
def test_the_size_of_an_unusable_file_is_read_or_is_an_image_error(tmp_path, kind):
    path = tmp_path / "picture.png"
    path.write_bytes(UNUSABLE[kind][0])
    assert size_or_error(path) in ("error", (200, 150), (20, 20))


def test_a_broken_exif_block_is_no_reason_to_crash(save):
    path = save(noise(20, 10), "picture.jpg", exif=b"Exif\0\0not a TIFF header")
    assert size_or_error(path) in ("error", (20, 10))


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg"])
def test_the_size_is_read_without_decoding(monkeypatch, save, name):
    path = save(noise(20, 10), name)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert image_size(path) == (20, 10)


@pytest.mark.parametrize("use", [image_size, load_image])
@pytest.mark.parametrize(("name", "reason"), [("none.png", "no such image file"), ("", "a folder, not a regular file")])
def test_a_path_without_a_file_is_an_error_naming_it(tmp_path, use, name, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        use(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def special(folder):
    """Paths that may never open or never end, by what they are."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "link").symlink_to("pipe")
    (folder / "folder").mkdir()
    paths = {"a named pipe": "pipe", "a socket": "socket", "a folder": "folder"}
    return [*((kind, folder / name) for kind, name in paths.items()), ("a named pipe", folder / "link"),
            ("a device", Path("/dev/zero"))]  # fmt: skip


@pytest.mark.parametrize("use", [image_size, load_image])
def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path, use):
    for kind, path in special(tmp_path):
        with pytest.raises(ImageError, match=rf"{path.name}: {kind}, not a regular file"):
            use(path)
        with opened([str(path)]) as files:
            assert files == (str(path),)


def test_a_picture_over_the_pixel_limit_is_refused(monkeypatch, save):
    path = save(noise(20, 10))
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    assert load_image(path).size == (20, 10)
    monkeypatch.setattr(images, "MAX_PIXELS", 199)
    with pytest.raises(ImageError, match=r"picture\.png: 20 x 10 pixels is over the limit of 199"):
        load_image(path)
