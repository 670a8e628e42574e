"""pair_loss: the pairwise losses of the reward model and its text-only proxy, with the gradients, in one pass.

P pairs. A margin is the reward of a pair's chosen response minus that of the rejected one.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmrm_fast.ops.native import contiguous, native, run
from mmrm_fast.ops.triton import register

MODES = ("standard", "paper", "reference", "balanced")
SFC_EPSILON = 1e-7
LEAST_WEIGHT = 0.05  # of a pair in the mode `balanced`

library = torch.library.Library("mmrm_fast", "FRAGMENT")
library.define(
    "pair_loss_fwd(Tensor margin, Tensor? proxy_margin, Tensor? demand, Tensor? weight, str mode,"
    " float label_smoothing) -> (Tensor sums, Tensor sfc, Tensor slope, Tensor proxy_slope)"
)


class PairLoss(NamedTuple):
    """Sums over pairs, of which `main` and `proxy` carry gradients, and the weights of the pairs."""

    main: Tensor  # w * SFC * loss
    proxy: Tensor  # w * proxy loss; 0 without a proxy
    weight: Tensor  # w
    weighted_sfc: Tensor  # w * SFC
    main_correct: Tensor  # pairs with m > 0, a tie counts half
    proxy_correct: Tensor  # pairs with b > 0, a tie counts half; 0 without a proxy
    bt_main: Tensor  # w * plain -logsigmoid(m)
    sfc: Tensor  # [P], not a sum


def pair_loss_ref(margin, proxy_margin, demand, weight, mode, label_smoothing):
    """What the op means, in plain torch; any device, float32 or float64."""
    weight = torch.ones_like(margin) if weight is None else weight
    demand = torch.zeros_like(margin) if demand is None else demand
    sfc = _sfc_ref(margin, proxy_margin, mode)

    def optimised(x):  # and its derivative
        loss = -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)
        return loss, label_smoothing - torch.sigmoid(-x)

    loss, slope = optimised(margin - demand)
    none = torch.zeros_like(margin)
    proxy_loss, proxy_correct, proxy_slope = none, none, margin.new_empty(0)
    if proxy_margin is not None:
        proxy_loss, proxy_slope = optimised(proxy_margin - demand)
        proxy_correct, proxy_slope = _correct(proxy_margin), weight * proxy_slope
    weighted, plain = weight * sfc, -weight * logsigmoid(margin)
    terms = (weighted * loss, weight * proxy_loss, weight, weighted, _correct(margin), proxy_correct, plain)
    return torch.stack(terms).sum(dim=1), sfc, weighted * slope, proxy_slope


def _sfc_ref(margin: Tensor, proxy_margin: Tensor | None, mode: str) -> Tensor:
    if mode == "standard":
        return torch.ones_like(margin)
    if mode == "balanced":
        return (LEAST_WEIGHT / torch.sigmoid(proxy_margin)).clamp(max=1)
    loss, proxy_loss = -logsigmoid(margin), -logsigmoid(proxy_margin)
    total = SFC_EPSILON + loss + proxy_loss
    if mode == "reference":
        return SFC_EPSILON / 2 + proxy_loss / total
    return (SFC_EPSILON / 2 + proxy_loss) / total


def _correct(margin: Tensor) -> Tensor:
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)


def pair_loss_fwd_native(margin, proxy_margin, demand, weight, mode, label_smoothing):
    """`pair_loss_ref` in C++ or CUDA C++."""
    inputs, outputs = contiguous(margin, proxy_margin, demand, weight), _empty_outputs(margin, proxy_margin)
    scratch = []
    if margin.is_cuda:
        scratch = [margin.new_empty(native().pair_loss_scratch_size(len(margin)), dtype=torch.float64)]
    run("pair_loss_fwd", *inputs, mode, label_smoothing, *outputs, *scratch, on=margin)
    return outputs


def _empty_outputs(margin: Tensor, proxy_margin: Tensor | None) -> tuple[Tensor, ...]:
    num_pairs = margin.shape[0]
    sizes = (len(PairLoss._fields) - 1, num_pairs, num_pairs, 0 if proxy_margin is None else num_pairs)
    return tuple(margin.new_empty(size) for size in sizes)


register(library, "pair_loss", pair_loss_fwd=(pair_loss_ref, pair_loss_fwd_native))


@torch.library.register_fake("mmrm_fast::pair_loss_fwd", lib=library)
def _(margin, proxy_margin, *_):
    return _empty_outputs(margin, proxy_margin)


class PairLossFunction(torch.autograd.Function):
    """Autograd of the op: its forward has the gradients, its backward scales them.

    Around the op and not registered for it, which made a small call a third longer: the dispatcher would pass every
    argument through Python twice, and the sums would be taken apart outside, forward and backward.
    """

    @staticmethod
    def forward(ctx, margin, proxy_margin, *rest):
        sums, sfc, slope, proxy_slope = pair_loss_fwd(margin, proxy_margin, *rest)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(sums, sfc)
        ctx.save_for_backward(slope, proxy_slope)
        ctx.has_proxy = proxy_margin is not None
        return sums[0], sums[1], sums, sfc

    @staticmethod
    def backward(ctx, grad_main, grad_proxy, *_):
        slope, proxy_slope = ctx.saved_tensors
        to_margin = None if grad_main is None else grad_main * slope
        to_proxy_margin = grad_proxy * proxy_slope if ctx.has_proxy and grad_proxy is not None else None
        return to_margin, to_proxy_margin, None, None, None, None


pair_loss_fwd = torch.ops.mmrm_fast.pair_loss_fwd.default


def pair_loss(
    margin_P: Tensor,
    proxy_margin_P: Tensor | None = None,
    *,
    mode: str = "paper",
    demand_P: Tensor | None = None,
    weight_P: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """Bradley-Terry losses of the main model and of the text-only proxy, the first weighted by how the second fails.

    With m and b the margins of the main model and of the proxy, L = -logsigmoid(m) and L_t = -logsigmoid(b), the
    detached Shortcut-Failure Coefficient is SFC = L_t / (L + L_t) (Li et al., ICML 2025, arXiv 2503.03122),
    stabilised by eps = 1e-7:

        paper      (eps/2 + L_t) / (eps + L + L_t)
        reference  eps/2 + L_t / (eps + L + L_t), the authors' code, which vanishes at large margins
        balanced   min(1, c / sigmoid(b)), c = `LEAST_WEIGHT`, in place of the SFC; for callers that divide by its mean
        standard   1, without a proxy

    `balanced` makes text no longer tell the label: sigmoid(b) is the proxy's probability of it, and weighted by its
    inverse, pairs whose text favours their label weigh as much as those whose text speaks against it. Unlike the SFC
    it does not depend on the model's own loss: a pair that the shortcut solves and the model gets wrong weighs as much
    as one that both get right, never less than c. The bound at 1 keeps single pairs from deciding a step.

    With label smoothing s in l(x) = -(1 - s) logsigmoid(x) - s logsigmoid(-x), the two losses are

        main  = sum of w SFC l(m - demand)
        proxy = sum of w l(b - demand)

    Args:
        margin_P: [P] float, of the main model.
        proxy_margin_P: [P] float, of the proxy; None exactly in `standard`.
        demand_P, weight_P: [P] float, the margin that a pair shall have and its weight w; 0 and 1 where None.

    Returns:
        Sums, not means, and SFC. float64 for float64 margins; otherwise arithmetic and results are float32, and
        sums accumulate in float32 or wider.

    Raises:
        ValueError: an unknown mode, a proxy that the mode has no use for, a wrong shape, a value out of its range.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (mode == "standard") != (proxy_margin_P is None):
        raise ValueError(f"mode {mode!r} {'takes no' if mode == 'standard' else 'needs'} proxy_margin_P")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be between 0 and 0.5, got {label_smoothing}")
    if margin_P.dim() != 1:
        raise ValueError(f"margin_P must be [P], got {list(margin_P.shape)}")
    optional = {"proxy_margin_P": proxy_margin_P, "demand_P": demand_P, "weight_P": weight_P}
    for name, tensor in optional.items():
        if tensor is not None and tensor.shape != margin_P.shape:
            raise ValueError(f"{name} must be {list(margin_P.shape)}, got {list(tensor.shape)}")
    dtype = torch.float64 if margin_P.dtype == torch.float64 else torch.float32
    tensors = (None if t is None else t.to(dtype) for t in (margin_P, *optional.values()))
    main, proxy, sums, sfc = PairLossFunction.apply(*tensors, mode, label_smoothing)
    return PairLoss(main, proxy, *sums[2:].unbind(), sfc)
