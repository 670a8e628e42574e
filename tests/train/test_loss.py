"""The loss of a batch: rewards gathered by pair, centering beside it."""

from types import SimpleNamespace

import pytest
import torch
from ops.common import is_same_for_any_thread_count
from torch.nn.functional import logsigmoid

from mmrm_fast.ops.pair_loss import LEAST_WEIGHT
from mmrm_fast.train.loss import margins, preference_loss

CHOSEN, REJECTED = torch.tensor([0, 0, 3, 4]), torch.tensor([1, 2, 0, 2])  # K-wise: rewards 0 and 2 are in several


def batch(margin_P=None):
    return SimpleNamespace(chosen_P=CHOSEN, rejected_P=REJECTED, margin_P=margin_P)


def random_rewards(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)


def plain_loss(main, proxy, mode, margin_P, smoothing, centering):
    """Of both branches, from the formulas."""

    def optimised(x):
        return -(1 - smoothing) * logsigmoid(x - margin_P) - smoothing * logsigmoid(margin_P - x)

    m, b = (rewards[CHOSEN] - rewards[REJECTED] for rewards in (main, proxy))
    loss, proxy_loss = -logsigmoid(m.detach()), -logsigmoid(b.detach())
    weight = {
        "paper": (5e-8 + proxy_loss) / (1e-7 + loss + proxy_loss),
        "reference": 5e-8 + proxy_loss / (1e-7 + loss + proxy_loss),
        "balanced": (LEAST_WEIGHT / torch.sigmoid(b.detach())).clamp(max=1),
    }[mode]
    centred = centering * (main[CHOSEN] + main[REJECTED]).square()
    return (weight * optimised(m) + centred).sum(), optimised(b).sum()


@pytest.mark.parametrize(("mode", "centering"), [("paper", 0.0), ("paper", 0.1), ("reference", 0.1), ("balanced", 0.0)])
def test_sums_and_gradients_are_those_of_the_plain_formula(mode, centering):
    main, proxy = random_rewards(0), random_rewards(1)
    demand = torch.rand(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = plain_loss(main, proxy, mode, demand, 0.1, centering)
    options = {"sfc_mode": mode, "label_smoothing": 0.1, "centering": centering}
    loss = preference_loss(main, margins(proxy, batch()), batch(demand), **options)
    assert (loss.main.item(), loss.proxy.item()) == pytest.approx([e.item() for e in expected], rel=1e-12)
    got = torch.autograd.grad(loss.main + loss.proxy, [main, proxy])
    for actual, plain in zip(got, torch.autograd.grad(sum(expected), [main, proxy]), strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-12, atol=1e-15)


def test_gradients_have_the_same_bits_on_any_number_of_threads():
    """100,000 pairs of 450 responses, far more than torch adds up on one thread."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(450, (2, 100_000), generator=generator)
    many = SimpleNamespace(chosen_P=ends[0], rejected_P=ends[1], margin_P=None)
    rewards, proxy_margin_P = torch.randn(450, generator=generator), torch.randn(100_000, generator=generator)

    def gradient():
        leaf = rewards.clone().requires_grad_()
        return torch.autograd.grad(preference_loss(leaf, proxy_margin_P, many, centering=0.1).main, leaf)

    assert is_same_for_any_thread_count(gradient)


def test_without_a_proxy_the_loss_is_plain():
    main = random_rewards(0)
    loss = preference_loss(main, None, batch(), sfc_mode="paper")
    assert loss.main.item() == pytest.approx(-logsigmoid(main[CHOSEN] - main[REJECTED]).sum().item(), rel=1e-12)
    assert (loss.proxy.item(), loss.weighted_sfc.item()) == (0, 4)


def test_centering_which_the_mean_weight_would_rescale_is_refused():
    with pytest.raises(ValueError, match=r"would rescale the centering term, got centering=0\.1"):
        preference_loss(random_rewards(0), torch.zeros(4), batch(), sfc_mode="balanced", centering=0.1)
