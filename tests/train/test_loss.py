"""The balanced loss: what its weights do, and that it is two plain losses otherwise."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from mmrm_fast.ops.pair_loss import PairLoss, pair_index
from mmrm_fast.train.loss import LEAST_WEIGHT, preference_loss


def batch(num_pairs, margin=None):
    """Pairs of their own two rewards each, in the order chosen, rejected."""
    places = torch.arange(2 * num_pairs).view(-1, 2)
    return SimpleNamespace(pairs=pair_index(places[:, 0].clone(), places[:, 1].clone(), 2 * num_pairs), margin_P=margin)


def rewards(margins):
    """Rewards [2P] with these margins [P]."""
    margins = torch.tensor(margins, dtype=torch.float64)
    return torch.stack([margins / 2, -margins / 2], dim=1).flatten().requires_grad_()


def loss_of(m, b, mode="balanced", margin=None) -> PairLoss:
    return preference_loss(rewards(m), rewards(b), batch(len(m), margin), sfc_mode=mode)


def test_pairs_for_and_against_the_shortcut_weigh_alike_by_how_often_they_come():
    logits = torch.linspace(
        -2.9, 2.9, 9, dtype=torch.float64
    )  # of a calibrated proxy: p of such pairs have b, 1 - p have -b
    p = torch.sigmoid(logits)
    weight = loss_of([0.0] * 9, logits.tolist()).sfc.double()
    assert p * weight == pytest.approx((1 - p) * weight.flip(0), rel=1e-12)


@pytest.mark.parametrize("m", [-2.0, 0.0, 2.0])
def test_a_pair_that_the_shortcut_solves_weighs_the_same_whatever_the_model_says(m):
    assert loss_of([m], [5.0]).sfc.item() == pytest.approx(LEAST_WEIGHT / torch.sigmoid(torch.tensor(5.0)).item())
    assert loss_of([-2.0], [5.0], "paper").sfc.item() < 0.004  # the SFC almost ignores it


def test_weights_lie_between_the_least_and_one():
    weight = loss_of([0.0, 0.0, 0.0], [-1e4, 0.0, 1e4]).sfc
    assert weight.tolist() == pytest.approx([1.0, 2 * LEAST_WEIGHT, LEAST_WEIGHT])


def test_centering_which_the_mean_weight_would_rescale_is_refused():
    with pytest.raises(ValueError, match="centering"):
        preference_loss(rewards([0.0]), rewards([0.0]), batch(1), sfc_mode="balanced", centering=0.1)


def test_sums_and_gradients_are_those_of_the_plain_formula():
    generator = torch.Generator().manual_seed(0)
    main, proxy = (torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    margin = torch.rand(6, generator=generator, dtype=torch.float64)
    loss = preference_loss(main, proxy, batch(6, margin), sfc_mode="balanced")
    m, b = main[::2] - main[1::2], proxy[::2] - proxy[1::2]
    weight = (LEAST_WEIGHT / torch.sigmoid(b.detach())).clamp(max=1)
    expected_main, expected_proxy = -(weight * logsigmoid(m - margin)).sum(), -logsigmoid(b - margin).sum()
    assert loss.main.item() == pytest.approx(expected_main.item(), rel=1e-12)
    assert loss.proxy.item() == pytest.approx(expected_proxy.item(), rel=1e-12)
    assert (loss.weight.item(), loss.weighted_sfc.item()) == pytest.approx((6, weight.sum().item()))
    assert loss.bt_main.item() == pytest.approx(-logsigmoid(m).sum().item(), rel=1e-12)
    assert (loss.main_correct.item(), loss.proxy_correct.item()) == ((m > 0).sum().item(), (b > 0).sum().item())
    got = torch.autograd.grad(loss.main + loss.proxy, [main, proxy])
    expected = torch.autograd.grad(expected_main + expected_proxy, [main, proxy])
    for actual, plain in zip(got, expected, strict=True):
        assert actual == pytest.approx(plain, rel=1e-12)
