"""pack_image_tokens: token embeddings and image features placed into the packed stream in one pass.

V embedding rows, F feature rows, T packed tokens, U rows that are read, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmrm_fast.ops.native import contiguous, run
from mmrm_fast.ops.triton import register

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = "Tensor order, Tensor segment_ptr, Tensor segment_source"  # to go back with

library = torch.library.Library("mmrm_fast", "FRAGMENT")
library.define(f"pack_image_tokens_fwd(Tensor embedding, Tensor features, Tensor source, {INDEX}) -> Tensor")
library.define(
    f"pack_image_tokens_bwd(Tensor grad, {INDEX}, int num_embeddings, int num_features, bool need_embedding)"
    " -> (Tensor grad_embedding, Tensor grad_features)"
)


@dataclass(frozen=True)
class SourceIndex:
    """Packed tokens by source: order[segment_ptr[u] : segment_ptr[u+1]] are the tokens of segment_source[u]."""

    order: Tensor  # [T] int64
    segment_ptr: Tensor  # [U+1] int64
    segment_source: Tensor  # [U] int64, increasing

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SourceIndex":
        """The same index on another device."""
        tensors = (self.order, self.segment_ptr, self.segment_source)
        return SourceIndex(*(t.to(device, non_blocking=non_blocking) for t in tensors))


def pack_image_tokens_ref(embedding, features, source, *_):
    """What the op means, in plain torch; any device."""
    out = embedding.new_empty(source.shape[0], embedding.shape[1])
    is_image = source < 0
    out[~is_image] = embedding[source[~is_image]]
    out[is_image] = features[-1 - source[is_image]]
    return out


def pack_image_tokens_bwd_ref(grad, order, segment_ptr, segment_source, num_embeddings, num_features, need_embedding):
    """Gradients of both inputs, in plain torch; any device."""
    exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
    width, num_embeddings = grad.shape[1], num_embeddings if need_embedding else 0
    sums = grad.new_zeros(segment_source.shape[0], width, dtype=exact)
    if sums.numel():
        sums = torch.segment_reduce(grad.to(exact)[order], "sum", offsets=segment_ptr, initial=0, unsafe=True)
    grads = []
    for rows, size in ((segment_source, num_embeddings), (-1 - segment_source, num_features)):
        mine = (rows >= 0) & (rows < size)
        grads.append(grad.new_zeros(size, width).index_copy_(0, rows[mine], sums[mine].to(grad.dtype)))
    return tuple(grads)


def pack_image_tokens_fwd_native(embedding, features, source, *_):
    """`pack_image_tokens_ref` in C++ or CUDA C++."""
    out = _empty_stream(embedding, source)
    run("pack_image_tokens_fwd", *contiguous(embedding, features, source), out, on=out)
    return out


def pack_image_tokens_bwd_native(
    grad, order, segment_ptr, segment_source, num_embeddings, num_features, need_embedding
):
    """`pack_image_tokens_bwd_ref` in C++ or CUDA C++."""
    outputs = _empty_grads(grad, num_embeddings, num_features, need_embedding)
    run("pack_image_tokens_bwd", *contiguous(grad, order, segment_ptr, segment_source), *outputs, on=grad)
    return outputs


def _empty_stream(embedding: Tensor, source: Tensor) -> Tensor:
    return embedding.new_empty(source.shape[0], embedding.shape[1])


def _empty_grads(grad: Tensor, num_embeddings: int, num_features: int, need_embedding: bool) -> tuple[Tensor, Tensor]:
    sizes = (num_embeddings if need_embedding else 0, num_features)
    return tuple(grad.new_empty(size, grad.shape[1]) for size in sizes)


register(
    library,
    "pack_image_tokens",
    pack_image_tokens_fwd=(pack_image_tokens_ref, pack_image_tokens_fwd_native),
    pack_image_tokens_bwd=(pack_image_tokens_bwd_ref, pack_image_tokens_bwd_native),
)


@torch.library.register_fake("mmrm_fast::pack_image_tokens_fwd", lib=library)
def _(embedding, features, source, *_):
    return _empty_stream(embedding, source)


@torch.library.register_fake("mmrm_fast::pack_image_tokens_bwd", lib=library)
def _(grad, order, segment_ptr, segment_source, *sizes):
    return _empty_grads(grad, *sizes)


def _setup(ctx, inputs, output):
    embedding, features, _, *index = inputs
    ctx.num_rows = embedding.shape[0], features.shape[0]
    ctx.save_for_backward(*index)


def _backward(ctx, grad):
    needed = ctx.needs_input_grad[:2]
    grads = torch.ops.mmrm_fast.pack_image_tokens_bwd(grad, *ctx.saved_tensors, *ctx.num_rows, needed[0])
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 4


torch.library.register_autograd("mmrm_fast::pack_image_tokens_fwd", _backward, setup_context=_setup, lib=library)


def source_index(source: Tensor) -> SourceIndex:
    """The tokens of a stream by their source [T] int64, on the CPU."""
    order = source.argsort(stable=True)
    segment_source, counts = source[order].unique_consecutive(return_counts=True)
    return SourceIndex(order, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), segment_source)


def pack_image_tokens(embedding_VD: Tensor, features_FD: Tensor, source_T: Tensor, index: SourceIndex) -> Tensor:
    """The packed stream: `embedding[source[t]]` where the source is >= 0, `features[-1 - source[t]]` elsewhere.

    Args:
        embedding_VD: [V, D], the token embeddings; float32, bfloat16, float16 or float64.
        features_FD: [F, D] in the same dtype, projected image tokens.
        source_T: [T] int64, each packed token's row.
        index: of `source_T`, by `source_index`, on the same device.

    Returns:
        [T, D] in the same dtype. Backward sums the gradients of tokens that share a row in the order of the tokens, in
        float32 (float64 for float64), and rounds once; rows that nothing reads get zeros, so that features take part
        in every backward; a table without `requires_grad` costs nothing.

    Raises:
        ValueError: a shape or dtype that differs from the above.
        IndexError: on the CPU, a source outside both tables.
    """
    if embedding_VD.ndim != 2 or embedding_VD.dtype not in DTYPES:
        raise ValueError(f"embedding must be [V, D] float, got {list(embedding_VD.shape)} {embedding_VD.dtype}")
    width, dtype = embedding_VD.shape[1], embedding_VD.dtype
    if features_FD.ndim != 2 or features_FD.shape[1] != width or features_FD.dtype != dtype:
        raise ValueError(f"features must be [F, {width}] {dtype}, got {list(features_FD.shape)} {features_FD.dtype}")
    if source_T.ndim != 1 or source_T.dtype != torch.int64:
        raise ValueError(f"source must be [T] int64, got {list(source_T.shape)} {source_T.dtype}")
    if index.order.shape != source_T.shape:
        raise ValueError(f"the index is of {index.order.shape[0]} tokens, not of {source_T.shape[0]}")
    return torch.ops.mmrm_fast.pack_image_tokens_fwd(
        embedding_VD, features_FD, source_T, index.order, index.segment_ptr, index.segment_source
    )
