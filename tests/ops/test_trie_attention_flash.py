"""The CUDA paths of `trie_attention`: without flash-attn, and against an emulation of its variable-length contract.

The contract: sequence n has queries cu_seqlens_q[n] : cu_seqlens_q[n+1] and keys cu_seqlens_k[n] : cu_seqlens_k[n+1],
causal attention is aligned bottom-right, query heads share key/value heads in groups, backward writes into dq, dk, dv.
"""

import inspect
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from mmrm_fast.ops import trie_attention as op
from mmrm_fast.ops.plan_trie import plan_trie_ref

HEADS, KV_HEADS, HEAD_SIZE, SCALE = 4, 2, 8, 0.3


def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left):
    """Output [T, H, E] and log-sum-exp [H, T] of each sequence's queries over its keys."""
    outputs, sums = [], []
    for n in range(len(cu_seqlens_q) - 1):
        own_q = q[cu_seqlens_q[n] : cu_seqlens_q[n + 1]]
        keys, values = (
            x[cu_seqlens_k[n] : cu_seqlens_k[n + 1]].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)
        )
        scores = torch.einsum("qhe,khe->hqk", own_q, keys) * scale
        last = torch.arange(len(keys) - len(own_q), len(keys))[:, None]
        hidden = (torch.arange(len(keys)) > last) | ((torch.arange(len(keys)) < last - left) & (left >= 0))
        scores = scores.masked_fill(hidden, float("-inf"))
        outputs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, 1)


def varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    check(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal)
    assert (window_size_left < 0) == (window_size_right < 0) and window_size_right <= 0
    return *attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left), None, None


def varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    check(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal)
    assert (window_size_left < 0) == (window_size_right < 0) and window_size_right <= 0
    assert (softcap, alibi_slopes) == (0.0, None)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        expected, lse = attend(*inputs, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left)
    torch.testing.assert_close((out, softmax_lse), (expected.detach(), lse.detach()))
    for place, gradient in zip((dq, dk, dv), torch.autograd.grad(expected, inputs, dout), strict=True):
        place.copy_(gradient)


def check(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k)) and q.is_contiguous() and k.is_contiguous()
    assert (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) == (max_seqlen_q, max_seqlen_k)
    assert dropout_p == 0 and causal


EMULATED = SimpleNamespace(_flash_attn_varlen_forward=varlen_forward, _flash_attn_varlen_backward=varlen_backward)


@pytest.fixture
def forest():
    """q, k, v of a forest of three levels and its plan."""
    prefix, middle = list(range(100, 109)), list(range(200, 205))
    sequences = [[*prefix, *middle, 1, 2, 3], [*prefix, *middle, 4], [*prefix, 5, 6], [7, 8]]
    keys = torch.tensor([key for sequence in sequences for key in sequence]).numpy()
    edges = torch.tensor([0, *map(len, sequences)]).cumsum(0).numpy()
    plan = plan_trie_ref(keys, edges, min_shared=2)
    index = [torch.from_numpy(x) for x in (plan.cu_seqlens_q, plan.kv_index, plan.cu_seqlens_k)]
    longest = [int(index[0].diff().max()), int(index[2].diff().max())]
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(plan.token_index), heads, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v, index, longest


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_flash_path_equals_the_reference(forest, monkeypatch, window):
    monkeypatch.setattr(op, "flash_attn", lambda dtype, head_size: EMULATED)
    q, k, v, index, longest = forest
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = op.trie_attention_ref(*inputs, *index, SCALE, window=window)
    grad = torch.randn_like(expected)
    out, lse = op.trie_attention_fwd_cuda(q, k, v, *index, *longest, SCALE, True, window)
    torch.testing.assert_close(out, expected.detach())
    grads = op.trie_attention_bwd_cuda(grad, q, k, v, out, lse, *index, *longest, SCALE, True, window)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, grad))


@pytest.mark.parametrize("window", [None, 4])
def test_both_paths_keep_the_same_log_sum_exp(forest, monkeypatch, window):
    monkeypatch.setattr(op, "flash_attn", lambda dtype, head_size: EMULATED)
    q, k, v, index, longest = forest
    functions = (op.trie_attention_fwd_cpu, op.trie_attention_fwd_cuda)
    results = [f(q, k, v, *index, *longest, SCALE, True, window) for f in functions]
    torch.testing.assert_close(*results)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_without_flash_attn_cuda_goes_on_and_says_once_what_to_install():
    op.flash_attn.cache_clear()
    with pytest.warns(UserWarning, match="slow without flash-attn: pip install 'flash-attn>=2.8' --no-build-isolation"):
        assert op.flash_attn(torch.bfloat16, 64) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.flash_attn(torch.bfloat16, 64) is None


@pytest.mark.parametrize(("dtype", "head_size"), [(torch.float32, 64), (torch.float64, 64), (torch.bfloat16, 257)])
def test_what_flash_attn_does_not_take_goes_node_by_node(dtype, head_size):
    assert op.flash_attn(dtype, head_size) is None


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
@pytest.mark.filterwarnings("ignore:attention on CUDA is slow")
@pytest.mark.parametrize("mask", [(True, None), (True, 4), (False, None)], ids=["causal", "window", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_path_of_cuda_without_flash_attn_is_exact(forest, dtype, mask):
    """Values and the gradients of queries, keys and values, against float64."""
    q, k, v, index, longest = forest
    tensors = [x.to(dtype) for x in (q, k, v)]
    wide = [x.double().requires_grad_() for x in tensors]
    expected = op.trie_attention_ref(*wide, *index, SCALE, *mask)
    grad = torch.randn(expected.shape).to(dtype)
    out, lse = op.trie_attention_fwd_cuda(*tensors, *index, *longest, SCALE, *mask)
    grads = op.trie_attention_bwd_cuda(grad, *tensors, out, lse, *index, *longest, SCALE, *mask)
    exact = [expected.detach(), *torch.autograd.grad(expected, wide, grad.double())]
    for value, truth in zip((out, *grads), exact, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=4 * torch.finfo(dtype).eps * truth.abs().max())


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn needs a GPU toolchain and is not installed")
@pytest.mark.parametrize("name", vars(EMULATED))
def test_the_emulated_signature_is_that_of_the_installed_flash_attn(name):
    installed = inspect.signature(getattr(op.flash_attn(torch.bfloat16, 64), name)).parameters
    assert list(installed) == list(inspect.signature(getattr(EMULATED, name)).parameters)
