"""`trie_attention`: attention over a packed forest of token tries.

Each node's queries are its own tokens, its keys its ancestors' tokens and its own, gathered by `kv_index`.
One op with its own backward, so that gathered keys and values are never kept: only q, k, v, out and the
log-sum-exp are. A sink is one more logit a head in the softmax, that has no value: it scales a kernel's output and adds
to its log-sum-exp, given which the kernel's own backward is exact. On CUDA it is flash-attn's variable-length kernel
with `cu_seqlens_q != cu_seqlens_k`, and node by node in plain torch what that does not take; on a CPU with AVX-512 and
its BF16 instructions it is C++ (csrc/trie_attention.cpp), on others torch's CPU flash kernel, node by node.

Shapes: T queries, S tokens with a key (the same where each is a query), K gathered keys, N nodes, H query heads,
G key/value heads, E head size.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mmrm_fast.ops.native import contiguous, native

library = torch.library.Library("mmrm_fast", "FRAGMENT")
PLAN = (
    "Tensor cu_seqlens_q, Tensor kv_index, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale,"
    " bool causal=True, SymInt? window=None"
)
library.define(f"trie_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? sink, {PLAN}) -> (Tensor, Tensor)")
library.define(
    f"trie_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {PLAN})"
    " -> (Tensor, Tensor, Tensor)"
)
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256  # of the C++ kernel and of flash-attn


def trie_attention_ref(
    q_THE, k_SGE, v_SGE, cu_seqlens_q, kv_index, cu_seqlens_k, scale, causal=True, window=None, sink_H=None
) -> Tensor:
    """What the op means: softmax attention per node, masked bottom-right, in plain differentiable torch."""
    outputs = [q_THE[:0]]
    repeat = q_THE.shape[1] // k_SGE.shape[1]
    for rows, index in nodes(cu_seqlens_q, kv_index, cu_seqlens_k):
        q = q_THE[rows]
        k, v = (x[index].repeat_interleave(repeat, dim=1) for x in (k_SGE, v_SGE))
        scores = torch.einsum("qhe,khe->hqk", q, k) * scale
        scores = masked(scores, window) if causal else scores
        if sink_H is not None:
            scores = torch.cat([scores, sink_H[:, None, None].expand(-1, len(q), 1)], dim=-1)
        outputs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1)[..., : len(k)], v))
    return torch.cat(outputs)


def masked(scores_Hqk: Tensor, window: int | None) -> Tensor:
    """A node's scores, -inf for the keys that a query does not see."""
    visible = visible_keys(*scores_Hqk.shape[1:], window, scores_Hqk.device)
    return scores_Hqk.masked_fill(~visible, float("-inf"))


def visible_keys(num_queries: int, num_keys: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Which keys [queries, keys] each query sees: the last query all, but for those before the last `window`."""
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return visible if window is None else visible.triu(num_keys - num_queries - window + 1)


def nodes(cu_seqlens_q: Tensor, kv_index: Tensor, cu_seqlens_k: Tensor):
    """Each node's packed rows as a slice and its keys' packed indices [keys]."""
    q_edges, k_edges = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for node in range(len(q_edges) - 1):
        yield slice(q_edges[node], q_edges[node + 1]), kv_index[k_edges[node] : k_edges[node + 1]]


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax and sums are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_native(dtype: torch.dtype, head_size: int) -> bool:
    """Whether the C++ kernel computes this attention here."""
    return is_built() and dtype in NATIVE_DTYPES and head_size <= MAX_HEAD_SIZE


@torch.compiler.assume_constant_result  # torch.compile cannot trace a call into the native module
def is_built() -> bool:
    """Whether the C++ kernel is in the native module and runs on this CPU."""
    return native() is not None and native().has_trie_attention_cpu()


def trie_attention_fwd_cpu(
    q, k, v, cu_seqlens_q, kv_index, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=True, window=None
):
    """Output [T, H, E] and log-sum-exp [H, T] (fp32; float64 for float64)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=exact_dtype(q.dtype))
    plan = (cu_seqlens_q, kv_index, cu_seqlens_k)
    if has_native(q.dtype, q.shape[2]):
        inputs = (*heads_contiguous(q, k, v), *contiguous(*plan))
        native().trie_attention_fwd_cpu(*inputs, scale, causal, window, out, lse, torch.get_num_threads())
        return out, lse
    for rows, index in nodes(*plan):
        is_causal, mask = causal_mask(rows.stop - rows.start, len(index), causal, window, q.dtype)
        node_out, node_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(heads_first, (q[rows], k[index], v[index])), 0.0, is_causal, attn_mask=mask, scale=scale
        )
        out[rows] = node_out[0].transpose(0, 1)
        lse[:, rows] = node_lse[0]
    return out, lse


