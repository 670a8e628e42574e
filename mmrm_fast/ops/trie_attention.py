"""`trie_attention`: attention over a packed forest of token tries.

Each node's queries are its own tokens, its keys its ancestors' tokens and its own, as `kv_index` lists them.
One op with its own backward, which keeps only q, k, v, out and the log-sum-exp. A sink is one more logit a head in the
softmax, that has no value: it scales a kernel's output and adds to its log-sum-exp, given which the kernel's own
backward is exact. On CUDA it is torch's FlashAttention (`trie_attention_cuda`). On a CPU with AVX-512 and its BF16
instructions it is C++ (csrc/trie_attention.cpp), whose bits no number of threads changes; on others torch's CPU flash
kernel, node by node and in fp32 at least: it sums a bfloat16 gradient in bfloat16, wrong by per cents.

Shapes: T queries, S tokens with a key (the same where each is a query), K listed keys, N nodes, H query heads,
G key/value heads, E head size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmrm_fast.ops.native import contiguous, native
from mmrm_fast.ops.trie_attention_cuda import (
    MAX_HEAD_SIZE,
    Plan,
    exact_dtype,
    heads_contiguous,
    masked,
    nodes,
    trie_attention_bwd_cuda,
    trie_attention_fwd_cuda,
    visible_keys,
)

library = torch.library.Library("mmrm_fast", "FRAGMENT")
PLAN = (
    "Tensor cu_seqlens_q, Tensor kv_index, Tensor cu_seqlens_k, Tensor? calls, SymInt[] call_sizes,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal=True, SymInt? window=None"
)
library.define(f"trie_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? sink, {PLAN}) -> (Tensor, Tensor)")
library.define(
    f"trie_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {PLAN})"
    " -> (Tensor, Tensor, Tensor)"
)
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


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


def has_native(dtype: torch.dtype, head_size: int) -> bool:
    """Whether the C++ kernel computes this attention here."""
    return is_built() and dtype in NATIVE_DTYPES and head_size <= MAX_HEAD_SIZE


@torch.compiler.assume_constant_result  # torch.compile cannot trace a call into the native module
def is_built() -> bool:
    """Whether the C++ kernel is in the native module and runs on this CPU."""
    return native() is not None and native().has_trie_attention_cpu()


def trie_attention_fwd_cpu(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Output [T, H, E] and log-sum-exp [H, T] (fp32; float64 for float64)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=exact_dtype(q.dtype))
    if has_native(q.dtype, q.shape[2]):
        inputs = (*heads_contiguous(q, k, v), *contiguous(*plan[:3]))
        masks = (plan.scale, plan.causal, plan.window)
        native().trie_attention_fwd_cpu(*inputs, *masks, out, lse, torch.get_num_threads())
        return out, lse
    q, k, v = (x.to(lse.dtype) for x in (q, k, v))
    for rows, index in nodes(*plan[:3]):
        is_causal, mask = causal_mask(rows.stop - rows.start, len(index), plan, q.dtype)
        node_out, node_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(heads_first, (q[rows], k[index], v[index])), 0.0, is_causal, attn_mask=mask, scale=plan.scale
        )
        out[rows] = node_out[0].transpose(0, 1)
        lse[:, rows] = node_lse[0]
    return out, lse


def trie_attention_bwd_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; gradients of shared keys and values are summed over nodes in fp32 (float64 for float64)."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    if has_native(q.dtype, q.shape[2]):
        inputs = (*heads_contiguous(grad, q, k, v, out), *contiguous(lse, *plan[:3]))
        masks = (plan.scale, plan.causal, plan.window)
        native().trie_attention_bwd_cpu(*inputs, *masks, dq, dk, dv, torch.get_num_threads())
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    dtype = q.dtype
    grad, q, k, v, out = (x.to(lse.dtype) for x in (grad, q, k, v, out))
    for rows, index in nodes(*plan[:3]):
        is_causal, mask = causal_mask(rows.stop - rows.start, len(index), plan, q.dtype)
        node_dq, node_dk, node_dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(heads_first, (grad[rows], q[rows], k[index], v[index], out[rows])),
            lse[None, :, rows].contiguous(), 0.0, is_causal, attn_mask=mask, scale=plan.scale,
        )  # fmt: skip
        dq[rows] = node_dq[0].transpose(0, 1)
        dk.index_add_(0, index, node_dk[0].transpose(0, 1))
        dv.index_add_(0, index, node_dv[0].transpose(0, 1))
    return dq, dk.to(dtype), dv.to(dtype)


def causal_mask(num_queries: int, num_keys: int, plan: Plan, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """torch's `is_causal` (aligned top-left) where it says it all, and otherwise an additive mask [queries, keys]."""
    window = plan.window
    if not plan.causal or (num_queries == num_keys and (window is None or window >= num_keys)):
        return plan.causal, None
    hidden = ~visible_keys(num_queries, num_keys, window)
    return False, torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(hidden, float("-inf"))


def heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, E] -> [1, heads, tokens, E], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def with_sink(attend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A forward with one more logit a head in its softmax, `sink` [H], that has no value; None is no sink."""

    def forward(q, k, v, sink, *plan):
        out, lse = attend(q, k, v, Plan(*plan))
        if sink is None:
            return out, lse
        logit = sink.to(lse.dtype).unsqueeze(1)
        share = (lse - logit).sigmoid()  # [H, T], of the keys
        return (out * share.T.unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, logit)

    return forward


def with_plan(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A backward as the dispatcher calls it."""
    return lambda grad, q, k, v, out, lse, *plan: backward(grad, q, k, v, out, lse, Plan(*plan))


for name, device, function in (
    ("trie_attention_fwd", "CPU", with_sink(trie_attention_fwd_cpu)),
    ("trie_attention_bwd", "CPU", with_plan(trie_attention_bwd_cpu)),
    ("trie_attention_fwd", "CUDA", with_sink(trie_attention_fwd_cuda)),
    ("trie_attention_bwd", "CUDA", with_plan(trie_attention_bwd_cuda)),
):
    library.impl(name, function, device)


@torch.library.register_fake("mmrm_fast::trie_attention_fwd", lib=library)
def _(q, k, v, sink, *plan):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=exact_dtype(q.dtype))


@torch.library.register_fake("mmrm_fast::trie_attention_bwd", lib=library)
def _(grad, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save_for_backward(ctx, inputs, output):
    q, k, v, sink, cu_seqlens_q, kv_index, cu_seqlens_k, calls, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, v, sink, *output, cu_seqlens_q, kv_index, cu_seqlens_k, calls)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, grad, _):
    q, k, v, sink, out, lse, *plan = ctx.saved_tensors
    grads = torch.ops.mmrm_fast.trie_attention_bwd(grad, q, k, v, out, lse, *plan, *ctx.scalars)
    return *grads, sink_grad(grad, sink, out, lse) if ctx.needs_input_grad[3] else None, *[None] * 10


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
    calls: Tensor | None = None,
    call_sizes: Sequence[int] = (),
    causal: bool = True,
    window: int | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Attention of every packed token over its ancestors in the trie and itself.

    Args:
        q_THE: queries [T, H, E]; k_SGE, v_SGE: keys and values [S, G, E], H a multiple of G, one dtype
            (fp32, float64, bf16, fp16).
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32, edges of the nodes' queries and listed keys: from 0 to T and K.
        kv_index: [K] int64, index of every listed key among the S tokens, ancestors first.
        max_seqlen_q, max_seqlen_k: longest node in queries and in keys.
        scale: positive factor on the dot products, usually E ** -0.5.
        calls, call_sizes: the same as `plan_trie.attention_calls` has it, which spares a GPU the copies of shared keys.
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
    plan = (cu_seqlens_q, kv_index, cu_seqlens_k, calls, list(call_sizes), max_seqlen_q, max_seqlen_k)
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
