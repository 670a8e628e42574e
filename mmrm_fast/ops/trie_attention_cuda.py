"""`trie_attention` on CUDA: calls of torch's variable-length FlashAttention, or node by node in plain torch.

In packed order a node's descendants are neighbours. So a trie is one call over each node's own tokens, and one a level
of ancestors, of all descendants over their ancestor (`plan_trie.attention_calls`); outputs are merged by their
log-sum-exp, and the kernel's own backward of each call, given the merged ones, adds up to the gradients. No key is
copied but for a window, which is of a node's whole path.

Shapes: T queries, S tokens with a key, H query heads, G key/value heads, E head size.
"""

import warnings
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256  # of the C++ kernel and of FlashAttention
# Keys in one piece, whatever else is in the batch, where the installed FlashAttention may split them.
IN_ONE_PIECE = {"num_splits": 1} if "num_splits" in str(torch.ops.aten._flash_attention_forward.default._schema) else {}


class Plan(NamedTuple):
    """What the op is given beside its tensors, in the order of its schema."""

    cu_seqlens_q: Tensor
    kv_index: Tensor
    cu_seqlens_k: Tensor
    calls: Tensor | None
    call_sizes: list[int]
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    causal: bool = True
    window: int | None = None


def masked(scores_Hqk: Tensor, window: int | None) -> Tensor:
    """A node's scores, -inf for the keys that a query does not see."""
    visible = visible_keys(*scores_Hqk.shape[1:], window, scores_Hqk.device)
    return scores_Hqk.masked_fill(~visible, float("-inf"))


def visible_keys(num_queries: int, num_keys: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Which keys [queries, keys] each query sees: the last query all, but for those before the last `window`."""
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return visible if window is None else visible.triu(num_keys - num_queries - window + 1)


def nodes(cu_seqlens_q: Tensor, kv_index: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Each node's packed rows as a slice and its keys' packed indices [keys]."""
    q_edges, k_edges = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for node in range(len(q_edges) - 1):
        yield slice(q_edges[node], q_edges[node + 1]), kv_index[k_edges[node] : k_edges[node + 1]]


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax and sums are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def heads_contiguous(*tensors: Tensor) -> list[Tensor]:
    """Tensors [tokens, heads, E] whose heads' values lie one after another."""
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def trie_attention_fwd_nodes(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Output [T, H, E] and log-sum-exp [H, T] on any device, node by node in plain torch."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=exact_dtype(q.dtype))
    for rows, index in nodes(*plan[:3]):
        scores, _, _, values = node_scores(q[rows], k[index], v[index], plan)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), values).to(q.dtype)
    return out, lse


