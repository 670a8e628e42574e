"""patchify in Triton: one program a patch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrm_fast.ops.triton.launch import Launch, Plan

CHANNELS = 3


@triton.jit
def patchify_kernel(tiles, scale, shift, out, side, PATCH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    patch = tl.program_id(0).to(tl.int64)
    grid = side // PATCH
    tile = patch // (grid * grid)
    column = tl.arange(0, BLOCK)  # channel, y, x
    mask = column < COLUMNS
    channel = column // (PATCH * PATCH)
    y = tile * side + patch // grid % grid * PATCH + column // PATCH % PATCH
    x = patch % grid * PATCH + column % PATCH
    pixel = tl.load(tiles + (y * side + x) * 3 + channel, mask=mask, other=0).to(tl.float32)
    value = pixel * tl.load(scale + channel, mask=mask, other=0.0) + tl.load(shift + channel, mask=mask, other=0.0)
    tl.store(out + patch * COLUMNS + column, value.to(out.dtype.element_ty), mask=mask)


def patchify_plan(tiles: Tensor, scale: Tensor, shift: Tensor, patch_size: int, dtype: torch.dtype) -> Plan:
    num_tiles, side = tiles.shape[:2]
    num_patches, num_columns = num_tiles * (side // patch_size) ** 2, CHANNELS * patch_size**2
    out = tiles.new_empty((num_patches, num_columns), dtype=dtype)
    arguments = {
        "tiles": tiles.contiguous(),
        "scale": scale.contiguous(),
        "shift": shift.contiguous(),
        "out": out,
        "side": side,
        "PATCH": patch_size,
        "COLUMNS": num_columns,
        "BLOCK": triton.next_power_of_2(num_columns),
    }
    return Plan((out,), (Launch(patchify_kernel, (num_patches,), arguments),))


def patchify_triton(tiles, scale, shift, patch_size, dtype):
    """Patch rows [N, 3 * p * p], computed in float32."""
    return patchify_plan(tiles, scale, shift, patch_size, dtype).run()[0]
