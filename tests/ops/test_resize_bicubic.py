"""resize_bicubic gives every bit that Pillow gives, at any size, and cuts the result into tiles."""

import math

import numpy as np
import PIL
import pytest
from PIL import Image

import mmrm_fast._native
from mmrm_fast.ops import resize_bicubic as op
from mmrm_fast.ops.resize_bicubic import is_vertical_first, resize_bicubic, resize_bicubic_cpu, resize_bicubic_ref


def noise(height, width, seed=0):
    """Of two kinds: any values, and the extremes alone, which overshoot and are clipped."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8) if seed % 2 else rng.choice(
        np.array([0, 255], np.uint8), (height, width, 3)
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_random_sizes_have_pillows_bits(seed):
    rng = np.random.default_rng(seed)
    for number in range(25):
        height, width, tile_size = np.exp(rng.uniform(0, [math.log(700), math.log(700), math.log(150)])).astype(int)
        grid = *rng.integers(1, 5, 2).tolist(), int(tile_size), bool(number % 3)
        image = noise(height, width, number)
        result, expected = resize_bicubic_cpu(image, *grid), resize_bicubic_ref(image, *grid)
        np.testing.assert_array_equal(result, expected, strict=True, err_msg=f"{image.shape} {grid}")


@pytest.mark.parametrize(
    ("height", "width", "columns", "rows", "tile_size"),
    [
        (1, 1, 1, 1, 1),
        (1, 1, 2, 3, 56),
        (56, 56, 1, 1, 56),  # nothing to do
        (112, 70, 2, 2, 56),  # one axis only
        (70, 112, 2, 2, 56),
        (1, 900, 6, 1, 28),
        (90, 1, 1, 3, 28),
        (op.LONGEST, 700, 1, 1, 3),
        (2, op.LONGEST, 2, 1, 3),
        (683, 1024, 3, 2, 448),
        (683, 1024, 1, 1, 448),
        (640, 480, 1, 1, 448),  # vertical first since Pillow 13
    ],
)
def test_odd_sizes_have_pillows_bits(height, width, columns, rows, tile_size):
    image = noise(height, width, 1)
    result, expected = (f(image, columns, rows, tile_size, True) for f in (resize_bicubic_cpu, resize_bicubic_ref))
    np.testing.assert_array_equal(result, expected, strict=True)


def test_pillow_13_resizes_vertically_first_where_the_height_is_reduced_more(monkeypatch):
    assert not is_vertical_first((1024, 683), (1344, 896))
    monkeypatch.setattr(PIL, "__version__", "13.0.0")
    assert is_vertical_first((480, 640), (448, 448))
    assert not is_vertical_first((1200, 1600), (448, 448))
    monkeypatch.setattr(PIL, "__version__", "12.2.0")
    assert not is_vertical_first((480, 640), (448, 448))


@pytest.mark.parametrize("vertical_first", [False, True])
def test_the_axes_are_resized_one_after_the_other(vertical_first):
    image, tiles = noise(90, 70), np.empty((1, 32, 32, 3), np.uint8)
    mmrm_fast._native.resize_bicubic_cpu(image, tiles, 1, 1, vertical_first)
    between = (70, 32) if vertical_first else (32, 90)
    expected = Image.fromarray(image).resize(between, Image.Resampling.BICUBIC)
    assert np.array_equal(tiles[0], expected.resize((32, 32), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("height", "width"), [(1, op.LONGEST + 1), (301, 3)])
def test_extreme_pictures_are_left_to_pillow(height, width, monkeypatch):
    monkeypatch.setattr(op, "resize_bicubic_cpu", None)
    assert resize_bicubic(noise(height, width), columns=1, rows=1, tile_size=4).shape == (1, 4, 4, 3)


def test_without_the_native_module_pillow_does_it(monkeypatch):
    image = noise(50, 40)
    expected = resize_bicubic(image, columns=2, rows=3, tile_size=14, thumbnail=True)
    monkeypatch.setattr(op, "native", lambda: None)
    assert np.array_equal(resize_bicubic(image, columns=2, rows=3, tile_size=14, thumbnail=True), expected)


def test_a_strided_image_is_taken_as_it_is():
    image = noise(60, 80)[::2, ::-1]
    expected = resize_bicubic_ref(np.ascontiguousarray(image), 1, 1, 28, False)
    assert np.array_equal(resize_bicubic(image, columns=1, rows=1, tile_size=28), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4), np.uint8), ((4, 4, 4), np.uint8), ((4, 0, 3), np.uint8), ((4, 4, 3), np.int8)]
)
def test_a_wrong_image_is_named(shape, dtype):
    with pytest.raises(ValueError, match=r"the image must be \[H, W, 3\] uint8, got \["):
        resize_bicubic(np.zeros(shape, dtype), columns=1, rows=1, tile_size=4)


def test_an_empty_grid_is_named():
    with pytest.raises(ValueError, match="a grid of 0 x 1 tiles of 4 pixels is empty"):
        resize_bicubic(noise(4, 4), columns=0, rows=1, tile_size=4)


@pytest.mark.parametrize(
    ("tiles", "columns", "rows"), [((2, 4, 4, 3), 1, 1), ((1, 4, 5, 3), 1, 1), ((4, 4, 4, 3), -2, -2)]
)
def test_the_native_function_checks_its_arguments(tiles, columns, rows):
    with pytest.raises(ValueError, match="resize_bicubic_cpu takes"):
        mmrm_fast._native.resize_bicubic_cpu(noise(4, 4), np.empty(tiles, np.uint8), columns, rows, False)
