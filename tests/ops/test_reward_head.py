"""reward_head: the head on all tokens, then index; C++ against the reference, gradients, compiler contracts."""

from types import SimpleNamespace

import pytest
import torch
from ops.common import DTYPES, assert_as_exact, is_same, is_same_for_any_thread_count, widened

from mmrm_fast.ops.reward_head import (
    reward_head,
    reward_head_bwd_cpu,
    reward_head_bwd_ref,
    reward_head_fwd_cpu,
    reward_head_ref,
)

SIZES = [(40, 9, 24), (1, 1, 1), (70, 300, 519), (9, 16, 2048), (5, 0, 8), (0, 0, 8), (3, 4, 0)]  # T, R, D
cpp = SimpleNamespace(fwd=reward_head_fwd_cpu, bwd=reward_head_bwd_cpu)


def random_inputs(num_tokens, num_responses, width, dtype=torch.float32):
    """hidden, last_index, weight and a gradient of the rewards."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = torch.randn(num_tokens, width, generator=generator).to(dtype)
    last_index = torch.randint(max(num_tokens, 1), (num_responses,), generator=generator)
    weight, grad = (torch.randn(size, generator=generator).to(exact) for size in (width, num_responses))
    return hidden, last_index, weight, grad


def dense_transposed(hidden):
    """The same values in memory order [D, T]."""
    return hidden.T.contiguous().T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_the_head_on_all_tokens(dtype):
    hidden, last_index, weight, grad = random_inputs(40, 9, 24, dtype)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    rewards = reward_head(leaves[0], last_index, leaves[1])
    actual = [rewards.detach(), *torch.autograd.grad(rewards, leaves, grad)]
    results = []
    for h, w, g in ((hidden, weight, grad), widened(hidden, weight, grad)):
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        every = torch.nn.functional.linear(leaves[0].to(w.dtype), leaves[1][None])[:, 0][last_index]
        results.append([every.detach(), *torch.autograd.grad(every, leaves, g)])
    for triple in zip(actual, *results, strict=True):
        assert_as_exact(*triple)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_cpp_is_as_exact_as_the_reference(sizes, dtype):
    hidden, last_index, weight, grad = random_inputs(*sizes, dtype)
    inputs = (hidden, last_index, weight)
    assert_as_exact(cpp.fwd(*inputs), reward_head_ref(*inputs), reward_head_ref(*widened(*inputs)))
    inputs = (grad, *inputs)
    for results in zip(
        cpp.bwd(*inputs), reward_head_bwd_ref(*inputs), reward_head_bwd_ref(*widened(*inputs)), strict=True
    ):
        assert_as_exact(*results)


def test_responses_that_end_in_one_token_are_summed_in_order():
    grad, last_index = torch.tensor([1e8, 1.0, -1e8, 3.0]), torch.tensor([1, 1, 1, 0])
    grad_hidden, _ = cpp.bwd(grad, torch.ones(3, 4), last_index, torch.ones(4))
    in_order = (torch.tensor(1e8) + 1 - 1e8).item()
    assert grad_hidden.tolist() == [[3.0] * 4, [in_order] * 4, [0.0] * 4]


def test_duplicates_are_rounded_once():
    last_index, weight = torch.zeros(256, dtype=torch.int64), torch.ones(3)
    grad_hidden, _ = cpp.bwd(torch.full((256,), 1.01), torch.ones(1, 3).bfloat16(), last_index, weight)
    assert torch.equal(grad_hidden, torch.full((1, 3), 256 * 1.01).bfloat16())


def test_long_sums_do_not_drift():
    grad = torch.full((1 << 18,), 0.1)
    _, grad_weight = cpp.bwd(grad, torch.ones(1, 2), torch.zeros(1 << 18, dtype=torch.int64), torch.ones(2))
    torch.testing.assert_close(grad_weight, torch.full((2,), 26214.4), rtol=2e-4, atol=0)


@pytest.mark.parametrize("needed", [(1, 1), (0, 1), (1, 0)])
def test_gradcheck(needed):
    hidden, last_index, weight, _ = random_inputs(6, 5, 3, torch.float64)
    leaves = [t.requires_grad_(bool(need)) for t, need in zip((hidden, weight), needed, strict=True)]
    assert torch.autograd.gradcheck(lambda h, w: reward_head(h, last_index, w), leaves)


def test_same_bits_for_any_thread_count():
    hidden, last_index, weight, grad = random_inputs(500, 130, 1100, torch.bfloat16)
    assert is_same_for_any_thread_count(
        lambda: (cpp.fwd(hidden, last_index, weight), *cpp.bwd(grad, hidden, last_index, weight))
    )


def test_strided_inputs():
    hidden, last_index, weight, grad = random_inputs(40, 9, 24)
    inputs = (hidden, last_index, weight)
    strided = (dense_transposed(hidden), *(t.repeat_interleave(2)[::2] for t in (last_index, weight)))
    assert torch.equal(cpp.fwd(*strided), cpp.fwd(*inputs))
    assert is_same(cpp.bwd(grad.repeat_interleave(2)[::2], *strided), cpp.bwd(grad, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, dense_transposed])
@pytest.mark.parametrize("sizes", [(5, 4, 6), (1, 1, 1), (3, 0, 2)])
def test_opcheck(sizes, layout, dtype):
    hidden, last_index, weight, grad = random_inputs(*sizes, dtype)
    hidden = layout(hidden)
    torch.library.opcheck(torch.ops.mmrm_fast.reward_head_bwd, (grad, hidden, last_index, weight))
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    torch.library.opcheck(torch.ops.mmrm_fast.reward_head_fwd, (leaves[0], last_index, leaves[1]))


def test_compiles_to_one_graph():
    def step(hidden, weight):
        return reward_head(hidden * 2, last_index, weight).square().sum()

    hidden, last_index, weight, _ = random_inputs(40, 9, 24)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert is_same(*grads)


@pytest.mark.parametrize("last", [-1, 4])
def test_a_last_index_outside_the_tokens_is_named(last):
    hidden, last_index, weight = torch.zeros(4, 2), torch.tensor([0, last]), torch.zeros(2)
    with pytest.raises(IndexError, match=f"last_index {last} is outside 0:4"):
        reward_head(hidden, last_index, weight)
    with pytest.raises(IndexError, match=f"last_index {last} is outside 0:4"):
        cpp.bwd(torch.zeros(2), hidden, last_index, weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 2)}, r"hidden must be \[T, D\] float, got \[1, 3, 2\]"),
        ({"hidden": torch.zeros(3, 2).int()}, "float, got .* torch.int32"),
        ({"weight": torch.zeros(1, 2)}, r"weight must be \[2\] torch.float32, got \[1, 2\]"),
        ({"weight": torch.zeros(2).bfloat16()}, r"got \[2\] torch.bfloat16"),
        ({"hidden": torch.zeros(3, 2).double()}, r"weight must be \[2\] torch.float64, got \[2\] torch.float32"),
        ({"last_index": torch.zeros(2)}, r"last_index must be \[R\] int64, got \[2\] torch.float32"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"hidden": torch.zeros(3, 2), "last_index": torch.tensor([2]), "weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        reward_head(*(arguments | changes).values())
