"""plan_trie: which tokens of a batch of sequences to compute, once each, and what each run of them attends to.

N sequences, S their tokens, T packed tokens, M trie nodes, K gathered keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mmrm_fast.ops.native import native

MAX_TOKENS = 1 << 30  # of all sequences; a plan gathers at most twice as many keys, whose edges are int32


@dataclass(frozen=True)
class TriePlan:
    """Sequences packed as a forest of token tries; node m owns packed tokens cu_seqlens_q[m] : cu_seqlens_q[m+1].

    Node m attends to kv_index[cu_seqlens_k[m] : cu_seqlens_k[m+1]], its ancestors' tokens (root first) and then its
    own: causal attention aligned bottom-right.
    """

    token_index: np.ndarray  # [T] int64, index into keys of each packed token
    position_ids: np.ndarray  # [T] int64, its position in its sequence
    cu_seqlens_q: np.ndarray  # [M+1] int32
    kv_index: np.ndarray  # [K] int64, packed indices
    cu_seqlens_k: np.ndarray  # [M+1] int32
    last_index: np.ndarray  # [N] int64, packed index of each sequence's last token


class AttentionCalls(NamedTuple):
    """Calls of a variable-length kernel over a trie: the first of each node's queries over its own tokens, causal; one
    more a level of ancestors, of all their descendants' queries over their tokens, each over all of them.
    """

    edges: np.ndarray  # int32; a call: its queries among all (of the first none, as it has all), cu_seqlens_q and _k
    sizes: tuple[int, ...]  # a call: its queries, its runs of them, the longest of those, and of keys


def attention_calls(plan: TriePlan, queries: np.ndarray | None = None) -> AttentionCalls:
    """How attention goes over a plan without a copy of any key, as a node's descendants are neighbours.

    Args:
        queries: [Q] int64, increasing: packed tokens that attend, where not all do.
    """
    edges = plan.cu_seqlens_q
    if queries is not None:
        edges = np.union1d(edges, queries + 1)  # nodes are cut behind them, so that what a query sees of one is all
    parents = _parents(plan, edges)
    depths, ends = np.full(len(edges), -1), edges[1:].copy()
    for node, parent in enumerate(parents):
        depths[node] = depths[parent] + 1
    for node in reversed(range(len(parents))):
        if parents[node] >= 0:
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    calls = [(np.arange(0), edges if queries is None else np.searchsorted(queries, edges), edges)]
    for depth in range(depths.max()):
        own = np.flatnonzero((depths[:-1] == depth) & (ends > edges[1:]))
        runs = np.stack([edges[own + 1], ends[own]])
        runs = runs if queries is None else np.searchsorted(queries, runs)
        rows = np.concatenate([np.arange(begin, end) for begin, end in runs.T])
        cu_seqlens_q = np.repeat(np.cumsum([0, *(runs[1] - runs[0])]), 2)  # keys between ancestors have no queries
        calls.append((rows, cu_seqlens_q, [0, *np.stack([edges[own], edges[own + 1]], 1).flat, edges[-1]]))
    return AttentionCalls(
        edges=np.concatenate([part for call in calls for part in call]).astype(np.int32),
        sizes=tuple(int(n) for rows, *runs in calls for n in (len(rows), len(runs[0]) - 1, *map(_longest, runs))),
    )


def _parents(plan: TriePlan, edges: np.ndarray) -> np.ndarray:
    """The parent of each node, -1 for a root; of nodes that were cut at `edges`, the part before or its last one."""
    starts = edges[:-1]
    node = np.searchsorted(plan.cu_seqlens_q, starts, side="right") - 1
    shared = np.diff(plan.cu_seqlens_k)[node] - np.diff(plan.cu_seqlens_q)[node]  # ancestors' tokens
    above = np.where(shared > 0, plan.kv_index[plan.cu_seqlens_k[node] + shared - 1], -1)
    above = np.where(starts > plan.cu_seqlens_q[node], starts - 1, above)
    return np.searchsorted(edges, above, side="right") - 1


def _longest(edges: np.ndarray) -> int:
    return np.diff(edges).max()


class _Node(NamedTuple):
    sequences: list[int]  # those that pass through this node or end in it
    start: int
    end: int
    parent: int  # -1 for a root


def plan_trie(keys: np.ndarray, cu_seqlens: np.ndarray, *, min_shared: int = 32) -> TriePlan:
    """Pack sequences so that every prefix of at least `min_shared` tokens that several of them share appears once.

    Exact under causal attention, where a token's state depends on its ancestors alone. Packing is deterministic: depth
    first, children in the order of the smallest input index among their sequences, and a shared token is represented by
    the smallest-index sequence that carries it.

    Args:
        keys: [S] int64, token keys of all sequences, one after another; only equality and order matter.
        cu_seqlens: [N+1] int64, sequence n is keys[cu_seqlens[n] : cu_seqlens[n+1]].
        min_shared: tokens; a shorter shared run is recomputed by each of its children.

    Raises:
        ValueError: a wrong dtype or shape, boundaries that do not cover `keys`, an empty sequence, min_shared < 1, 2^30
            tokens or more.
    """
    _check_sequences(keys, cu_seqlens, min_shared)
    if native() is None:
        return plan_trie_ref(keys, cu_seqlens, min_shared)
    return TriePlan(*native().plan_trie_cpu(np.ascontiguousarray(keys), np.ascontiguousarray(cu_seqlens), min_shared))


def plan_trie_ref(keys: np.ndarray, cu_seqlens: np.ndarray, min_shared: int) -> TriePlan:
    """What `plan_trie` means, in Python."""
    sequences = [keys[begin:end].tolist() for begin, end in pairwise(cu_seqlens)]
    nodes = list(_trie_nodes(sequences, min_shared))
    cu_seqlens_q = np.cumsum([0] + [node.end - node.start for node in nodes])
    token_index, position_ids = np.empty((2, cu_seqlens_q[-1]), dtype=np.int64)
    last_index = np.empty(len(sequences), dtype=np.int64)
    visible: list[np.ndarray] = []  # per node, the packed tokens it attends to
    for node, (packed, packed_end) in zip(nodes, pairwise(cu_seqlens_q), strict=True):
        position_ids[packed:packed_end] = np.arange(node.start, node.end)
        for n in sorted(node.sequences, reverse=True):  # the smallest index writes last and stays
            length = min(len(sequences[n]), node.end) - node.start
            token_index[packed : packed + length] = cu_seqlens[n] + node.start + np.arange(length)
            if len(sequences[n]) <= node.end:
                last_index[n] = packed + length - 1
        own = np.arange(packed, packed_end)
        visible.append(own if node.parent < 0 else np.concatenate([visible[node.parent], own]))
    return TriePlan(
        token_index=token_index,
        position_ids=position_ids,
        cu_seqlens_q=cu_seqlens_q.astype(np.int32),
        kv_index=np.concatenate([np.empty(0, dtype=np.int64), *visible]),
        cu_seqlens_k=np.cumsum([0] + [len(kv) for kv in visible]).astype(np.int32),
        last_index=last_index,
    )


def _trie_nodes(sequences: list[list[int]], min_shared: int) -> Iterator[_Node]:
    """Yield the nodes in packed order, parents first.

    In lexicographic order a sequence that is a prefix of the next one is its passenger and ends inside its path; the
    others fork from the next one at the first token where they differ.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    fork = {
        n: shared
        for n, successor in pairwise(order)
        if (shared := _shared_length(sequences[n], sequences[successor])) < len(sequences[n])
    }
    num_nodes = 0
    pending = [(order, 0, -1)] if order else []
    while pending:
        group, start, parent = pending.pop()
        group_forks = [fork[n] for n in group[:-1] if n in fork]
        end = min(group_forks, default=len(sequences[group[-1]]))
        if not group_forks or end - start >= min_shared:
            yield _Node(group, start, end, parent)
            start, parent = end, num_nodes
            num_nodes += 1
            group = [n for n in group if len(sequences[n]) > end]
        children = sorted(_split(group, fork, end), key=min)
        pending.extend((child, start, parent) for child in reversed(children))


