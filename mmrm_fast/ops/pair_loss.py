"""pair_loss: the pairwise losses of the reward model and its text-only proxy, with the gradients, in one pass.

R rewards, P pairs. `ends` are a pair's chosen and rejected reward: entry 2 * pair + (0 chosen | 1 rejected).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmrm_fast.ops.native import addresses, cuda_native, device_and_stream, native
from mmrm_fast.ops.triton import use_triton

MODES = ("standard", "paper", "reference", "normalized")
SFC_EPSILON = 1e-7

library = torch.library.Library("mmrm_fast", "FRAGMENT")
library.define(
    "pair_loss_fwd(Tensor rewards, Tensor? proxy_rewards, Tensor chosen, Tensor rejected, Tensor? margin,"
    " Tensor? weight, Tensor row_ptr, Tensor row_entry, str mode, float label_smoothing, float centering, bool warmup,"
    " float floor) -> (Tensor sums, Tensor sfc, Tensor grad_rewards, Tensor grad_proxy)"
)


@dataclass(frozen=True)
class PairIndex:
    """Pairs over R rewards, and the same by reward (CSR): row_entry[row_ptr[r] : row_ptr[r+1]] are reward r's ends."""

    chosen: Tensor  # [P] int64
    rejected: Tensor  # [P] int64
    row_ptr: Tensor  # [R+1] int64
    row_entry: Tensor  # [2P] int64, pair * 2 + (0 chosen | 1 rejected)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PairIndex":
        """The same index on another device."""
        tensors = (self.chosen, self.rejected, self.row_ptr, self.row_entry)
        return PairIndex(*(t.to(device, non_blocking=non_blocking) for t in tensors))


class PairLoss(NamedTuple):
    """Sums over pairs; only `main` and `proxy` carry gradients."""

    main: Tensor  # w * (SFC * loss + centering)
    proxy: Tensor  # w * proxy loss; 0 without a proxy
    weight: Tensor  # w
    weighted_sfc: Tensor  # w * SFC
    main_correct: Tensor  # pairs with m > 0, a tie counts half
    proxy_correct: Tensor  # pairs with b > 0, a tie counts half; 0 without a proxy
    bt_main: Tensor  # w * plain -logsigmoid(m)
    sfc: Tensor  # [P], not a sum


def pair_loss_ref(
    rewards, proxy_rewards, chosen, rejected, margin, weight, row_ptr, row_entry,
    mode, label_smoothing, centering, warmup, floor,
):  # fmt: skip
    """What the op means, in plain torch; any device, float32 or float64."""
    m, total = rewards[chosen] - rewards[rejected], rewards[chosen] + rewards[rejected]
    b = None if proxy_rewards is None else proxy_rewards[chosen] - proxy_rewards[rejected]
    weight = torch.ones_like(m) if weight is None else weight
    margin = torch.zeros_like(m) if margin is None else margin
    sfc = _sfc_ref(m, b, mode, warmup, floor)

    def optimised(x):  # and its derivative
        loss = -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)
        return loss, label_smoothing - torch.sigmoid(-x)

    def by_reward(end_PE):
        return torch.segment_reduce(end_PE.flatten()[row_entry], "sum", offsets=row_ptr, initial=0, unsafe=True)

    loss, slope = optimised(m - margin)
    slope, pull = weight * sfc * slope, 2 * weight * centering * total
    grad_rewards = by_reward(torch.stack([pull + slope, pull - slope], dim=1))
    proxy_loss, proxy_correct, grad_proxy = torch.zeros_like(m), torch.zeros_like(m), rewards.new_empty(0)
    if b is not None:
        proxy_loss, slope = optimised(b - margin)
        proxy_correct = _correct(b)
        grad_proxy = by_reward(torch.stack([weight * slope, -weight * slope], dim=1))
    main = weight * (sfc * loss + centering * total.square())
    terms = (main, weight * proxy_loss, weight, weight * sfc, _correct(m), proxy_correct, -weight * logsigmoid(m))
    return torch.stack(terms).sum(dim=1), sfc, grad_rewards, grad_proxy


def _sfc_ref(m: Tensor, b: Tensor | None, mode: str, warmup: bool, floor: float) -> Tensor:
    if mode == "standard":
        return torch.ones_like(m)
    if warmup:
        return torch.full_like(m, 0.5)
    loss, proxy_loss = -logsigmoid(m), -logsigmoid(b)
    total = SFC_EPSILON + loss + proxy_loss
    if mode == "reference":
        return (SFC_EPSILON / 2 + proxy_loss / total).clamp(min=floor)
    return ((SFC_EPSILON / 2 + proxy_loss) / total).clamp(min=floor)


