"""pixel_shuffle_norm: transformers' own sequence, both backends against each other, gradients, compiler contracts."""

import math
from types import SimpleNamespace

import pytest
import torch
from ops.common import DTYPES, assert_as_exact, is_same_for_any_thread_count, widened
from transformers import InternVLModel

from mmrm_fast.ops.pixel_shuffle_norm import (
    pixel_shuffle_norm,
    pixel_shuffle_norm_bwd_cpu,
    pixel_shuffle_norm_bwd_ref,
    pixel_shuffle_norm_fwd_cpu,
    pixel_shuffle_norm_ref,
)

EPS = 1e-5
SIZES = [(2, 4, 24), (3, 6, 7), (1, 2, 1), (5, 2, 257), (0, 4, 8), (2, 0, 8), (3, 8, 160)]  # I, G, C
cpp = SimpleNamespace(fwd=pixel_shuffle_norm_fwd_cpu, bwd=pixel_shuffle_norm_bwd_cpu)


def random_inputs(num_tiles, grid, channels, dtype, *, weight_dtype=None, offset=0.5):
    """hidden, weight, bias and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden = normal(num_tiles, 1 + grid * grid, channels) * 2 + offset
    weight, bias = normal(4 * channels) + 1, normal(4 * channels)
    grad = normal(num_tiles * (grid // 2) ** 2, 4 * channels)
    hidden, grad = hidden.to(dtype), grad.to(dtype)
    return hidden, weight.to(weight_dtype or dtype), bias.to(weight_dtype or dtype), grad


def transformers_rows(hidden):
    """Rows [N, 4C] as transformers folds them."""
    num_tiles, num_tokens, channels = hidden.shape
    grid = math.isqrt(num_tokens - 1)
    squares = hidden[:, 1:].reshape(num_tiles, grid, grid, channels)
    return InternVLModel.pixel_shuffle(None, squares, scale_factor=0.5).reshape(-1, 4 * channels)


def transformers_norm(hidden, weight, bias):
    return torch.nn.functional.layer_norm(transformers_rows(hidden), weight.shape, weight, bias, EPS)


def dense_transposed(hidden):
    """The same values in memory order [C, tokens, I]."""
    return hidden.permute(2, 1, 0).contiguous().permute(2, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_those_of_transformers(dtype):
    hidden, *_ = random_inputs(3, 6, 5, dtype)
    weight, bias = torch.ones(20, dtype=dtype), torch.zeros(20, dtype=dtype)
    exact = transformers_norm(*widened(hidden, weight, bias))
    assert_as_exact(pixel_shuffle_norm(hidden, weight, bias, eps=EPS), transformers_norm(hidden, weight, bias), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["ref", "cpp"])
@pytest.mark.parametrize(("num_tiles", "grid", "channels"), [size for size in SIZES if size[0] and size[1]])
def test_forward_and_gradients_are_as_exact_as_torch(backend, num_tiles, grid, channels, dtype):
    *leaves, grad = random_inputs(num_tiles, grid, channels, dtype)
    fwd, bwd = (cpp.fwd, cpp.bwd) if backend == "cpp" else (pixel_shuffle_norm_ref, pixel_shuffle_norm_bwd_ref)
    hidden, weight, bias = leaves
    out, mean, rstd = fwd(hidden, weight, bias, EPS)
    actual = (out, *bwd(grad, hidden, weight, mean, rstd, True))

    def by_autograd(*tensors):
        *inputs, slope = tensors
        inputs = [t.clone().requires_grad_() for t in inputs]
        result = transformers_norm(*inputs)
        return result.detach(), *torch.autograd.grad(result, inputs, slope)

    for ours, torchs, exact in zip(
        actual, by_autograd(*leaves, grad), by_autograd(*widened(*leaves, grad)), strict=True
    ):
        assert_as_exact(ours, torchs, exact)


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32 weight", "same weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tiles", "grid", "channels"), SIZES)
def test_cpp_is_as_exact_as_the_reference(num_tiles, grid, channels, dtype, weight_dtype):
    hidden, weight, bias, grad = random_inputs(num_tiles, grid, channels, dtype, weight_dtype=weight_dtype)
    exact = pixel_shuffle_norm_ref(*widened(hidden, weight, bias), EPS)
    reference = pixel_shuffle_norm_ref(hidden, weight, bias, EPS)
    for results in zip(cpp.fwd(hidden, weight, bias, EPS), reference, exact, strict=True):
        assert_as_exact(*results)
    _, mean, rstd = reference
    inputs = (grad, hidden, weight, mean, rstd)
    exact = pixel_shuffle_norm_bwd_ref(*widened(*inputs), True)
    for results in zip(cpp.bwd(*inputs, True), pixel_shuffle_norm_bwd_ref(*inputs, True), exact, strict=True):
        assert_as_exact(*results)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_variance_does_not_cancel(offset):
    hidden, weight, bias, _ = random_inputs(2, 4, 64, torch.float32, offset=offset)
    exact = pixel_shuffle_norm_ref(*widened(hidden, weight, bias), EPS)
    for results in zip(
        cpp.fwd(hidden, weight, bias, EPS), pixel_shuffle_norm_ref(hidden, weight, bias, EPS), exact, strict=True
    ):
        assert_as_exact(*results)


def test_frozen_tower_costs_no_gradient():
    hidden, weight, bias, grad = random_inputs(2, 4, 8, torch.float32)
    _, mean, rstd = cpp.fwd(hidden, weight, bias, EPS)
    none, *others = cpp.bwd(grad, hidden, weight, mean, rstd, False)
    assert none.numel() == 0
    expected = cpp.bwd(grad, hidden, weight, mean, rstd, True)[1:]
    assert all(torch.equal(a, b) for a, b in zip(others, expected, strict=True))


def test_gradient_of_cls_is_zero():
    hidden, weight, bias, grad = random_inputs(2, 4, 8, torch.bfloat16)
    _, mean, rstd = cpp.fwd(hidden, weight, bias, EPS)
    grad_hidden, *_ = cpp.bwd(grad, hidden, weight, mean, rstd, True)
    assert torch.all(grad_hidden[:, 0] == 0) and torch.all(grad_hidden[:, 1:].abs().sum(-1) > 0)


@pytest.mark.parametrize("needed", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)])
def test_gradcheck(needed):
    *leaves, _ = random_inputs(2, 4, 3, torch.float64)
    leaves = [leaf.requires_grad_(bool(need)) for leaf, need in zip(leaves, needed, strict=True)]
    assert torch.autograd.gradcheck(lambda *inputs: pixel_shuffle_norm(*inputs, eps=EPS), leaves)


def test_same_bits_for_any_thread_count():
    def run():
        out, mean, rstd = cpp.fwd(hidden, weight, bias, EPS)
        return out, mean, rstd, *cpp.bwd(grad, hidden, weight, mean, rstd, True)

    hidden, weight, bias, grad = random_inputs(9, 8, 160, torch.float32)
    assert is_same_for_any_thread_count(run)


def test_strided_inputs():
    hidden, weight, bias, grad = random_inputs(3, 4, 6, torch.bfloat16)
    out, mean, rstd = cpp.fwd(hidden, weight, bias, EPS)
    strided = cpp.fwd(dense_transposed(hidden), weight.repeat_interleave(2)[::2], bias, EPS)
    assert all(torch.equal(a, b) for a, b in zip(strided, (out, mean, rstd), strict=True))
    results = cpp.bwd(grad.T.contiguous().T, dense_transposed(hidden), weight, mean, rstd, True)
    expected = cpp.bwd(grad, hidden, weight, mean, rstd, True)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, dense_transposed])
@pytest.mark.parametrize(("num_tiles", "grid", "channels"), [(2, 4, 3), (1, 2, 1), (0, 2, 4), (1, 0, 4)])
def test_opcheck(num_tiles, grid, channels, layout, dtype):
    hidden, weight, bias, grad = random_inputs(num_tiles, grid, channels, dtype)
    hidden = layout(hidden)
    mean, rstd = pixel_shuffle_norm_ref(hidden, weight, bias, EPS)[1:]
    for need_hidden in (True, False):
        args = (grad, hidden, weight, mean, rstd, need_hidden)
        torch.library.opcheck(torch.ops.mmrm_fast.pixel_shuffle_norm_bwd, args)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    torch.library.opcheck(torch.ops.mmrm_fast.pixel_shuffle_norm_fwd, (*leaves, EPS))


def test_compiles_to_one_graph():
    def step(hidden, weight, bias):
        return pixel_shuffle_norm(hidden * 2, weight, bias, eps=EPS).square().sum()

    *inputs, _ = random_inputs(2, 4, 3, torch.float32)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((17, 4), (16, 16), r"hidden must be \[I, 1 \+ G \* G, C\] float, got \[17, 4\]"),
        ((2, 10, 4), (16, 16), "1 \\+ G \\* G tokens a tile, G even, got 10"),
        ((2, 16, 4), (16, 16), "got 16"),
        ((2, 0, 4), (16, 16), "got 0"),
        ((2, 17, 4), (4, 16), r"weight must be \[16\], got \[4\]"),
        ((2, 17, 4), (16, 17), r"bias must be \[16\], got \[17\]"),
    ],
)
def test_wrong_shapes_are_named(shape, sizes, message):
    with pytest.raises(ValueError, match=message):
        pixel_shuffle_norm(torch.zeros(shape), *map(torch.ones, sizes), eps=EPS)


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"float, got .* torch\.int64"):
        pixel_shuffle_norm(torch.zeros(1, 5, 2, dtype=torch.int64), torch.ones(8), torch.ones(8), eps=EPS)
