"""The CUDA paths of `trie_attention`: node by node, and against an emulation of torch's variable-length FlashAttention.

The contract: run n has queries cu_seqlens_q[n] : cu_seqlens_q[n+1] and keys cu_seqlens_k[n] : cu_seqlens_k[n+1], either
may be none, causal attention is aligned bottom-right, query heads share key/value heads in groups.
"""

from functools import partial

import numpy as np
import pytest
import torch

from mmrm_fast.data.packing import path
from mmrm_fast.ops import trie_attention_cuda as op
from mmrm_fast.ops.plan_trie import attention_calls, plan_trie_ref
from mmrm_fast.ops.trie_attention import trie_attention_ref

HEADS, KV_HEADS, HEAD_SIZE, SCALE = 4, 2, 8, 0.3
PREFIX, MIDDLE = [*range(100, 109)], [*range(200, 205)]
FORESTS = {
    "two levels": [[*PREFIX, 1, 2, 3], [*PREFIX, 4, 5], [7, 8, 9]],
    "three levels": [[*PREFIX, *MIDDLE, 1, 2, 3], [*PREFIX, *MIDDLE, 4], [*PREFIX, 5, 6], [7, 8]],
    "ends inside a node": [[*PREFIX, *MIDDLE, 1], [*PREFIX, *MIDDLE, 4], PREFIX[:5], [*PREFIX, *MIDDLE[:2]]],
    "one sequence": [PREFIX],
}


def visible(num_queries, num_keys, causal, left):
    """[queries, keys], aligned bottom-right."""
    last = torch.arange(num_keys - num_queries, num_keys)[:, None]
    keys = torch.arange(num_keys)
    return ((keys <= last) | (not causal)) & ((keys >= last - left) | (left < 0))


def runs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, is_causal, scale, left, right):
    """Each run's rows of queries and of keys, and its scores [H, queries, keys]."""
    for edges, tensor, longest in ((cu_seqlens_q, q, max_q), (cu_seqlens_k, k, max_k)):
        assert edges.dtype == torch.int32 and edges.is_contiguous() and (edges[0], edges[-1]) == (0, len(tensor))
        assert edges.diff().min() >= 0 and edges.diff().max() <= longest
    assert max_q > 1, "each run would have to have one query"
    assert dropout_p == 0 and q.is_contiguous() and k.stride(2) == v.stride(2) == 1
    assert (left is None) == (right is None) and (left is None or (is_causal and right == 0))
    for n in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(edges[n], edges[n + 1]) for edges in (cu_seqlens_q, cu_seqlens_k))
        scores = torch.einsum("qhe,khe->hqk", q[rows], k[keys].repeat_interleave(HEADS // KV_HEADS, 1)) * scale
        shown = visible(*scores.shape[1:], is_causal, -1 if left is None else left)
        yield rows, keys, scores.masked_fill(~shown, float("-inf"))


def forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, is_causal, debug, *, scale, window_size_left=None,
    window_size_right=None, num_splits=1,
):  # fmt: skip
    assert num_splits == 1  # where the installed torch can split, a reward would depend on its batch
    edges = (cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left, window_size_right)
    out, lse = torch.zeros_like(q), q.new_full((HEADS, len(q)), float("inf"))  # of a query without keys
    for rows, keys, scores in runs(q, k, v, *edges):
        if scores.shape[2]:
            out[rows] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[keys].repeat_interleave(2, 1))
            lse[:, rows] = scores.logsumexp(-1)
    return out, lse, None, None, None


def backward(
    grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
    scale, window_size_left=None, window_size_right=None,
):  # fmt: skip
    edges = (cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left, window_size_right)
    assert lse.shape == (HEADS, len(q)) and lse.is_contiguous() and grad.is_contiguous()
    dq, dk, dv = (torch.zeros(len(x), HEADS, HEAD_SIZE, dtype=x.dtype) for x in (q, k, v))
    for rows, keys, scores in runs(q, k, v, *edges):
        weights = (scores - lse[:, rows, None]).exp()
        delta = (grad[rows] * out[rows]).sum(-1).T.unsqueeze(-1)
        values = v[keys].repeat_interleave(2, 1)
        slopes = weights * (torch.einsum("qhe,khe->hqk", grad[rows], values) - delta) * scale
        dq[rows] = torch.einsum("hqk,khe->qhe", slopes, k[keys].repeat_interleave(2, 1))
        dk[keys] = torch.einsum("hqk,qhe->khe", slopes, q[rows])
        dv[keys] = torch.einsum("hqk,qhe->khe", weights, grad[rows])
    return dq, *(x.unflatten(1, (KV_HEADS, -1)).sum(2) for x in (dk, dv))


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(op, "takes_flash", lambda *about: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


@pytest.fixture(params=FORESTS)
def forest(request):
    """q, k, v of a forest, and its plan."""
    sequences = FORESTS[request.param]
    plan = plan_trie_ref(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]), min_shared=2)
    torch.manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(len(plan.token_index), n, HEAD_SIZE, dtype=torch.float64) for n in heads], plan


def among_all(plan):
    """What the op is told of attention of all tokens."""
    edges = [torch.from_numpy(x) for x in (plan.cu_seqlens_q, plan.kv_index, plan.cu_seqlens_k)]
    calls = attention_calls(plan)
    longest = [int(edges[0].diff().max()), int(edges[2].diff().max())]
    return partial(op.Plan, *edges, torch.from_numpy(calls.edges), calls.sizes, *longest, SCALE)


