"""pack_image_tokens: embedding + masked_scatter, every backend against the reference, gradients, compiler contracts."""

from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch
from ops.common import DTYPES, is_same, is_same_for_any_thread_count

from mmrm_fast.ops.pack_image_tokens import (
    SourceIndex,
    pack_image_tokens,
    pack_image_tokens_bwd_native,
    pack_image_tokens_bwd_ref,
    pack_image_tokens_fwd_native,
    pack_image_tokens_ref,
    source_index,
)

SIZES = [(40, 9, 6, 24), (1, 1, 1, 1), (500, 70, 3, 519), (0, 5, 4, 8), (7, 3, 0, 5), (7, 0, 3, 5), (3, 4, 4, 0)]
cpp = SimpleNamespace(fwd=pack_image_tokens_fwd_native, bwd=pack_image_tokens_bwd_native)


def random_inputs(num_tokens, num_embeddings, num_features, width, dtype=torch.float32):
    """embedding, features, source and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, width, generator=generator).to(dtype) for n in (num_embeddings, num_features, num_tokens)]
    source = torch.randint(-num_features, num_embeddings, (num_tokens,), generator=generator)
    return *rows[:2], source, rows[2]


def dense_transposed(rows):
    """The same values in memory order [D, rows]."""
    return rows.T.contiguous().T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_transformers_masked_scatter(dtype):
    embedding, features, _, grad = random_inputs(40, 9, 6, 24, dtype)
    is_image = torch.zeros(40, dtype=torch.bool)
    is_image[[3, 4, 5, 20, 21, 38]] = True
    ids = torch.randint(9, (40,))
    source = torch.where(is_image, -is_image.cumsum(0), ids)
    leaves = [t.clone().requires_grad_() for t in (embedding, features)]
    out = pack_image_tokens(*leaves, source, source_index(source))
    grads = torch.autograd.grad(out, leaves, grad)

    exact = [t.double().requires_grad_() for t in (embedding, features)]
    stream = torch.nn.functional.embedding(ids, exact[0])
    expected = stream.masked_scatter(is_image[:, None].expand_as(stream), exact[1])
    assert torch.equal(out, expected.to(dtype))
    for ours, truth in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert ours.dtype == dtype
        arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        rounding = (torch.finfo(dtype).eps / 2 + 40 * arithmetic) * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= rounding


@pytest.mark.parametrize("need_embedding", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_cpp_is_as_exact_as_the_reference(sizes, dtype, need_embedding):
    embedding, features, source, grad = random_inputs(*sizes, dtype)
    assert torch.equal(cpp.fwd(embedding, features, source), pack_image_tokens_ref(embedding, features, source))
    index = astuple(source_index(source))
    options = (len(embedding), len(features), need_embedding)
    results = [
        cpp.bwd(grad, *index, *options),
        pack_image_tokens_bwd_ref(grad, *index, *options),
        pack_image_tokens_bwd_ref(grad.double(), *index, *options),
    ]
    for actual, reference, exact in zip(*results, strict=True):
        assert actual.dtype == dtype and actual.shape == reference.shape
        bound = 2 * (reference - exact).abs() + torch.finfo(dtype).eps * exact.abs() + 1e-6
        assert torch.all((actual - exact).abs() <= bound)


def test_a_frozen_table_costs_nothing_and_unread_features_still_take_part():
    embedding, features, _, grad = random_inputs(4, 9, 6, 3)
    source = torch.tensor([1, 1, 8, 0])
    features.requires_grad_()
    out = pack_image_tokens(embedding, features, source, source_index(source))
    out.backward(grad)
    assert torch.equal(features.grad, torch.zeros(6, 3))
    assert embedding.grad is None
    none, _ = pack_image_tokens_bwd_native(grad, *astuple(source_index(source)), 9, 6, False)
    assert none.shape == (0, 3)


def test_a_stream_of_text_trains_the_table():
    embedding, features, _, grad = random_inputs(4, 9, 0, 3)
    source = torch.tensor([1, 1, 8, 0])
    embedding.requires_grad_()
    pack_image_tokens(embedding, features, source, source_index(source)).backward(grad)
    assert torch.equal(embedding.grad[[0, 1, 8]], torch.stack([grad[3], grad[0] + grad[1], grad[2]]))
    assert torch.equal(embedding.grad[2:8], torch.zeros(6, 3))


def test_gradients_of_a_row_are_summed_in_the_order_of_the_tokens():
    grad = torch.tensor([[1e8], [1.0], [-1e8], [3.0]])
    index = astuple(source_index(torch.tensor([0, -1, 0, 0])))
    grad_embedding, grad_features = cpp.bwd(grad, *index, 1, 1, True)
    assert grad_embedding.item() == 3 and grad_features.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_survives_the_round_trip(dtype):
    """Every value with a zero: widened, added and rounded back, it is itself."""
    values = torch.arange(1 << 16).to(torch.uint16).view(torch.int16).view(dtype)
    grad = torch.stack([values, torch.zeros(1 << 16, dtype=dtype)])
    _, result = cpp.bwd(grad, *astuple(source_index(torch.tensor([-1, -1]))), 0, 1, True)
    assert torch.equal(result[0].isnan(), values.isnan())
    assert torch.equal(result[0].nan_to_num(-1.0), values.nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_as_torch_does(dtype):
    bits = torch.randint(-(1 << 15), 1 << 15, (2, 1 << 18), dtype=torch.int16)
    ties = torch.arange(-(1 << 15), (1 << 15) - 1, dtype=torch.int16)
    neighbours = torch.stack([ties, ties + 1]).view(dtype).float().div(2).to(dtype)  # their sums lie between values
    for grad in (bits.view(dtype), neighbours):
        _, result = cpp.bwd(grad.contiguous(), *astuple(source_index(torch.tensor([-1, -1]))), 0, 1, True)
        expected = grad.float().sum(0).to(dtype)
        assert torch.equal(result[0].isnan(), expected.isnan())
        assert torch.equal(result[0].nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize("needed", [(1, 1), (0, 1), (1, 0)])
def test_gradcheck(needed):
    embedding, features, source, _ = random_inputs(12, 4, 3, 2, torch.float64)
    leaves = [t.requires_grad_(bool(need)) for t, need in zip((embedding, features), needed, strict=True)]
    index = source_index(source)
    assert torch.autograd.gradcheck(lambda *tables: pack_image_tokens(*tables, source, index), leaves)


def test_same_bits_for_any_thread_count():
    embedding, features, source, grad = random_inputs(900, 90, 40, 520, torch.bfloat16)
    index = astuple(source_index(source))
    assert is_same_for_any_thread_count(
        lambda: (cpp.fwd(embedding, features, source), *cpp.bwd(grad, *index, 90, 40, True))
    )


def test_strided_inputs():
    embedding, features, source, grad = random_inputs(40, 9, 6, 24)
    index = astuple(source_index(source))
    strided = cpp.fwd(dense_transposed(embedding), dense_transposed(features), source.repeat_interleave(2)[::2])
    assert torch.equal(strided, cpp.fwd(embedding, features, source))
    assert is_same(cpp.bwd(dense_transposed(grad), *index, 9, 6, True), cpp.bwd(grad, *index, 9, 6, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, dense_transposed])
@pytest.mark.parametrize("sizes", [(5, 4, 3, 6), (1, 1, 1, 1), (0, 1, 1, 2), (3, 2, 0, 2)])
def test_opcheck(sizes, layout, dtype):
    embedding, features, source, grad = random_inputs(*sizes, dtype)
    embedding, features, grad = map(layout, (embedding, features, grad))
    index = astuple(source_index(source))
    ops = torch.ops.mmrm_fast
    for need_embedding in (True, False):
        torch.library.opcheck(ops.pack_image_tokens_bwd, (grad, *index, *sizes[1:3], need_embedding))
    leaves = [t.requires_grad_() for t in (embedding, features)]
    torch.library.opcheck(ops.pack_image_tokens_fwd, (*leaves, source, *index))


def test_compiles_to_one_graph():
    def step(embedding, features):
        return pack_image_tokens(embedding, features * 2, source, index).square().sum()

    embedding, features, source, _ = random_inputs(40, 9, 6, 24)
    index, grads = source_index(source), []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (embedding, features)]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert is_same(*grads)


def test_source_index_lists_the_tokens_of_each_row():
    index = source_index(torch.tensor([4, -2, 0, 4, -2, -1]))
    assert index.segment_source.tolist() == [-2, -1, 0, 4]
    assert index.segment_ptr.tolist() == [0, 2, 3, 4, 6]
    assert index.order.tolist() == [1, 4, 5, 2, 0, 3]


@pytest.mark.parametrize("source", [[0, 9], [-7, 1]])
def test_sources_outside_the_tables_are_named(source):
    embedding, features, _, _ = random_inputs(2, 9, 6, 3)
    source = torch.tensor(source)
    with pytest.raises(IndexError, match=r"source (9|-7) is outside -6:9"):
        pack_image_tokens(embedding, features, source, source_index(source))


@pytest.mark.parametrize(
    ("order", "segment_ptr", "segment_source", "message"),
    [
        ([0, 2], [0, 2], [1], "order 2 is outside 0:2"),
        ([0, 1], [0, 3], [1], "segment_ptr 3 is outside 0:3"),
        ([0, 1], [2, 0], [1], "segment_ptr does not increase"),
        ([0, 1], [0, 1, 2], [1, 1], "segment_source does not increase"),
    ],
)
def test_a_broken_index_is_refused(order, segment_ptr, segment_source, message):
    index = map(torch.tensor, (order, segment_ptr, segment_source))
    with pytest.raises(IndexError, match=message):
        cpp.bwd(torch.zeros(2, 3), *index, 9, 6, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": torch.zeros(3)}, r"embedding must be \[V, D\] float, got \[3\]"),
        ({"embedding": torch.zeros(3, 2, dtype=torch.int64)}, "float, got .* torch.int64"),
        ({"features": torch.zeros(3, 3)}, r"features must be \[F, 2\] torch.float32, got \[3, 3\]"),
        ({"features": torch.zeros(3, 2).half()}, r"got \[3, 2\] torch.float16"),
        ({"source": torch.zeros(2, 2).long()}, r"source must be \[T\] int64, got \[2, 2\]"),
        ({"source": torch.zeros(4).int()}, r"got \[4\] torch.int32"),
        ({"index": source_index(torch.zeros(3).long())}, "the index is of 3 tokens, not of 4"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    source = torch.zeros(4, dtype=torch.int64)
    arguments = {
        "embedding": torch.zeros(3, 2),
        "features": torch.zeros(3, 2),
        "source": source,
        "index": source_index(source),
    }
    with pytest.raises(ValueError, match=message):
        pack_image_tokens(*(arguments | changes).values())


def test_index_moves_as_one():
    index = source_index(torch.tensor([1, 0])).to("meta")
    assert isinstance(index, SourceIndex) and {t.device.type for t in astuple(index)} == {"meta"}
