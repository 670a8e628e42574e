"""pair_loss: documented values, both backends against each other, gradients against autograd, compiler contracts."""

import pytest
import torch
from ops.common import is_same_for_any_thread_count, widened
from torch.nn.functional import logsigmoid

from mmrm_fast.ops.pair_loss import (
    LEAST_WEIGHT,
    MODES,
    PairLoss,
    PairLossFunction,
    pair_loss,
    pair_loss_fwd_native,
    pair_loss_ref,
)

OPTIONS = {  # demand, weight, label smoothing
    "plain": (False, False, 0.0),
    "demand": (True, False, 0.0),
    "weight": (False, True, 0.0),
    "smoothing": (False, False, 0.1),
    "all": (True, True, 0.2),
}
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
by_mode = pytest.mark.parametrize("mode", MODES)
by_options = pytest.mark.parametrize("options", OPTIONS)


def op_args(mode, options="plain", *, num_pairs=30, dtype=torch.float32, scale=3.0, seed=0):
    """Arguments of the op for random margins."""
    generator = torch.Generator().manual_seed(seed)
    margin, proxy_margin = scale * torch.randn(2, num_pairs, generator=generator).to(dtype)
    demand, weight = torch.rand(2, num_pairs, generator=generator).to(dtype)
    has_demand, has_weight, smoothing = OPTIONS[options]
    proxy_margin = None if mode == "standard" else proxy_margin
    return margin, proxy_margin, demand if has_demand else None, weight if has_weight else None, mode, smoothing


def assert_pair_loss_as_exact(results, args):
    """No error is more than twice that of the reference in the same dtype, plus a floor."""
    tolerance = 1e-6 if args[0].dtype == torch.float32 else 1e-12
    truth = pair_loss_ref(*widened(*args))
    for actual, reference, exact in zip(results, pair_loss_ref(*args), truth, strict=True):
        bound = 2 * (reference - exact).abs() + tolerance * exact.abs() + tolerance
        assert (actual.dtype, actual.shape) == (reference.dtype, reference.shape)
        assert torch.all((actual - exact).abs() <= bound)


def one_pair(m, b, **options) -> PairLoss:
    return pair_loss(torch.tensor([m]), None if b is None else torch.tensor([b]), **options)


@pytest.mark.parametrize(
    ("mode", "m", "b", "sfc"),
    [
        ("paper", 0.0, 0.0, 0.5),
        ("reference", 0.0, 0.0, 0.5),
        ("paper", -2.0, 5.0, 0.003),  # the shortcut solves it, the main model does not: almost ignored
        ("balanced", -2.0, 5.0, 0.0503),  # weighed like any pair that the shortcut solves
        ("balanced", 2.0, 5.0, 0.0503),
        ("paper", 40.0, 40.0, 0.5),
        ("reference", 15.0, 15.0, 0.430),
        ("reference", 20.0, 20.0, 0.020),
        ("paper", 1e4, -1e4, 1.0),
        ("paper", -1e4, 1e4, 0.0),
        ("balanced", 0.0, 0.0, 2 * LEAST_WEIGHT),
        ("balanced", 0.0, 1e4, LEAST_WEIGHT),
        ("balanced", 0.0, -1e4, 1.0),
    ],
)
def test_documented_coefficients(mode, m, b, sfc):
    assert one_pair(m, b, mode=mode).sfc.item() == pytest.approx(sfc, abs=5e-4)


def test_balanced_pairs_for_and_against_the_shortcut_weigh_alike_by_how_often_they_come():
    logits = torch.linspace(-2.9, 2.9, 9, dtype=torch.float64)  # of a calibrated proxy: p pairs have b, 1 - p have -b
    p = torch.sigmoid(logits)
    weight = pair_loss(torch.zeros_like(logits), logits, mode="balanced").sfc
    assert p * weight == pytest.approx((1 - p) * weight.flip(0), rel=1e-12)


def test_sums_of_two_pairs():
    loss = pair_loss(torch.tensor([1.0, -3.0]), torch.tensor([0.0, 1.0]), weight_P=torch.tensor([1.0, 2.0]))
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


@pytest.mark.parametrize("mode", MODES[1:])
def test_demand_and_smoothing_leave_the_coefficient_alone(mode):
    plain = one_pair(1.0, -0.5, mode=mode)
    assert torch.equal(one_pair(1.0, -0.5, mode=mode, demand_P=torch.tensor([2.0]), label_smoothing=0.3).sfc, plain.sfc)


@by_dtype
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4])
@by_options
@by_mode
def test_cpp_is_as_exact_as_torch(mode, options, scale, dtype):
    args = op_args(mode, options, dtype=dtype, scale=scale, num_pairs=2400)
    assert_pair_loss_as_exact(pair_loss_fwd_native(*args), args)