def _shared_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _split(group: list[int], fork: dict[int, int], position: int) -> list[list[int]]:
    """Cut a group in lexicographic order after each sequence that forks from the next one at `position`."""
    cuts = [i + 1 for i, n in enumerate(group[:-1]) if fork.get(n) == position]
    return [group[first:last] for first, last in pairwise([0, *cuts, len(group)]) if first < last]


def _check_sequences(keys: np.ndarray, cu_seqlens: np.ndarray, min_shared: int) -> None:
    for name, array in (("keys", keys), ("cu_seqlens", cu_seqlens)):
        if array.dtype != np.int64 or array.ndim != 1:
            raise ValueError(f"{name} must be 1-D int64, got shape {array.shape} {array.dtype}")
    if cu_seqlens.size == 0 or cu_seqlens[0] != 0 or cu_seqlens[-1] != keys.size:
        raise ValueError(f"cu_seqlens must run from 0 to {keys.size} tokens, got {cu_seqlens[:1]} to {cu_seqlens[-1:]}")
    if keys.size >= MAX_TOKENS:
        raise ValueError(f"{keys.size:,} tokens in one plan, at most {MAX_TOKENS - 1:,}: plan fewer sequences at once")
    empty = np.flatnonzero(np.diff(cu_seqlens) <= 0)
    if empty.size:
        n = empty[0]
        raise ValueError(f"sequence {n} is empty: cu_seqlens goes from {cu_seqlens[n]} to {cu_seqlens[n + 1]}")
    if min_shared < 1:
        raise ValueError(f"min_shared must be at least 1, got {min_shared}")