def alone(plan, index):
    """What the op is told of attention of single tokens."""
    paths = [path(plan, token) for token in index]
    edges = [np.arange(len(index) + 1), np.concatenate(paths), np.cumsum([0, *map(len, paths)])]
    edges = [
        torch.from_numpy(x).to(kind) for x, kind in zip(edges, (torch.int32, torch.int64, torch.int32), strict=True)
    ]
    calls = attention_calls(plan, index)
    longest = [1, max(map(len, paths))]
    return partial(op.Plan, *edges, torch.from_numpy(calls.edges), calls.sizes, *longest, SCALE)


def assert_exact(tensors, plan):
    """Output, log-sum-exp and gradients of the CUDA path, against plain torch and the path node by node."""
    inputs = [x.clone().requires_grad_() for x in tensors]
    expected = trie_attention_ref(*inputs, *plan[:3], SCALE, plan.causal, plan.window)
    grad = torch.randn_like(expected)
    out, lse = op.trie_attention_fwd_cuda(*tensors, plan)
    torch.testing.assert_close((out, lse), op.trie_attention_fwd_nodes(*tensors, plan), rtol=0, atol=1e-14)
    grads = op.trie_attention_bwd_cuda(grad, *tensors, out, lse, plan)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, grad), rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", [None, 1, 4, 40])
def test_calls_of_flash_attention_add_up_to_the_reference(flash, forest, window):
    tensors, plan = forest
    assert_exact(tensors, among_all(plan)(window=window))


@pytest.mark.parametrize("window", [None, 4])
def test_so_do_the_calls_of_the_tokens_that_are_read_alone(flash, forest, window):
    (q, k, v), plan = forest
    index = np.unique(plan.last_index)
    assert_exact([q[index], k, v], alone(plan, index)(window=window))


def test_without_calls_keys_are_copied_together(flash, forest):
    tensors, plan = forest
    assert_exact(tensors, among_all(plan)()._replace(calls=None))


def test_no_key_is_copied_where_there_is_no_window(flash, forest, monkeypatch):
    """Every call but those of windows has the very keys and values that the op was given."""
    (q, k, v), plan = forest

    def look(q, keys, values, *rest, **options):
        assert keys is k and values is v
        return forward(q, keys, values, *rest, **options)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", look)
    op.trie_attention_fwd_cuda(q, k, v, among_all(plan)())


def test_a_level_of_ancestors_is_one_call():
    prefixes = [[*range(100 * n, 100 * n + 40)] for n in range(1, 6)]
    sequences = [[*prefix, n] for prefix in prefixes for n in range(7)]
    plan = plan_trie_ref(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]), min_shared=2)
    num_rows, num_runs = np.reshape(attention_calls(plan).sizes, (-1, 4)).T[:2]
    assert list(num_rows) == [0, 5 * 7]
    assert list(num_runs) == [5 + 5 * 7, 2 * 5 + 1]  # a run without queries before, between and behind the prefixes


@pytest.mark.parametrize("read_alone", [False, True])
def test_the_installed_torch_has_the_functions_as_they_are_called(forest, monkeypatch, read_alone):
    """Their shapes and dtypes too, by torch's own meta functions."""
    monkeypatch.setattr(op, "takes_flash", lambda *about: True)
    tensors, plan = forest
    index = np.unique(plan.last_index)
    plan = alone(plan, index)() if read_alone else among_all(plan)(window=4)
    plan = op.Plan(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in plan))
    q, k, v = (x.to("meta", torch.bfloat16) for x in tensors)
    q = q[: len(index)] if read_alone else q
    out, lse = op.trie_attention_fwd_cuda(q, k, v, plan)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (HEADS, len(q)), torch.float32)
    grads = op.trie_attention_bwd_cuda(out, q, k, v, out, lse, plan)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("dtype", "head_size", "capability", "taken"),
    [
        (torch.float32, 64, (9, 0), False),
        (torch.float64, 64, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 60, (9, 0), False),
        (torch.bfloat16, 96, (8, 0), True),
        (torch.float16, 256, (12, 0), True),
    ],
)
def test_what_flash_attention_does_not_take_goes_node_by_node(monkeypatch, dtype, head_size, capability, taken):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert op.takes_flash.__wrapped__(dtype, head_size, torch.device("cuda", 0)) is taken


def test_a_gpu_without_flash_attention_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match="attention on cuda:0 goes node by node, slowly: .*compute capability 8.0"):
        assert not op.takes_flash.__wrapped__(torch.float16, 64, torch.device("cuda", 0))


@pytest.mark.parametrize("mask", [(True, None), (True, 4), (False, None)], ids=["causal", "window", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_node_by_node_is_exact(forest, dtype, mask):
    """Values and the gradients of queries, keys and values, against float64."""
    tensors, plan = forest
    plan = among_all(plan)(*mask)
    tensors = [x.to(dtype) for x in tensors]
    wide = [x.double().requires_grad_() for x in tensors]
    expected = trie_attention_ref(*wide, *plan[:3], SCALE, *mask)
    grad = torch.randn(expected.shape).to(dtype)
    out, lse = op.trie_attention_fwd_nodes(*tensors, plan)
    grads = op.trie_attention_bwd_nodes(grad, *tensors, out, lse, plan)
    exact = [expected.detach(), *torch.autograd.grad(expected, wide, grad.double())]
    for value, truth in zip((out, *grads), exact, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=4 * torch.finfo(dtype).eps * truth.abs().max())