def trie_attention_bwd_nodes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv on any device: each node's weights again from its log-sum-exp, sums over nodes in `exact_dtype`."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
    for rows, index in nodes(*plan[:3]):
        scores, queries, keys, values = node_scores(q[rows], k[index], v[index], plan)
        weights, node_grad = (scores - lse[:, rows, None]).exp(), grad[rows].to(lse.dtype)
        delta = (node_grad * out[rows]).sum(-1).T.unsqueeze(-1)  # [H, queries, 1]
        slopes = weights * (torch.einsum("qhe,khe->hqk", node_grad, values) - delta) * plan.scale
        dq[rows] = torch.einsum("hqk,khe->qhe", slopes, keys).to(q.dtype)
        for sums, terms, factors in ((dk, slopes, queries), (dv, weights, node_grad)):
            node_sums = torch.einsum("hqk,qhe->khe", terms, factors)
            sums.index_add_(0, index, node_sums.unflatten(1, (k.shape[1], -1)).sum(2))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def node_scores(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A node's masked scores [H, queries, keys], and q, k, v with H heads each, all in `exact_dtype`."""
    q, k, v = (x.to(exact_dtype(q.dtype)) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * plan.scale
    return masked(scores, plan.window) if plan.causal else scores, q, k, v


class Call(NamedTuple):
    """One call of a variable-length kernel: runs of queries, each over a run of keys."""

    rows: Tensor | None  # its queries among the T; None for all
    keys: Tensor | None  # its keys among the S; None for all
    cu_seqlens_q: Tensor  # [runs + 1] int32
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool  # aligned bottom-right
    window: int | None


def kernel_calls(plan: Plan) -> Iterator[Call]:
    """The calls whose softmaxes together are the plan's: the first has all queries.

    A window is of a node's whole path, which then is copied together.
    """
    window = plan.window if plan.window and plan.window < plan.max_seqlen_k else None
    if plan.calls is None or window is not None:
        edges = (plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k)
        yield Call(None, plan.kv_index, *edges, plan.causal, window)
        return
    place = 0
    for num_rows, num_runs, *longest in zip(*[iter(plan.call_sizes)] * 4, strict=True):
        sizes = [num_rows if place else 0, num_runs + 1, num_runs + 1]
        rows, *edges = plan.calls[place : place + sum(sizes)].split(sizes)
        yield Call(rows if place else None, None, *edges, *longest, causal=not place, window=None)
        place += sum(sizes)


def pick(x: Tensor, index: Tensor | None) -> Tensor:
    """The rows of an index; all where it is None."""
    return x if index is None else x[index]


def trie_attention_fwd_cuda(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Output [T, H, E] and log-sum-exp [H, T] fp32 of FlashAttention's calls, or node by node."""
    if not takes_flash(q.dtype, q.shape[2], q.device):
        return trie_attention_fwd_nodes(q, k, v, plan)
    q, (k, v) = q.contiguous(), heads_contiguous(k, v)
    first, *others = kernel_calls(plan)
    out, lse = flash_forward(q, pick(k, first.keys), pick(v, first.keys), first, plan.scale)
    for call in others:
        part, part_lse = flash_forward(q[call.rows], k, v, call, plan.scale)
        own, own_lse = out[call.rows], lse[:, call.rows]
        total = torch.logaddexp(own_lse, part_lse)
        shares = [(one - total).exp().T.unsqueeze(-1) for one in (own_lse, part_lse)]  # [rows, H, 1]
        out[call.rows] = (own * shares[0] + part * shares[1]).to(out.dtype)
        lse[:, call.rows] = total
    return out, lse


def trie_attention_bwd_cuda(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: the kernel's own backward of each call, given the merged output and log-sum-exp; sums in fp32."""
    if not takes_flash(q.dtype, q.shape[2], q.device):
        return trie_attention_bwd_nodes(grad, q, k, v, out, lse, plan)
    grad, q, (k, v) = grad.contiguous(), q.contiguous(), heads_contiguous(k, v)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
    dq = None
    for call in kernel_calls(plan):
        queries = [pick(x, call.rows) for x in (grad, q, out, lse.T)]
        call_dq, *key_grads = flash_backward(*queries, pick(k, call.keys), pick(v, call.keys), call, plan.scale)
        if dq is None:
            dq = call_dq
        else:
            dq[call.rows] += call_dq
        for sums, key_grad in zip((dk, dv), key_grads, strict=True):
            sums.add_(key_grad) if call.keys is None else sums.index_add_(0, call.keys, key_grad.to(sums.dtype))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """torch's FlashAttention: output [rows, H, E] and log-sum-exp [H, rows] fp32."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *flash_edges(call), 0.0, call.causal, False, scale=scale, **flash_window(call.window), **IN_ONE_PIECE
    )
    return out, lse


def flash_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse_TH: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of torch's FlashAttention; deterministic where torch is told to be."""
    noise = q.new_empty(0)  # there is no dropout
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse_TH.T.contiguous(), *flash_edges(call), 0.0, call.causal, noise, noise,
        scale=scale, **flash_window(call.window),
    )  # fmt: skip


def flash_edges(call: Call) -> tuple[Tensor, Tensor, int, int]:
    """Its runs as FlashAttention takes them.

    Where it hears of one query a run at most, it takes each run to have one, and splits keys by how many there are,
    which would let a reward depend on its batch.
    """
    return call.cu_seqlens_q, call.cu_seqlens_k, max(call.max_seqlen_q, 2), call.max_seqlen_k


def flash_window(window: int | None) -> dict[str, int]:
    """How many keys a query sees to either side of its own, as FlashAttention takes it."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


@cache
def takes_flash(dtype: torch.dtype, head_size: int, device: torch.device) -> bool:
    """Whether torch's FlashAttention computes this attention here; with a warning where it is the GPU that cannot."""
    if dtype not in FLASH_DTYPES or head_size > MAX_HEAD_SIZE or head_size % 8:
        return False
    is_able = torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    if not is_able:
        why = "FlashAttention needs a GPU of compute capability 8.0 (A100, RTX 30) and a torch that was built with it"
        warnings.warn(f"attention on {device} goes node by node, slowly: {why}", stacklevel=2)
    return is_able