def _correct(m: Tensor) -> Tensor:
    return (m > 0).to(m.dtype) + 0.5 * (m == 0).to(m.dtype)


library.impl("pair_loss_fwd", pair_loss_ref, "CompositeExplicitAutograd")


def pair_loss_fwd_cpu(rewards, proxy_rewards, chosen, rejected, margin, weight, row_ptr, row_entry, *options):
    """`pair_loss_ref` in C++."""
    tensors = (rewards, proxy_rewards, chosen, rejected, margin, weight, row_ptr, row_entry)
    inputs = [None if t is None else t.contiguous() for t in tensors]
    outputs = _empty_outputs(rewards, proxy_rewards, chosen)
    native().pair_loss_fwd_cpu(
        str(rewards.dtype), *addresses(*inputs, device=rewards.device), rewards.shape[0], chosen.shape[0], *options,
        *addresses(*outputs, device=rewards.device), torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def pair_loss_fwd_cuda(rewards, proxy_rewards, chosen, rejected, margin, weight, row_ptr, row_entry, *options):
    """`pair_loss_ref` in CUDA C++."""
    tensors = (rewards, proxy_rewards, chosen, rejected, margin, weight, row_ptr, row_entry)
    inputs = [None if t is None else t.detach().contiguous() for t in tensors]
    outputs = _empty_outputs(rewards, proxy_rewards, chosen)
    num_rewards, num_pairs = rewards.shape[0], chosen.shape[0]
    scratch = rewards.new_empty(native().pair_loss_scratch_size(num_pairs), dtype=torch.float64)
    native().pair_loss_fwd_cuda(
        str(rewards.dtype), *addresses(*inputs, device=rewards.device), num_rewards, num_pairs, *options,
        *addresses(*outputs, scratch, device=rewards.device), *device_and_stream(rewards),
    )  # fmt: skip
    return outputs


def _empty_outputs(rewards: Tensor, proxy_rewards: Tensor | None, chosen: Tensor) -> tuple[Tensor, ...]:
    num_rewards, num_pairs = rewards.shape[0], chosen.shape[0]
    sizes = (len(PairLoss._fields) - 1, num_pairs, num_rewards, 0 if proxy_rewards is None else num_rewards)
    return tuple(rewards.new_empty(size) for size in sizes)


if native() is not None:
    library.impl("pair_loss_fwd", pair_loss_fwd_cpu, "CPU")
if cuda_native() is not None:
    library.impl("pair_loss_fwd", pair_loss_fwd_cuda, "CUDA")
else:
    use_triton(library, "pair_loss", pair_loss_fwd=pair_loss_ref)


@torch.library.register_fake("mmrm_fast::pair_loss_fwd", lib=library)
def _(rewards, proxy_rewards, chosen, *_):
    return _empty_outputs(rewards, proxy_rewards, chosen)


class PairLossFunction(torch.autograd.Function):
    """Autograd of the op: its forward has the gradients, its backward scales them.

    Around the op and not registered for it, which made a small call a third longer: the dispatcher would pass every
    argument through Python twice, and the sums would be taken apart outside, forward and backward.
    """

    @staticmethod
    def forward(ctx, rewards, proxy_rewards, *rest):
        sums, sfc, grad_rewards, grad_proxy = pair_loss_fwd(rewards, proxy_rewards, *rest)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(sums, sfc)
        ctx.save_for_backward(grad_rewards, grad_proxy)
        ctx.has_proxy = proxy_rewards is not None
        return sums[0], sums[1], sums, sfc

    @staticmethod
    def backward(ctx, grad_main, grad_proxy_loss, *_):
        grad_rewards, grad_proxy = ctx.saved_tensors
        to_rewards = None if grad_main is None else grad_main * grad_rewards
        to_proxy = grad_proxy_loss * grad_proxy if ctx.has_proxy and grad_proxy_loss is not None else None
        return to_rewards, to_proxy, *[None] * 11


pair_loss_fwd = torch.ops.mmrm_fast.pair_loss_fwd.default


def pair_index(chosen: Tensor, rejected: Tensor, num_rewards: int) -> PairIndex:
    """Index pairs by reward, on the host.

    Args:
        chosen, rejected: [P] int64 on the CPU, positions among the rewards.
        num_rewards: R.

    Raises:
        ValueError: shapes or dtypes differ from the above, or a position is outside 0 : R.
    """
    for name, tensor in (("chosen", chosen), ("rejected", rejected)):
        if tensor.dtype != torch.int64 or tensor.shape != (chosen.numel(),):
            raise ValueError(f"{name} must be [{chosen.numel()}] int64, got {list(tensor.shape)} {tensor.dtype}")
    ends = torch.stack([chosen, rejected], dim=1).flatten()
    outside = ends[(ends < 0) | (ends >= num_rewards)]
    if outside.numel():
        raise ValueError(f"pair position {outside[0]} is outside the {num_rewards} rewards")
    row_ptr = torch.zeros(num_rewards + 1, dtype=torch.int64)
    row_ptr[1:] = torch.bincount(ends, minlength=num_rewards).cumsum(0)
    return PairIndex(chosen, rejected, row_ptr, ends.argsort(stable=True))


def pair_loss(
    rewards_R: Tensor,
    proxy_rewards_R: Tensor | None,
    pairs: PairIndex,
    *,
    mode: str = "paper",
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    warmup: bool = False,
    floor: float = 0.0,
) -> PairLoss:
    """Bradley-Terry losses of the main model and of the text-only proxy, the first weighted by how the second fails.

    With m and b the chosen reward minus the rejected one of the main model and of the proxy, L = -logsigmoid(m) and
    L_t = -logsigmoid(b), the detached Shortcut-Failure Coefficient is SFC = L_t / (L + L_t) (Li et al., ICML 2025,
    arXiv 2503.03122), stabilised by eps = 1e-7:

        paper       (eps/2 + L_t) / (eps + L + L_t)
        normalized  the same, for callers that divide by its global mean
        reference   eps/2 + L_t / (eps + L + L_t), the authors' code, which vanishes at large margins
        standard    1, without a proxy

    With label smoothing s in l(x) = -(1 - s) logsigmoid(x) - s logsigmoid(-x), the two losses are

        main  = sum of w (SFC l(m - margin) + centering (r_c + r_r)^2)
        proxy = sum of w l(b - margin)

    Args:
        rewards_R: [R] float, of the main model.
        proxy_rewards_R: [R] float, of the proxy; None exactly in `standard`.
        pairs: from `pair_index`, on the device of the rewards.
        margin, weight: [P] float, 0 and 1 where None.
        warmup: hold SFC at 0.5, whatever the floor.
        floor: lower bound of SFC.

    Returns:
        Sums, not means, and SFC. float64 for float64 rewards; otherwise arithmetic and results are float32, and
        sums accumulate in float32 or wider.

    Raises:
        ValueError: an unknown mode, options the mode has no use for, a wrong shape, a value out of its range.
    """
    _check_mode(mode, proxy_rewards_R, centering, warmup, floor)
    _check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    _check_range("floor", floor, 0.0, 1.0)
    num_rewards, num_pairs = pairs.row_ptr.shape[0] - 1, pairs.chosen.shape[0]
    _check_shape("rewards", rewards_R, num_rewards)
    _check_shape("proxy_rewards", proxy_rewards_R, num_rewards)
    _check_shape("margin", margin, num_pairs)
    _check_shape("weight", weight, num_pairs)
    dtype = torch.float64 if rewards_R.dtype == torch.float64 else torch.float32
    rewards, proxy, margin, weight = (
        None if t is None else t.to(dtype) for t in (rewards_R, proxy_rewards_R, margin, weight)
    )
    main, proxy_loss, sums, sfc = PairLossFunction.apply(
        rewards, proxy, pairs.chosen, pairs.rejected, margin, weight, pairs.row_ptr, pairs.row_entry,
        mode, label_smoothing, centering, warmup, floor,
    )  # fmt: skip
    return PairLoss(main, proxy_loss, *sums[2:].unbind(), sfc)


def _check_mode(mode: str, proxy_rewards: Tensor | None, centering: float, warmup: bool, floor: float) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (mode == "standard") != (proxy_rewards is None):
        raise ValueError(f"mode {mode!r} {'takes no' if mode == 'standard' else 'needs'} proxy_rewards")
    if mode == "standard" and (warmup or floor):
        raise ValueError(f"mode 'standard' has no SFC for warmup={warmup}, floor={floor}")
    if mode == "normalized" and centering:
        raise ValueError(f"mode 'normalized' would rescale the centering term, got centering={centering}")
    if centering < 0:
        raise ValueError(f"centering must not be negative, got {centering}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


def _check_shape(name: str, tensor: Tensor | None, size: int) -> None:
    if tensor is not None and tensor.shape != (size,):
        raise ValueError(f"{name} must be [{size}], got {list(tensor.shape)}")
