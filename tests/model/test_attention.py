"""Trie attention: what plain causal attention gives each sequence, its gradients, and one graph under torch.compile."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.library import opcheck

from mmrm_fast.data.packing import path
from mmrm_fast.model.decoder import trie_attention_forward
from mmrm_fast.ops import trie_attention as op
from mmrm_fast.ops.plan_trie import attention_calls, plan_trie
from mmrm_fast.ops.trie_attention import trie_attention, trie_attention_ref

HEADS, KV_HEADS, SIZE = 4, 2, 8
SCALE = SIZE**-0.5
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NO_KERNEL = "this CPU has no AVX-512 BF16 instructions, or there is no native module"
FLOORS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-3}  # of errors, relative to the largest value


def forest(seed, *, num_groups=3, num_responses=4, longest=40):
    """The plan of random groups: a prefix of random length with random responses; one response ends in another."""
    rng = np.random.default_rng(seed)
    sequences = []
    for group in range(num_groups):
        prefix = np.full(rng.integers(1, longest), 100 + group)
        responses = [rng.integers(0, 2, rng.integers(1, longest)) for _ in range(num_responses - 1)]
        sequences += [np.concatenate([prefix, response]) for response in (*responses, responses[0][:1])]
    return plan_trie(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]), min_shared=2)


def edges_of(plan):
    return [torch.from_numpy(x) for x in (plan.cu_seqlens_q, plan.kv_index, plan.cu_seqlens_k)]


def keywords(plan):
    cu_seqlens_q, kv_index, cu_seqlens_k = edges_of(plan)
    calls = attention_calls(plan)
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "kv_index": kv_index,
        "cu_seqlens_k": cu_seqlens_k,
        "calls": torch.from_numpy(calls.edges),
        "call_sizes": calls.sizes,
        "max_seqlen_q": int(cu_seqlens_q.diff().max()),
        "max_seqlen_k": int(cu_seqlens_k.diff().max()),
    }


def inputs(plan, dtype=torch.float64, *, kv_heads=KV_HEADS, size=SIZE, has_sink=False):
    """q, k, v and, where asked for, a sink a head."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(plan.token_index), heads, size) for heads in (HEADS, kv_heads, kv_heads)]
    shapes += [(HEADS,)] if has_sink else []
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(attention, tensors):
    """Output and gradients of q, k, v and sinks for a fixed random gradient of the output, all float64."""
    out = attention(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, tensors, grad))]


def relative_error(value, exact):
    return float((value - exact).abs().max() / exact.abs().max())


@pytest.fixture(params=["C++", "SDPA"])
def backend(request, monkeypatch):
    """Each CPU backend in turn."""
    if request.param == "SDPA":
        monkeypatch.setattr(op, "has_native", lambda dtype, head_size: False)
    elif not op.has_native(torch.float32, SIZE):
        pytest.skip(NO_KERNEL)


def assert_errors_at_most_twice_those_of_plain_torch(plan, tensors, scale=SCALE, **options):
    wide = [x.detach().double().requires_grad_() for x in tensors]

    def reference(q, k, v, sink_H=None):
        return trie_attention_ref(q, k, v, *edges_of(plan), scale, sink_H=sink_H, **options)

    def op(q, k, v, sink_H=None):
        return trie_attention(q, k, v, **keywords(plan), scale=scale, sink_H=sink_H, **options)

    exact, plain = with_gradients(reference, wide), with_gradients(reference, tensors)
    ours = with_gradients(op, tensors)
    names, dtype = ("out", "dq", "dk", "dv", "dsink")[: 1 + len(tensors)], tensors[0].dtype
    floor = FLOORS[dtype] + (torch.finfo(dtype).eps / 2 if len(tensors) > 3 else 0)  # the output is rounded twice
    for name, value, other, truth in zip(names, ours, plain, exact, strict=True):
        assert relative_error(value, truth) <= 2 * relative_error(other, truth) + floor, name


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_errors_are_at_most_twice_those_of_plain_torch(backend, seed, dtype, kv_heads):
    plan = forest(seed)
    assert_errors_at_most_twice_those_of_plain_torch(plan, inputs(plan, dtype, kv_heads=kv_heads))


