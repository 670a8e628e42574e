"""pack_image_tokens in Triton: one program a token and block of columns, backward one a source row.

V embedding rows, F feature rows, T packed tokens, U rows that are read, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrm_fast.ops.triton.launch import Launch, Plan, block_size, warps

UNROLL = 4  # rows in flight of a sum


@triton.jit
def pack_image_tokens_fwd_kernel(embedding, features, source, out, num_columns, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    row = tl.load(source + token)
    if row >= 0:
        x = tl.load(embedding + row * num_columns + column, mask=mask)
    else:
        x = tl.load(features + (-1 - row) * num_columns + column, mask=mask)
    tl.store(out + token * num_columns + column, x, mask=mask)


@triton.jit
def pack_image_tokens_bwd_kernel(
    grad, order, segment_ptr, segment_source, grad_embedding, grad_features, num_columns,
    NEED_EMBEDDING: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    row = tl.load(segment_source + segment)
    if NEED_EMBEDDING or row < 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < num_columns
        end = tl.load(segment_ptr + segment + 1)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(tl.load(segment_ptr + segment), end, UNROLL):
            remaining = end - start
            for i in tl.static_range(UNROLL):
                exists = remaining > i
                token = tl.load(order + start + i, mask=exists, other=0)
                x = tl.load(grad + token * num_columns + column, mask=tl.where(exists, mask, False), other=0.0)
                total += x.to(tl.float32)
        if row >= 0:
            x = total.to(grad_embedding.dtype.element_ty)
            tl.store(grad_embedding + row * num_columns + column, x, mask=mask)
        else:
            x = total.to(grad_features.dtype.element_ty)
            tl.store(grad_features + (-1 - row) * num_columns + column, x, mask=mask)


def pack_image_tokens_fwd_plan(embedding: Tensor, features: Tensor, source: Tensor, *_) -> Plan:
    """The packed stream [T, D]."""
    num_tokens, num_columns = source.shape[0], embedding.shape[1]
    out = embedding.new_empty(num_tokens, num_columns)
    block = block_size(num_columns)
    arguments = {
        "embedding": embedding.contiguous(),
        "features": features.contiguous(),
        "source": source.contiguous(),
        "out": out,
        "num_columns": num_columns,
        "BLOCK": block,
    }
    grid = (num_tokens, triton.cdiv(num_columns, block))
    return Plan((out,), (Launch(pack_image_tokens_fwd_kernel, grid, arguments, warps(block)),))


def pack_image_tokens_bwd_plan(
    grad: Tensor, order: Tensor, segment_ptr: Tensor, segment_source: Tensor, num_embeddings: int, num_features: int,
    need_embedding: bool,
) -> Plan:  # fmt: skip
    """Gradients of embedding [V, D] ([0, D] where not needed) and features [F, D], summed in float32 in token order."""
    num_segments, num_columns = segment_source.shape[0], grad.shape[1]
    num_rows = (num_embeddings if need_embedding else 0, num_features)
    outputs = tuple(torch.zeros(rows, num_columns, dtype=grad.dtype, device=grad.device) for rows in num_rows)
    block = block_size(num_columns)
    arguments = {
        "grad": grad.contiguous(),
        "order": order.contiguous(),
        "segment_ptr": segment_ptr.contiguous(),
        "segment_source": segment_source.contiguous(),
        "grad_embedding": outputs[0],
        "grad_features": outputs[1],
        "num_columns": num_columns,
        "NEED_EMBEDDING": need_embedding,
        "UNROLL": UNROLL,
        "BLOCK": block,
    }
    grid = (num_segments, triton.cdiv(num_columns, block))
    return Plan(outputs, (Launch(pack_image_tokens_bwd_kernel, grid, arguments, warps(block)),))
