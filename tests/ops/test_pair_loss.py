"""pair_loss: documented values, both backends against each other, gradients against autograd, compiler contracts."""

import pytest
import torch
from ops.common import is_same_for_any_thread_count, widened
from torch.nn.functional import logsigmoid

from mmrm_fast.ops.pair_loss import (
    MODES,
    PairLoss,
    PairLossFunction,
    pair_index,
    pair_loss,
    pair_loss_fwd_cpu,
    pair_loss_ref,
)

OPTIONS = {
    "plain": {},
    "margin": {"margin": True},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "warmup": {"warmup": True},
    "floor": {"floor": 0.4},
    "centering": {"centering": 0.01},
    "all": {"margin": True, "weight": True, "label_smoothing": 0.2, "centering": 0.01, "floor": 0.3},
}
CASES = [
    pytest.param(mode, options, id=f"{mode}-{name}")
    for mode in MODES
    for name, options in OPTIONS.items()
    if not (mode == "standard" and options.keys() & {"warmup", "floor"})
    and not (mode == "normalized" and "centering" in options)
]
cpp = pair_loss_fwd_cpu


def k_wise_pairs(num_groups: int, k: int = 4):
    """Every pair of the k responses of each group: each reward has k - 1 ends."""
    within = torch.combinations(torch.arange(k))
    pairs = (within + k * torch.arange(num_groups)[:, None, None]).flatten(0, 1)
    return pair_index(pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), num_groups * k)


def op_args(mode, options, *, num_groups=5, dtype=torch.float32, scale=3.0, seed=0):
    """Arguments of the op for random K-wise rewards."""
    generator = torch.Generator().manual_seed(seed)
    pairs = k_wise_pairs(num_groups)
    num_rewards, num_pairs = pairs.row_ptr.numel() - 1, pairs.chosen.numel()
    rewards, proxy = scale * torch.randn(2, num_rewards, generator=generator).to(dtype)
    margin, weight = torch.rand(2, num_pairs, generator=generator).to(dtype)
    return (
        rewards, None if mode == "standard" else proxy, pairs.chosen, pairs.rejected,
        margin if "margin" in options else None, weight if "weight" in options else None,
        pairs.row_ptr, pairs.row_entry,
        mode, options.get("label_smoothing", 0.0), options.get("centering", 0.0), "warmup" in options,
        options.get("floor", 0.0),
    )  # fmt: skip


def one_pair(m, b, **options) -> PairLoss:
    proxy = None if b is None else torch.tensor([b, 0.0])
    return pair_loss(torch.tensor([m, 0.0]), proxy, pair_index(torch.tensor([0]), torch.tensor([1]), 2), **options)


@pytest.mark.parametrize(
    ("mode", "m", "b", "sfc"),
    [
        ("paper", 0.0, 0.0, 0.5),
        ("reference", 0.0, 0.0, 0.5),
        ("paper", -2.0, 5.0, 0.003),  # the shortcut solves it, the main model does not: almost ignored
        ("paper", 40.0, 40.0, 0.5),
        ("reference", 15.0, 15.0, 0.430),
        ("reference", 20.0, 20.0, 0.020),
        ("paper", 1e4, -1e4, 1.0),
        ("paper", -1e4, 1e4, 0.0),
    ],
)
def test_documented_coefficients(mode, m, b, sfc):
    assert one_pair(m, b, mode=mode).sfc.item() == pytest.approx(sfc, abs=5e-4)