@pytest.mark.parametrize("size", [1, 5, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes_and_nodes_longer_than_a_block(backend, dtype, size):
    plan = forest(0, num_groups=2, num_responses=2, longest=500)
    assert_errors_at_most_twice_those_of_plain_torch(plan, inputs(plan, dtype, size=size), scale=size**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_mask_every_query_sees_all_keys_of_its_node(backend, dtype):
    plan = forest(0, num_groups=2, longest=300)
    assert_errors_at_most_twice_those_of_plain_torch(plan, inputs(plan, dtype), causal=False)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("window", "has_sink"), [(None, True), (2, False), (17, True), (17, False), (300, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_that_cross_nodes_and_blocks_and_sinks(backend, dtype, window, has_sink, kv_heads):
    """Paths are up to 600 tokens of two nodes, a window of 17 leaves out whole blocks of the C++ kernel."""
    plan = forest(0, num_groups=2, num_responses=2, longest=300)
    tensors = inputs(plan, dtype, kv_heads=kv_heads, has_sink=has_sink)
    assert_errors_at_most_twice_those_of_plain_torch(plan, tensors, window=window)


@pytest.mark.parametrize(("kv_heads", "window"), [(4, None), (2, None), (1, None), (2, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_last_tokens_alone_attend_as_they_do_among_all(backend, dtype, kv_heads, window):
    """Values, and the gradients of queries, keys and values; one last token is inside a node, others share theirs."""
    plan = forest(0, longest=300)
    index, tensors = np.unique(plan.last_index), inputs(plan, dtype, kv_heads=kv_heads)
    paths = [path(plan, token) for token in index]
    lengths = [*map(len, paths)]
    read = {
        "cu_seqlens_q": torch.arange(len(index) + 1, dtype=torch.int32),
        "kv_index": torch.from_numpy(np.concatenate(paths)),
        "cu_seqlens_k": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "max_seqlen_q": 1,
        "max_seqlen_k": max(lengths),
    }
    options = {"scale": SCALE, "window": window}
    alone = with_gradients(lambda q, k, v: trie_attention(q[index], k, v, **read, **options), tensors)
    among = with_gradients(lambda *x: trie_attention(*x, **keywords(plan), **options)[index], tensors)
    for name, value, expected in zip(("out", "dq", "dk", "dv"), alone, among, strict=True):
        assert relative_error(value, expected) <= 4 * FLOORS[dtype], name


def test_a_key_outside_the_packed_tokens_is_an_error(backend):
    plan = forest(0)
    tensors, arguments = inputs(plan, torch.float32), keywords(plan)
    arguments["kv_index"][-1] = len(tensors[0])
    with pytest.raises(IndexError):
        trie_attention(*tensors, **arguments, scale=SCALE)


@pytest.fixture
def only_cpp():
    if not op.has_native(torch.float32, SIZE):
        pytest.skip(NO_KERNEL)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads_in_cpp(only_cpp, dtype, window):
    plan = forest(0, longest=300)
    tensors, threads, results = inputs(plan, dtype), torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        attend = partial(trie_attention, **keywords(plan), scale=SCALE, window=window)
        results.append(with_gradients(attend, tensors))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("name", "edge", "change", "message"),
    [
        ("cu_seqlens_q", -1, 1, "cu_seqlens_q must increase from 0 to"),
        ("cu_seqlens_k", -1, 1, "cu_seqlens_k must increase from 0 to"),
        ("cu_seqlens_k", 0, -1, "cu_seqlens_k must increase from 0 to"),
        ("cu_seqlens_q", 1, 10_000, "cu_seqlens_q must increase from 0 to"),
        ("cu_seqlens_q", 1, 1, "node 0 has .* queries, but .* keys"),
    ],
)
def test_edges_that_do_not_fit_the_tensors_are_an_error_in_cpp(only_cpp, name, edge, change, message):
    plan = forest(0)
    tensors, arguments = inputs(plan, torch.float32), keywords(plan)
    arguments[name][edge] += change
    with pytest.raises(IndexError, match=message):
        trie_attention(*tensors, **arguments, scale=SCALE)


@pytest.mark.parametrize(
    ("position", "convert", "message"),
    [
        (0, torch.Tensor.bfloat16, "must have one dtype, got .*bfloat16.*float32.*float32"),
        (2, torch.Tensor.double, "must have one dtype"),
        (2, lambda x: x[1:], r"must be \[T, H, E\], \[S, G, E\] and \[S, G, E\], got"),
        (0, lambda x: x[..., :4], r"must be \[T, H, E\], \[S, G, E\] and \[S, G, E\], got"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(position, convert, message):
    tensors = inputs(forest(0), torch.float32)
    tensors[position] = convert(tensors[position])
    with pytest.raises(ValueError, match=message):
        trie_attention(*tensors, **keywords(forest(0)), scale=SCALE)


@pytest.mark.parametrize(
    ("name", "convert", "message"),
    [
        ("cu_seqlens_q", torch.Tensor.long, "must be int32, int64 and int32, got .*int64.*int64.*int32"),
        ("kv_index", torch.Tensor.int, "must be int32, int64 and int32"),
        ("cu_seqlens_k", torch.Tensor.long, "must be int32, int64 and int32"),
        ("cu_seqlens_k", lambda x: x[:-1], "edges of queries, but .* of keys"),
    ],
)
def test_a_plan_that_kernels_would_misread_is_refused(name, convert, message):
    arguments = keywords(forest(0))
    arguments[name] = convert(arguments[name])
    with pytest.raises(ValueError, match=message):
        trie_attention(*inputs(forest(0)), **arguments, scale=SCALE)


def test_a_plan_may_be_strided(backend):
    plan = forest(0)
    tensors, arguments = inputs(plan, torch.float32), keywords(plan)
    expected = trie_attention(*tensors, **arguments, scale=SCALE)
    for name in ("cu_seqlens_q", "kv_index", "cu_seqlens_k"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    assert torch.equal(trie_attention(*tensors, **arguments, scale=SCALE), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", [0, 3])
def test_nan_is_never_hidden(backend, key, dtype):
    """A key that is not a number makes its queries' outputs and gradients none, as in plain torch."""
    plan = forest(0)
    tensors = [x.detach() for x in inputs(plan, dtype)]
    tensors[1][key] = float("nan")
    tensors = [x.requires_grad_() for x in tensors]
    ours = with_gradients(lambda *x: trie_attention(*x, **keywords(plan), scale=SCALE), tensors)
    plain = with_gradients(lambda *x: trie_attention_ref(*x, *edges_of(plan), SCALE), tensors)
    for value, expected in zip(ours, plain, strict=True):
        assert value.isnan()[expected.isnan()].all()


@pytest.mark.parametrize("seed", range(3))
def test_every_token_sees_its_own_sequence_and_nothing_else(seed):
    plan = forest(seed)
    q, k, v = inputs(plan)
    out = trie_attention(q, k, v, **keywords(plan), scale=SCALE)
    for node in range(len(plan.cu_seqlens_q) - 1):
        path = torch.from_numpy(plan.kv_index[plan.cu_seqlens_k[node] : plan.cu_seqlens_k[node + 1]])
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[path].transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[path], alone.transpose(0, 1), rtol=0, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    plan = forest(0, num_groups=2, num_responses=3, longest=4)
    *tensors, sink = inputs(plan, size=2, has_sink=True)
    attend = partial(trie_attention, **keywords(plan), scale=0.5)
    assert torch.autograd.gradcheck(attend, tensors)
    assert torch.autograd.gradcheck(lambda *x: attend(*x[:3], window=3, sink_H=x[3]), [*tensors, sink])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_output_has_the_dtype_of_the_queries(dtype):
    plan = forest(0)
    tensors = inputs(plan, dtype)
    out = trie_attention(*tensors, **keywords(plan), scale=SCALE)
    assert out.dtype == dtype
    assert [x.dtype for x in torch.autograd.grad(out.sum(), tensors)] == [dtype] * 3


# the op as torch sees it


def dense(x):
    return x


def transposed(x):
    """The same values, heads first in memory, as transformers hands them over."""
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("layout", [dense, transposed])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_forward_passes_opcheck(dtype, layout):
    plan = forest(0, num_groups=2, num_responses=2, longest=6)
    *tensors, sink = inputs(plan, dtype, has_sink=True)
    arguments = (*map(layout, tensors), sink, *keywords(plan).values(), SCALE, True, 3)
    opcheck(torch.ops.mmrm_fast.trie_attention_fwd.default, arguments)


@pytest.mark.parametrize("layout", [dense, transposed])
def test_the_backward_passes_opcheck(layout):
    plan = forest(0, num_groups=2, num_responses=2, longest=6)
    tensors = [layout(x).detach() for x in inputs(plan, torch.float32)]
    arguments = (*keywords(plan).values(), SCALE, True, 3)
    out, lse = torch.ops.mmrm_fast.trie_attention_fwd(*tensors, None, *arguments)
    grad = layout(torch.ones_like(out)).detach()
    opcheck(torch.ops.mmrm_fast.trie_attention_bwd.default, (grad, *tensors, out, lse, *arguments))


def test_it_compiles_to_one_graph():
    def layer(q, k, v, sink, plan):
        return trie_attention(q * 2, k, v, **plan, scale=SCALE, window=7, sink_H=sink).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed in range(2):
        plan = forest(seed)
        tensors = inputs(plan, has_sink=True)
        expected = with_gradients(lambda *x, plan=plan: layer(*x, keywords(plan)), tensors)
        for value, wanted in zip(
            with_gradients(lambda *x, plan=plan: compiled(*x, keywords(plan)), tensors), expected, strict=True
        ):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


# transformers' calling convention


def as_transformers(tensors):
    return [x.detach().transpose(0, 1).unsqueeze(0) for x in tensors]


def forward(plan, **options):
    options = {"attention_mask": None, "scaling": SCALE, **keywords(plan), **options}
    return trie_attention_forward(torch.nn.Module(), *as_transformers(inputs(plan)), **options)


def test_the_interface_takes_heads_first_and_gives_tokens_first():
    plan = forest(0)
    out, weights = forward(plan, use_cache=False)
    assert torch.equal(out[0], trie_attention(*inputs(plan), **keywords(plan), scale=SCALE))
    assert weights is None


def test_a_plan_that_did_not_arrive_is_an_error():
    with pytest.raises(ValueError, match=r"did not reach the attention: pass \*\*plan\.attention_plan\(\)"):
        trie_attention_forward(torch.nn.Module(), *as_transformers(inputs(forest(0))), None, SCALE)


def test_windows_and_sinks_arrive_by_transformers_names():
    plan, sinks = forest(0), torch.randn(HEADS).double()
    out, _ = forward(plan, sliding_window=5, s_aux=sinks, dropout=0.0, softcap=None, output_attentions=False)
    expected = trie_attention(*inputs(plan), **keywords(plan), scale=SCALE, window=5, sink_H=sinks)
    assert torch.equal(out[0], expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softcap", 50.0), ("sinks", torch.zeros(HEADS)), ("position_bias", torch.zeros(1)), ("dropout", 0.1),
        ("attention_mask", torch.ones(1)), ("head_mask", torch.ones(HEADS)), ("anything", 0),
    ],
)  # fmt: skip
def test_what_an_attention_is_asked_for_but_does_not_do_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"Module attends with {name}, which is not supported"):
        forward(forest(0), **{name: value})


def test_attention_to_later_tokens_is_refused():
    with pytest.raises(ValueError, match="Module lets tokens attend to those after them"):
        forward(forest(0), is_causal=False)


def test_a_scale_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"scale must be positive, got 0\.0"):
        trie_attention(*inputs(forest(0)), **keywords(forest(0)), scale=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "a window must be of causal queries and a key or more, got 0"),
        ({"window": 3, "causal": False}, "got 3 and causal=False"),
        ({"sink_H": torch.zeros(3)}, r"sinks must be \[4\], one a query head, got \[3\]"),
    ],
)
def test_windows_and_sinks_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trie_attention(*inputs(forest(0)), **keywords(forest(0)), scale=SCALE, **options)


def test_heads_that_cannot_be_grouped_are_refused():
    plan = forest(0)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        trie_attention(*inputs(plan, kv_heads=3), **keywords(plan), scale=SCALE)
