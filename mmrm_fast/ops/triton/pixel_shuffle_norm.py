"""pixel_shuffle_norm in Triton: a row is two runs of 2C neighbouring values, one of each of two rows of patches.

I tiles, G = 2 H patches a tile side, C channels, N = I * H^2 rows of 4C.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrm_fast.ops.triton.launch import Launch, Plan, block_size, sum_chunks, warps

CHUNK = 64  # rows of one sum of the gradients of weight and bias
CHUNK_ROWS = 16  # of them in registers
CHUNK_COLUMNS = 128


@triton.jit
def _run_offset(row, y, half, channels):
    """Where the run y (0, 1) of a row starts in hidden."""
    tile, patch_y, patch_x = row // (half * half), row // half % half * 2 + y, row % half * 2
    return ((4 * half * half + 1) * tile + 1 + patch_y * 2 * half + patch_x) * channels


@triton.jit
def pixel_shuffle_norm_fwd_kernel(hidden, weight, bias, out, mean, rstd, eps, half, channels, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, 2)[:, None]
    in_run = tl.arange(0, BLOCK)[None, :]
    column = run * 2 * channels + in_run
    mask = (in_run < 2 * channels) & (run < 2)
    x = tl.load(hidden + _run_offset(row, run, half, channels) + in_run, mask=mask, other=0.0).to(tl.float32)
    row_mean = tl.sum(x) / (4 * channels)
    centered = tl.where(mask, x - row_mean, 0.0)
    row_rstd = 1 / tl.sqrt(tl.sum(centered * centered) / (4 * channels) + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    value = centered * row_rstd * w + b
    tl.store(out + row * 4 * channels + column, value.to(out.dtype.element_ty), mask=mask)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit
def pixel_shuffle_norm_bwd_hidden_kernel(
    grad, hidden, weight, mean, rstd, grad_hidden, half, channels, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, 2)[:, None]
    in_run = tl.arange(0, BLOCK)[None, :]
    column = run * 2 * channels + in_run
    mask = (in_run < 2 * channels) & (run < 2)
    place = _run_offset(row, run, half, channels) + in_run
    row_rstd = tl.load(rstd + row)
    x = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
    normal = tl.where(mask, (x - tl.load(mean + row)) * row_rstd, 0.0)
    slope = tl.load(grad + row * 4 * channels + column, mask=mask, other=0.0).to(tl.float32)
    slope *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    along_bias = tl.sum(slope) / (4 * channels)
    along_scale = tl.sum(slope * normal) / (4 * channels)
    value = row_rstd * (slope - along_bias - normal * along_scale)
    tl.store(grad_hidden + place, value.to(grad_hidden.dtype.element_ty), mask=mask)


@triton.jit
def pixel_shuffle_norm_bwd_weight_kernel(
    grad, hidden, mean, rstd, weight_chunks, bias_chunks, num_rows, half, channels,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    in_run = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    column = run * 2 * channels + in_run
    to_weight, to_bias = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        exists = row < num_rows
        mask = exists[:, None] & (in_run < 2 * channels)[None, :]
        place = _run_offset(row, run, half, channels)[:, None] + in_run[None, :]
        x = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row[:, None] * 4 * channels + column[None, :], mask=mask, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + row, mask=exists, other=0.0)
        row_rstd = tl.load(rstd + row, mask=exists, other=0.0)
        to_weight += g * (x - row_mean[:, None]) * row_rstd[:, None]
        to_bias += g
    place = chunk * 4 * channels + column
    tl.store(weight_chunks + place, tl.sum(to_weight, axis=0), mask=in_run < 2 * channels)
    tl.store(bias_chunks + place, tl.sum(to_bias, axis=0), mask=in_run < 2 * channels)


def pixel_shuffle_norm_fwd_plan(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Plan:
    num_tiles, num_tokens, channels = hidden.shape
    half = math.isqrt(num_tokens - 1) // 2
    num_rows = num_tiles * half * half
    out = hidden.new_empty(num_rows, 4 * channels)
    mean, rstd = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    block = triton.next_power_of_2(max(2 * channels, 1))
    arguments = {
        "hidden": hidden.contiguous(),
        "weight": weight.contiguous(),
        "bias": bias.contiguous(),
        "out": out,
        "mean": mean,
        "rstd": rstd,
        "eps": eps,
        "half": half,
        "channels": channels,
        "BLOCK": block,
    }
    launch = Launch(pixel_shuffle_norm_fwd_kernel, (num_rows,), arguments, warps(2 * block))
    return Plan((out, mean, rstd), (launch,))


def pixel_shuffle_norm_bwd_plan(
    grad: Tensor, hidden: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_hidden: bool
) -> Plan:
    num_tokens, channels = hidden.shape[1:]
    half, num_rows = math.isqrt(num_tokens - 1) // 2, mean.shape[0]
    inputs = {
        "grad": grad.contiguous(),
        "hidden": hidden.contiguous(),
        "mean": mean.contiguous(),
        "rstd": rstd.contiguous(),
        "half": half,
        "channels": channels,
    }
    grad_hidden, launches = hidden.new_empty(0), ()
    if need_hidden:
        grad_hidden = hidden.new_empty(hidden.shape)
        grad_hidden[:, 0] = 0
        block = triton.next_power_of_2(max(2 * channels, 1))
        arguments = inputs | {"weight": weight.contiguous(), "grad_hidden": grad_hidden, "BLOCK": block}
        launches = (Launch(pixel_shuffle_norm_bwd_hidden_kernel, (num_rows,), arguments, warps(2 * block)),)
    grads, to_weight = _weight_launches(inputs, weight, num_rows, channels)
    return Plan((grad_hidden, *grads), (*launches, *to_weight))


def _weight_launches(inputs: dict, weight: Tensor, num_rows: int, channels: int):
    num_chunks, block = triton.cdiv(num_rows, CHUNK), block_size(2 * channels, CHUNK_COLUMNS)
    grads = tuple(weight.new_empty(4 * channels) for _ in range(2))
    chunks = weight.new_empty((2, num_chunks, 4 * channels), dtype=torch.float32)
    constants = {"num_rows": num_rows, "CHUNK": CHUNK, "ROWS": CHUNK_ROWS, "BLOCK": block}
    launch = Launch(
        pixel_shuffle_norm_bwd_weight_kernel,
        (num_chunks, 2, triton.cdiv(2 * channels, block)),
        inputs | constants | {"weight_chunks": chunks[0], "bias_chunks": chunks[1]},
    )
    return grads, (launch, *map(sum_chunks, chunks, grads))


def pixel_shuffle_norm_fwd_triton(hidden, weight, bias, eps):
    """Rows [N, 4C], their mean and 1 / standard deviation [N] float32; computed in float32."""
    return pixel_shuffle_norm_fwd_plan(hidden, weight, bias, eps).run()


def pixel_shuffle_norm_bwd_triton(grad, hidden, weight, mean, rstd, need_hidden):
    """Gradients of hidden (empty where not needed), weight and bias, summed in float32."""
    return pixel_shuffle_norm_bwd_plan(grad, hidden, weight, mean, rstd, need_hidden).run()
