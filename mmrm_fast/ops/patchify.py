"""patchify: uint8 tiles to normalised patch rows, so that the patch embedding is one matrix product.

I tiles, S pixels a tile side, p pixels a patch side, N = I * (S / p)^2 patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrm_fast.ops.native import addresses, native
from mmrm_fast.ops.triton import use_triton

CHANNELS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

library = torch.library.Library("mmrm_fast", "FRAGMENT")
library.define("patchify(Tensor tiles, Tensor scale, Tensor shift, int patch_size, ScalarType dtype) -> Tensor")


def patchify_ref(tiles, scale, shift, patch_size, dtype):
    """What the op means, in plain torch; any device."""
    num_tiles, side = tiles.shape[:2]
    grid = side // patch_size
    values = (tiles.to(scale.dtype) * scale + shift).to(dtype)
    patches = values.reshape(num_tiles, grid, patch_size, grid, patch_size, CHANNELS).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(_shape(tiles, patch_size))


def _shape(tiles: Tensor, patch_size: int) -> tuple[int, int]:
    return tiles.shape[0] * (tiles.shape[1] // patch_size) ** 2, CHANNELS * patch_size**2


library.impl("patchify", patchify_ref, "CompositeExplicitAutograd")


def patchify_cpu(tiles, scale, shift, patch_size, dtype):
    """`patchify_ref` in C++."""
    rows = tiles.new_empty(_shape(tiles, patch_size), dtype=dtype)
    inputs = [t.contiguous() for t in (tiles, scale, shift)]
    native().patchify_cpu(
        str(dtype), *addresses(*inputs, rows, device=tiles.device), *tiles.shape[:2], patch_size,
        torch.get_num_threads(),
    )  # fmt: skip
    return rows


if native() is not None:
    library.impl("patchify", patchify_cpu, "CPU")
use_triton(library, "patchify", patchify=patchify_ref)


@torch.library.register_fake("mmrm_fast::patchify", lib=library)
def _(tiles, scale, shift, patch_size, dtype):
    return tiles.new_empty(_shape(tiles, patch_size), dtype=dtype)


def patchify(
    tiles_ISSC: Tensor, mean: Sequence[float], std: Sequence[float], *, patch_size: int, dtype: torch.dtype
) -> Tensor:
    """Normalised patches of uint8 tiles, one a row: `(tile / 255 - mean) / std`, as `tile * scale + shift`.

    A convolution with stride and kernel `patch_size` over the normalised tiles is a matrix product of these rows with
    its weight viewed as [D, 3 * patch_size^2].

    Args:
        tiles_ISSC: [I, S, S, 3] uint8.
        mean, std: of the normalisation, one a channel, for pixels in 0..1.
        patch_size: p, which divides S.
        dtype: of the rows.

    Returns:
        [N, 3 * p * p] `dtype`, patches row by row of each tile, columns in (channel, y, x) order; computed in float32
        (float64 for float64) and rounded once. It carries no gradient.

    Raises:
        ValueError: a wrong shape or dtype, a patch size that does not divide S, not one mean and std a channel.
    """
    side = tiles_ISSC.shape[1] if tiles_ISSC.ndim == 4 else None
    if tiles_ISSC.dtype != torch.uint8 or side is None or tiles_ISSC.shape[2:] != (side, CHANNELS):
        raise ValueError(f"tiles must be [I, S, S, 3] uint8, got {list(tiles_ISSC.shape)} {tiles_ISSC.dtype}")
    if patch_size < 1 or side % patch_size:
        raise ValueError(f"patch_size must divide the tiles' {side} pixels, got {patch_size}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if len(mean) != CHANNELS or len(std) != CHANNELS:
        raise ValueError(f"mean and std must be one a channel, got {mean} and {std}")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = (
        torch.tensor(values, dtype=exact).to(tiles_ISSC.device, non_blocking=True)
        for values in ([1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)])
    )
    return torch.ops.mmrm_fast.patchify(tiles_ISSC, scale, shift, patch_size, dtype)