def test_sums_of_two_pairs():
    loss = pair_loss(
        torch.tensor([1.0, 0.0, 3.0]),
        torch.tensor([0.0, 0.0, -1.0]),
        pair_index(torch.tensor([0, 1]), torch.tensor([1, 2]), 3),
        weight=torch.tensor([1.0, 2.0]),
    )
    main, proxy = -logsigmoid(torch.tensor([1.0, -3.0])), -logsigmoid(torch.tensor([0.0, 1.0]))
    sfc = proxy / (main + proxy)
    expected = {
        "main": sfc[0] * main[0] + 2 * sfc[1] * main[1],
        "proxy": proxy[0] + 2 * proxy[1],
        "weight": 3.0,
        "weighted_sfc": sfc[0] + 2 * sfc[1],
        "main_correct": 1.0,
        "proxy_correct": 1.5,
        "bt_main": main[0] + 2 * main[1],
    }
    for name, value in expected.items():
        assert getattr(loss, name).item() == pytest.approx(float(value), rel=1e-6), name


def test_margin_and_smoothing_leave_the_coefficient_alone():
    plain = one_pair(1.0, -0.5)
    assert torch.equal(one_pair(1.0, -0.5, margin=torch.tensor([2.0]), label_smoothing=0.3).sfc, plain.sfc)


def test_warmup_holds_one_half_and_the_floor_bounds_below():
    assert one_pair(-2.0, 5.0, warmup=True, floor=0.7).sfc.item() == 0.5
    assert one_pair(-2.0, 5.0, floor=0.25).sfc.item() == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4])
@pytest.mark.parametrize(("mode", "options"), CASES)
def test_cpp_is_as_exact_as_torch(mode, options, scale, dtype):
    args = op_args(mode, options, dtype=dtype, scale=scale, num_groups=400)
    truth = pair_loss_ref(*widened(*args))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for actual, reference, exact in zip(cpp(*args), pair_loss_ref(*args), truth, strict=True):
        bound = 2 * (reference - exact).abs() + tolerance * exact.abs() + tolerance
        assert actual.dtype == dtype
        assert torch.all((actual - exact).abs() <= bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("mode", "options"), CASES)
def test_gradients_are_those_of_the_plain_formula(mode, options, dtype):
    args = op_args(mode, options, dtype=dtype)
    rewards, proxy, chosen, rejected, margin, weight, *_ = args
    leaves = [t.clone().requires_grad_() for t in (rewards, proxy) if t is not None]
    main_loss, proxy_loss, _, sfc = PairLossFunction.apply(*leaves, *args[len(leaves) :])
    (2 * main_loss + (3 * proxy_loss if proxy is not None else 0)).backward()

    expected = [t.double().requires_grad_() for t in (rewards, proxy) if t is not None]
    m, *b = (r[chosen] - r[rejected] for r in expected)
    w, offset = (default if t is None else t.double() for t, default in ((weight, 1.0), (margin, 0.0)))
    s, centering = args[9], args[10]

    def loss(x):
        return -(1 - s) * logsigmoid(x - offset) - s * logsigmoid(offset - x)

    centered = centering * (expected[0][chosen] + expected[0][rejected]).square()
    total = 2 * (w * (sfc.double() * loss(m) + centered)).sum()
    if b:
        total = total + 3 * (w * loss(b[0])).sum()
    total.backward()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for actual, plain in zip(leaves, expected, strict=True):
        torch.testing.assert_close(actual.grad.double(), plain.grad, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    def main(rewards):
        loss = pair_loss(rewards, None, pairs, mode="standard", margin=margin, label_smoothing=0.1, centering=0.02)
        return loss.main

    pairs = k_wise_pairs(3)
    margin = torch.rand(pairs.chosen.numel(), dtype=torch.float64)
    assert torch.autograd.gradcheck(main, torch.randn(12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype):
    rewards, proxy = torch.randn(2, 12).to(dtype)
    rewards.requires_grad_()
    loss = pair_loss(rewards, proxy, k_wise_pairs(3))
    upcast = pair_loss(rewards.detach().float(), proxy.float(), k_wise_pairs(3))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(loss, upcast, strict=True))
    loss.main.backward()
    assert rewards.grad.dtype == dtype


@pytest.mark.parametrize("num_rewards", [0, 2])
def test_no_pairs(num_rewards):
    none = torch.empty(0, dtype=torch.int64)
    rewards = torch.ones(num_rewards, requires_grad=True)
    loss = pair_loss(rewards, torch.ones(num_rewards), pair_index(none, none, num_rewards))
    (loss.main + loss.proxy).backward()
    assert all(value == 0 for value in loss[:7])
    assert loss.sfc.shape == (0,)
    assert torch.equal(rewards.grad, torch.zeros(num_rewards))


def test_only_the_losses_carry_gradients():
    loss = pair_loss(torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True), k_wise_pairs(1))
    assert [name for name in PairLoss._fields if getattr(loss, name).requires_grad] == ["main", "proxy"]