@by_dtype
@by_options
@by_mode
def test_gradients_are_those_of_the_plain_formula(mode, options, dtype):
    margin, proxy_margin, demand, weight, _, s = args = op_args(mode, options, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (margin, proxy_margin) if t is not None]
    main_loss, proxy_loss, _, sfc = PairLossFunction.apply(*leaves, *args[len(leaves) :])
    (2 * main_loss + (3 * proxy_loss if proxy_margin is not None else 0)).backward()

    m, *b = expected = [t.double().requires_grad_() for t in (margin, proxy_margin) if t is not None]
    w, offset = (default if t is None else t.double() for t, default in ((weight, 1.0), (demand, 0.0)))

    def loss(x):
        return -(1 - s) * logsigmoid(x - offset) - s * logsigmoid(offset - x)

    total = 2 * (w * sfc.double() * loss(m)).sum()
    if b:
        total = total + 3 * (w * loss(b[0])).sum()
    total.backward()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for actual, plain in zip(leaves, expected, strict=True):
        torch.testing.assert_close(actual.grad.double(), plain.grad, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    def losses(margin, proxy_margin):  # the weight is detached: none in the first, the proxy's own in the second
        main = pair_loss(margin, None, mode="standard", demand_P=demand, label_smoothing=0.1).main
        return main, pair_loss(margin.detach(), proxy_margin, demand_P=demand, label_smoothing=0.1).proxy

    demand = torch.rand(12, dtype=torch.float64)
    margins = torch.randn(2, 12, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(losses, [margin.requires_grad_() for margin in margins])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype):
    margin, proxy_margin = torch.randn(2, 12).to(dtype)
    margin.requires_grad_()
    loss = pair_loss(margin, proxy_margin)
    upcast = pair_loss(margin.detach().float(), proxy_margin.float())
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(loss, upcast, strict=True))
    loss.main.backward()
    assert margin.grad.dtype == dtype


@by_mode
def test_no_pairs(mode):
    margin, proxy_margin = (torch.zeros(0, requires_grad=True) for _ in range(2))
    loss = pair_loss(margin, None if mode == "standard" else proxy_margin, mode=mode)
    (loss.main + loss.proxy).backward()
    assert all(value == 0 for value in loss[:7])
    assert loss.sfc.shape == margin.grad.shape == (0,)


@by_mode
def test_a_margin_that_is_not_a_number_makes_the_losses_none(mode):
    margin = torch.tensor([1.0, torch.nan])
    loss = pair_loss(margin, None if mode == "standard" else margin, mode=mode)
    assert loss.main.isnan() and (mode == "standard" or loss.proxy.isnan())


def test_only_the_losses_carry_gradients():
    loss = pair_loss(torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True))
    assert [name for name in PairLoss._fields if getattr(loss, name).requires_grad] == ["main", "proxy"]


@by_mode
def test_same_bits_for_any_thread_count(mode):
    args = op_args(mode, "all", num_pairs=24_006)
    assert is_same_for_any_thread_count(lambda: pair_loss_fwd_native(*args))


@by_dtype
@pytest.mark.parametrize(("mode", "options"), [("standard", "plain"), ("paper", "all"), ("balanced", "all")])
@pytest.mark.parametrize("num_pairs", [0, 1, 18])
def test_opcheck(mode, options, dtype, num_pairs):
    args = op_args(mode, options, num_pairs=num_pairs, dtype=dtype)
    torch.library.opcheck(torch.ops.mmrm_fast.pair_loss_fwd, args)
    strided = tuple(a.repeat_interleave(2)[::2] if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(torch.ops.mmrm_fast.pair_loss_fwd, strided)


def test_strided_margins():
    storage = torch.randn(12, 2)
    strided, contiguous = pair_loss(*storage.unbind(1)), pair_loss(*storage.T.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


def test_compiles_to_one_graph():
    def step(margin, proxy_margin):
        loss = pair_loss(margin, proxy_margin)
        return loss.main + loss.proxy

    margins = torch.randn(2, 12)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = margins.clone().requires_grad_()
        function(leaf[0], leaf[1]).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        (0.0, {"mode": "robust"}, "mode must be one of .*, got 'robust'"),
        (0.0, {"mode": "standard"}, "mode 'standard' takes no proxy_margin_P"),
        (None, {"mode": "paper"}, "mode 'paper' needs proxy_margin_P"),
        (0.0, {"label_smoothing": 0.6}, "label_smoothing must be between 0 and 0.5, got 0.6"),
        (0.0, {"demand_P": torch.zeros(2)}, r"demand_P must be \[1\], got \[2\]"),
        (0.0, {"weight_P": torch.zeros(1, 1)}, r"weight_P must be \[1\], got \[1, 1\]"),
        ([0.0, 1.0], {}, r"proxy_margin_P must be \[1\], got \[2\]"),
    ],
)
def test_wrong_arguments_are_named(b, options, message):
    with pytest.raises(ValueError, match=message):
        pair_loss(torch.zeros(1), None if b is None else torch.tensor(b).view(-1), **options)


def test_wrong_margin_shape_is_named():
    with pytest.raises(ValueError, match=r"margin_P must be \[P\], got \[4, 1\]"):
        pair_loss(torch.zeros(4, 1), torch.zeros(4))