def trie_attention_bwd_cpu(
    grad, q, k, v, out, lse, cu_seqlens_q, kv_index, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=True,
    window=None,
):  # fmt: skip
    """dq, dk, dv; gradients of shared keys and values are summed over nodes in fp32 (float64 for float64)."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    plan = (cu_seqlens_q, kv_index, cu_seqlens_k)
    if has_native(q.dtype, q.shape[2]):
        inputs = (*heads_contiguous(grad, q, k, v, out), *contiguous(lse, *plan))
        native().trie_attention_bwd_cpu(*inputs, scale, causal, window, dq, dk, dv, torch.get_num_threads())
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    for rows, index in nodes(*plan):
        is_causal, mask = causal_mask(rows.stop - rows.start, len(index), causal, window, q.dtype)
        node_dq, node_dk, node_dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(heads_first, (grad[rows], q[rows], k[index], v[index], out[rows])),
            lse[None, :, rows].contiguous(), 0.0, is_causal, attn_mask=mask, scale=scale,
        )  # fmt: skip
        dq[rows] = node_dq[0].transpose(0, 1)
        dk.index_add_(0, index, node_dk[0].transpose(0, 1).to(dk.dtype))
        dv.index_add_(0, index, node_dv[0].transpose(0, 1).to(dv.dtype))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def heads_contiguous(*tensors: Tensor) -> list[Tensor]:
    """Tensors [tokens, heads, E] whose heads' values lie one after another."""
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def causal_mask(
    num_queries: int, num_keys: int, causal: bool, window: int | None, dtype: torch.dtype
) -> tuple[bool, Tensor | None]:
    """torch's `is_causal` (aligned top-left) where it says it all, and otherwise an additive mask [queries, keys]."""
    if not causal or (num_queries == num_keys and (window is None or window >= num_keys)):
        return causal, None
    hidden = ~visible_keys(num_queries, num_keys, window)
    return False, torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(hidden, float("-inf"))


def heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, E] -> [1, heads, tokens, E], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def trie_attention_fwd_nodes(q, k, v, cu_seqlens_q, kv_index, cu_seqlens_k, scale, causal=True, window=None):
    """Output [T, H, E] and log-sum-exp [H, T] on any device, node by node in plain torch."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=exact_dtype(q.dtype))
    for rows, index in nodes(cu_seqlens_q, kv_index, cu_seqlens_k):
        scores, _, _, values = node_scores(q[rows], k[index], v[index], scale, causal, window)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), values).to(q.dtype)
    return out, lse


def trie_attention_bwd_nodes(
    grad, q, k, v, out, lse, cu_seqlens_q, kv_index, cu_seqlens_k, scale, causal=True, window=None
):
    """dq, dk, dv on any device: each node's weights again from its log-sum-exp, sums over nodes in `exact_dtype`."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
    for rows, index in nodes(cu_seqlens_q, kv_index, cu_seqlens_k):
        scores, queries, keys, values = node_scores(q[rows], k[index], v[index], scale, causal, window)
        weights, node_grad = (scores - lse[:, rows, None]).exp(), grad[rows].to(lse.dtype)
        delta = (node_grad * out[rows]).sum(-1).T.unsqueeze(-1)  # [H, queries, 1]
        slopes = weights * (torch.einsum("qhe,khe->hqk", node_grad, values) - delta) * scale
        dq[rows] = torch.einsum("hqk,khe->qhe", slopes, keys).to(q.dtype)
        for sums, terms, factors in ((dk, slopes, queries), (dv, weights, node_grad)):
            node_sums = torch.einsum("hqk,qhe->khe", terms, factors)
            sums.index_add_(0, index, node_sums.unflatten(1, (k.shape[1], -1)).sum(2))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def node_scores(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A node's masked scores [H, queries, keys], and q, k, v with H heads each, all in `exact_dtype`."""
    q, k, v = (x.to(exact_dtype(q.dtype)) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * scale
    return masked(scores, window) if causal else scores, q, k, v


def trie_attention_fwd_cuda(
    q, k, v, cu_seqlens_q, kv_index, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=True, window=None
):
    """flash-attn's variable-length forward on gathered keys and values, or node by node."""
    flash = flash_attn(q.dtype, q.shape[2])
    if flash is None:
        return trie_attention_fwd_nodes(q, k, v, cu_seqlens_q, kv_index, cu_seqlens_k, scale, causal, window)
    out, lse, *_ = flash._flash_attn_varlen_forward(
        q.contiguous(), k[kv_index], v[kv_index], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=scale, causal=causal, **flash_window(window),
    )  # fmt: skip
    return out, lse


def trie_attention_bwd_cuda(
    grad, q, k, v, out, lse, cu_seqlens_q, kv_index, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal=True,
    window=None,
):  # fmt: skip
    """flash-attn's variable-length backward and an fp32 sum of each key's gradients over nodes, or node by node."""
    flash = flash_attn(q.dtype, q.shape[2])
    if flash is None:
        plan = (cu_seqlens_q, kv_index, cu_seqlens_k)
        return trie_attention_bwd_nodes(grad, q, k, v, out, lse, *plan, scale, causal, window)
    q, gathered_k, gathered_v = q.contiguous(), k[kv_index], v[kv_index]
    dq, node_dk, node_dv = torch.empty_like(q), torch.empty_like(gathered_k), torch.empty_like(gathered_v)
    flash._flash_attn_varlen_backward(
        grad.contiguous(), q, gathered_k, gathered_v, out, lse, dq, node_dk, node_dv,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=scale, causal=causal,
        **flash_window(window), softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    dk.index_add_(0, kv_index, node_dk.float())
    dv.index_add_(0, kv_index, node_dv.float())
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def flash_window(window: int | None) -> dict[str, int]:
    """flash-attn's window: how many keys a query sees to either side of its own, -1 for all."""
    if window is None:
        return {"window_size_left": -1, "window_size_right": -1}
    return {"window_size_left": window - 1, "window_size_right": 0}


@cache
def flash_attn(dtype: torch.dtype, head_size: int) -> ModuleType | None:
    """flash-attn's module of low-level functions; None where it takes no such heads, or, with a warning, is missing."""
    if dtype not in FLASH_DTYPES or head_size > MAX_HEAD_SIZE or head_size % 8:
        return None
    if find_spec("flash_attn") is None:
        install = "pip install 'flash-attn>=2.8' --no-build-isolation"  # its build needs torch
        warnings.warn(f"attention on CUDA is slow without flash-attn: {install}", stacklevel=2)
        return None
    from flash_attn import flash_attn_interface

    return flash_attn_interface


def with_sink(attend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A forward with one more logit a head in its softmax, `sink` [H], that has no value; None is no sink."""

    def forward(q, k, v, sink, *plan):
        out, lse = attend(q, k, v, *plan)
        if sink is None:
            return out, lse
        logit = sink.to(lse.dtype).unsqueeze(1)
        share = (lse - logit).sigmoid()  # [H, T], of the keys
        return (out * share.T.unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, logit)

    return forward


for name, device, function in (
    ("trie_attention_fwd", "CPU", with_sink(trie_attention_fwd_cpu)),
    ("trie_attention_bwd", "CPU", trie_attention_bwd_cpu),
    ("trie_attention_fwd", "CUDA", with_sink(trie_attention_fwd_cuda)),
    ("trie_attention_bwd", "CUDA", trie_attention_bwd_cuda),
):
    library.impl(name, function, device)


@torch.library.register_fake("mmrm_fast::trie_attention_fwd", lib=library)
def _(q, k, v, sink, *plan):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=exact_dtype(q.dtype))


@torch.library.register_fake("mmrm_fast::trie_attention_bwd", lib=library)
def _(grad, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save_for_backward(ctx, inputs, output):
    q, k, v, sink, cu_seqlens_q, kv_index, cu_seqlens_k, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, v, sink, *output, cu_seqlens_q, kv_index, cu_seqlens_k)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, grad, _):
    q, k, v, sink, out, lse, *plan = ctx.saved_tensors
    grads = torch.ops.mmrm_fast.trie_attention_bwd(grad, q, k, v, out, lse, *plan, *ctx.scalars)
    return *grads, sink_grad(grad, sink, out, lse) if ctx.needs_input_grad[3] else None, *[None] * 8


def sink_grad(grad: Tensor, sink: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient [H] of a sink: its weight times what it takes from every query's output."""
    weights = (sink.to(lse.dtype).unsqueeze(1) - lse).exp()
    return -(weights * (grad.to(lse.dtype) * out).sum(-1).T).sum(1).to(sink.dtype)


torch.library.register_autograd("mmrm_fast::trie_attention_fwd", backward, setup_context=save_for_backward, lib=library)


def trie_attention(
    q_THE: Tensor,
    k_SGE: Tensor,
    v_SGE: Tensor,
    *,
    cu_seqlens_q: Tensor,
    kv_index: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Attention of every packed token over its ancestors in the trie and itself.

    Args:
        q_THE: queries [T, H, E]; k_SGE, v_SGE: keys and values [S, G, E], H a multiple of G, one dtype
            (fp32, float64, bf16, fp16).
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32, edges of the nodes' queries and gathered keys: from 0 to T and K.
        kv_index: [K] int64, index of every gathered key among the S tokens, ancestors first.
        max_seqlen_q, max_seqlen_k: longest node in queries and in keys.
        scale: positive factor on the dot products, usually E ** -0.5.
        causal: False lets every query of a node see all of the node's keys, as the patches of a tile do.
        window: how many keys a causal query sees at most, the last of its path, its own among them; None is all.
        sink_H: one more logit a head in every softmax, without a value (GPT-OSS), of any dtype.

    Returns:
        [T, H, E] in q's dtype; softmax and the sums of shared gradients in fp32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype or number that differs from the above.
        IndexError: on the CPU, a key outside S; in C++ also edges that do not increase from 0 to T and K, or a causal
            node with fewer keys than queries.
    """
    check_tensors(q_THE, k_SGE, v_SGE)
    check_plan(cu_seqlens_q, kv_index, cu_seqlens_k)
    if q_THE.shape[1] % k_SGE.shape[1]:
        raise ValueError(f"{q_THE.shape[1]} query heads are not a multiple of {k_SGE.shape[1]} key/value heads")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window must be of causal queries and a key or more, got {window} and causal={causal}")
    if sink_H is not None and sink_H.shape != q_THE.shape[1:2]:
        raise ValueError(f"sinks must be [{q_THE.shape[1]}], one a query head, got {list(sink_H.shape)}")
    plan = (cu_seqlens_q, kv_index, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, _ = torch.ops.mmrm_fast.trie_attention_fwd(q_THE, k_SGE, v_SGE, sink_H, *plan, scale, causal, window)
    return out


def check_tensors(q_THE: Tensor, k_SGE: Tensor, v_SGE: Tensor) -> None:
    """One dtype and head size, a value for every key."""
    if not q_THE.dtype == k_SGE.dtype == v_SGE.dtype:
        dtypes = [x.dtype for x in (q_THE, k_SGE, v_SGE)]
        raise ValueError(f"queries, keys and values must have one dtype, got {dtypes}")
    if k_SGE.shape != v_SGE.shape or q_THE.shape[2] != k_SGE.shape[2]:
        shapes = [list(x.shape) for x in (q_THE, k_SGE, v_SGE)]
        raise ValueError(f"queries, keys and values must be [T, H, E], [S, G, E] and [S, G, E], got {shapes}")


def check_plan(cu_seqlens_q: Tensor, kv_index: Tensor, cu_seqlens_k: Tensor) -> None:
    """The dtypes that kernels read, and as many edges of queries as of keys."""
    dtypes = [x.dtype for x in (cu_seqlens_q, kv_index, cu_seqlens_k)]
    if dtypes != [torch.int32, torch.int64, torch.int32]:
        raise ValueError(f"cu_seqlens_q, kv_index and cu_seqlens_k must be int32, int64 and int32, got {dtypes}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"{len(cu_seqlens_q)} edges of queries, but {len(cu_seqlens_k)} of keys")