def test_same_bits_for_any_thread_count():
    args = op_args("paper", OPTIONS["all"], num_groups=4001)
    assert is_same_for_any_thread_count(lambda: cpp(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("mode", ["standard", "paper"])
@pytest.mark.parametrize("num_groups", [0, 1, 3])
def test_opcheck(mode, dtype, num_groups):
    args = list(op_args(mode, OPTIONS["all"] if mode == "paper" else {}, num_groups=num_groups, dtype=dtype))
    torch.library.opcheck(torch.ops.mmrm_fast.pair_loss_fwd, tuple(args))
    strided = [a.repeat_interleave(2)[::2] if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(torch.ops.mmrm_fast.pair_loss_fwd, tuple(strided))


def test_strided_rewards():
    storage = torch.randn(12, 2)
    pairs = k_wise_pairs(3)
    strided = pair_loss(storage[:, 0], storage[:, 1], pairs)
    contiguous = pair_loss(storage[:, 0].contiguous(), storage[:, 1].contiguous(), pairs)
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


def test_compiles_to_one_graph():
    def step(rewards, proxy):
        loss = pair_loss(rewards, proxy, pairs)
        return loss.main + loss.proxy

    pairs = k_wise_pairs(3)
    rewards = torch.randn(2, 12)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = rewards.clone().requires_grad_()
        function(leaf[0], leaf[1]).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_pair_index_lists_the_ends_of_each_reward():
    index = pair_index(torch.tensor([2, 0]), torch.tensor([0, 1]), 4)
    assert index.row_ptr.tolist() == [0, 2, 3, 4, 4]
    assert index.row_entry.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("position", [-1, 2])
def test_pair_positions_out_of_range_are_named(position):
    with pytest.raises(ValueError, match=f"pair position {position} is outside the 2 rewards"):
        pair_index(torch.tensor([0]), torch.tensor([position]), 2)


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        (0.0, {"mode": "robust"}, "mode must be one of .*, got 'robust'"),
        (0.0, {"mode": "standard"}, "mode 'standard' takes no proxy_rewards"),
        (None, {"mode": "paper"}, "mode 'paper' needs proxy_rewards"),
        (None, {"mode": "standard", "floor": 0.1}, "has no SFC for warmup=False, floor=0.1"),
        (0.0, {"mode": "normalized", "centering": 0.1}, "got centering=0.1"),
        (0.0, {"centering": -1.0}, "centering must not be negative, got -1.0"),
        (0.0, {"label_smoothing": 0.6}, "label_smoothing must be between 0.0 and 0.5, got 0.6"),
        (0.0, {"floor": 1.5}, "floor must be between 0.0 and 1.0, got 1.5"),
        (0.0, {"margin": torch.zeros(2)}, r"margin must be \[1\], got \[2\]"),
        (0.0, {"weight": torch.zeros(1, 1)}, r"weight must be \[1\], got \[1, 1\]"),
    ],
)
def test_wrong_arguments_are_named(b, options, message):
    with pytest.raises(ValueError, match=message):
        one_pair(1.0, b, **options)


def test_wrong_reward_shape_is_named():
    with pytest.raises(ValueError, match=r"rewards must be \[4\], got \[4, 1\]"):
        pair_loss(torch.zeros(4, 1), torch.zeros(4), k_wise_pairs(1))
