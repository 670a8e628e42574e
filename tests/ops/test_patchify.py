"""patchify: a normalised convolution as one product; C++ against the reference, compiler contracts."""

import pytest
import torch
from ops.common import is_same_for_any_thread_count

from mmrm_fast.data.images import NORMALIZATION
from mmrm_fast.ops.patchify import DTYPES, patchify, patchify_cpu, patchify_ref

MEAN, STD = NORMALIZATION["imagenet"]
SIZES = [(2, 28, 14), (3, 10, 5), (1, 6, 1), (2, 7, 7), (5, 96, 16), (0, 28, 14), (2, 0, 14)]
cpp = patchify_cpu


def random_tiles(num_tiles, side, seed=0):
    return torch.randint(
        256, (num_tiles, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def op_args(num_tiles, side, patch_size, dtype):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = torch.rand(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return random_tiles(num_tiles, side), scale.to(exact) / 50, -shift.to(exact), patch_size, dtype


def dense_transposed(tiles):
    """The same values in memory order [I, 3, S, S], as a decoder might hand them over."""
    return tiles.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def normalized(tiles, dtype):
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    return ((tiles.double() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tiles", "side", "patch_size"), SIZES)
def test_cpp_has_the_bits_of_the_reference(num_tiles, side, patch_size, dtype):
    args = op_args(num_tiles, side, patch_size, dtype)
    assert torch.equal(cpp(*args), patchify_ref(*args))
    assert torch.equal(cpp(dense_transposed(args[0]), *args[1:]), patchify_ref(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_as_exact_as_torch(dtype):
    tiles = random_tiles(3, 28)
    exact = torch.nn.functional.unfold(normalized(tiles, torch.float64), 14, stride=14).transpose(1, 2).flatten(0, 1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = (torch.tensor(values, dtype=compute) for values in (MEAN, STD))
    eager = ((tiles.to(compute) / 255 - mean) / std).permute(0, 3, 1, 2)
    eager = torch.nn.functional.unfold(eager, 14, stride=14).transpose(1, 2).flatten(0, 1).to(dtype)
    rows = patchify(tiles, MEAN, STD, patch_size=14, dtype=dtype)
    assert rows.dtype == dtype and rows.shape == (12, 588)
    floor = 8 * torch.finfo(compute).eps
    assert (rows.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_product_with_the_rows_is_the_patch_embedding(dtype):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 8, kernel_size=14, stride=14).to(dtype)
    tiles = random_tiles(3, 56)
    rows = patchify(tiles, MEAN, STD, patch_size=14, dtype=dtype)
    embedded = torch.nn.functional.linear(rows, convolution.weight.flatten(1), convolution.bias)
    expected = convolution(normalized(tiles, dtype)).flatten(2).transpose(1, 2).flatten(0, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(embedded, expected, rtol=tolerance, atol=tolerance)


def test_same_bits_for_any_thread_count():
    args = op_args(4, 112, 14, torch.bfloat16)
    assert is_same_for_any_thread_count(lambda: [cpp(*args)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tiles", "side", "patch_size"), [(2, 4, 2), (1, 1, 1), (0, 4, 2), (1, 0, 2)])
def test_opcheck(num_tiles, side, patch_size, dtype):
    args = op_args(num_tiles, side, patch_size, dtype)
    torch.library.opcheck(torch.ops.mmrm_fast.patchify, args)
    torch.library.opcheck(torch.ops.mmrm_fast.patchify, (dense_transposed(args[0]), *args[1:]))


def test_compiles_to_one_graph():
    def embed(tiles):
        return patchify(tiles, MEAN, STD, patch_size=14, dtype=torch.bfloat16) * 2

    tiles = random_tiles(2, 28)
    assert torch.equal(torch.compile(embed, fullgraph=True, backend="aot_eager")(tiles), embed(tiles))


@pytest.mark.parametrize(
    ("tiles", "options", "message"),
    [
        (torch.zeros(1, 28, 28, 3), {}, r"tiles must be \[I, S, S, 3\] uint8, got \[1, 28, 28, 3\] torch.float32"),
        (random_tiles(1, 28)[:, :14], {}, r"got \[1, 14, 28, 3\]"),
        (random_tiles(1, 28)[0], {}, r"got \[28, 28, 3\]"),
        (random_tiles(1, 28), {"patch_size": 13}, "patch_size must divide the tiles' 28 pixels, got 13"),
        (random_tiles(1, 28), {"patch_size": 0}, "got 0"),
        (random_tiles(1, 28), {"dtype": torch.int32}, "dtype must be one of .*, got torch.int32"),
        (random_tiles(1, 28), {"mean": (0.5,)}, r"mean and std must be one a channel, got \(0.5,\)"),
    ],
)
def test_wrong_arguments_are_named(tiles, options, message):
    options = {"mean": MEAN, "std": STD, "patch_size": 14, "dtype": torch.float32} | options
    with pytest.raises(ValueError, match=message):
        patchify(tiles, options.pop("mean"), options.pop("std"), **options)
