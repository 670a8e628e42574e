"""The preference loss of both branches over a step: sums per micro-batch, one division at its end.

Gradients of a step are accumulated as sums over pairs, on every rank and micro-batch, and multiplied once by
`gradient_scales`, so accumulation, uneven ranks and budgets give the gradient of the global mean exactly.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, one_hot

from mmrm_fast.data.packing import PackedBatch
from mmrm_fast.ops.pair_loss import PairLoss, pair_loss
from mmrm_fast.train import sharding

SUMS = ("main", "proxy", "weight", "weighted_sfc", "main_correct", "proxy_correct", "bt_main")
MARGINS = ("margin", "margin_squared", "router")
COUNTS = ("pairs", "records", "tokens", "tokens_unshared", "text_tokens", "tiles", "errors")
SAVE = "save"  # ranks that ask for a checkpoint at the end of the step
NUM_BINS = 20  # of the SFC histogram over 0..1


def preference_loss(
    rewards_R: Tensor,
    proxy_margin_P: Tensor | None,
    batch: PackedBatch,
    *,
    sfc_mode: str = "paper",
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> PairLoss:
    """Sums over the batch's pairs of `SFC * L` and of `L_t` (`L` alone where there is no proxy).

    Source: Li et al., arXiv 2503.03122; see `ops.pair_loss` for the formulas and modes. `centering` adds its product
    with the squared sum of a pair's two rewards to the main loss, which keeps rewards around zero.
    """
    if centering and sfc_mode == "balanced":
        raise ValueError(f"mode 'balanced' would rescale the centering term, got centering={centering}")
    loss = pair_loss(
        margins(rewards_R, batch), proxy_margin_P, mode="standard" if proxy_margin_P is None else sfc_mode,
        demand_P=batch.margin_P, label_smoothing=label_smoothing,
    )  # fmt: skip
    if not centering:
        return loss
    total_P = gathered(rewards_R, batch.chosen_P) + gathered(rewards_R, batch.rejected_P)
    return loss._replace(main=loss.main + centering * total_P.square().sum())


def with_balance(loss: PairLoss, factor: float, balance: Tensor | None, sfc_mode: str = "standard") -> PairLoss:
    """The loss and `factor` times a mean beside it: times what the step divides the main loss by."""
    if balance is None:
        return loss
    weight = loss.weighted_sfc if sfc_mode == "balanced" else loss.weight
    return loss._replace(main=loss.main + factor * weight * balance)


def margins(rewards_R: Tensor, batch: PackedBatch) -> Tensor:
    """The chosen minus the rejected reward [P] of the batch's pairs."""
    return gathered(rewards_R, batch.chosen_P) - gathered(rewards_R, batch.rejected_P)


def gathered(rewards_R: Tensor, index_P: Tensor) -> Tensor:
    """`rewards_R[index_P]`, whose backward pass adds up a reward's pairs in one order on every device and thread count.

    That of indexing does not on a CPU, from 32,768 pairs on, and that of `index_select` not on a GPU.
    """
    return embedding(index_P, rewards_R[:, None])[:, 0]


@dataclass(frozen=True)
class StepTotals:
    """Sums of one optimizer step over all its pairs and ranks, by their names above."""

    sums: dict[str, float]
    sfc_histogram: tuple[int, ...] = ()

    def gradient_scales(self, sfc_mode: str) -> tuple[float, float]:
        """Factors from accumulated sums to gradients of the mean loss, main and proxy branch.

        In `balanced` the main branch is divided by the sum of its weights, which is known when the step's last
        micro-batch on the last rank is.
        """
        weight, weighted_sfc = self.sums["weight"], self.sums["weighted_sfc"]
        if not weight:
            return 0.0, 0.0
        return 1 / (weighted_sfc if sfc_mode == "balanced" else weight), 1 / weight

    def metrics(self) -> dict[str, float]:
        """Means over the step's pairs, and its counts: what is logged."""
        weight, pairs = self.sums["weight"] or 1.0, self.sums["pairs"] or 1
        margin = self.sums["margin"] / pairs
        spread = self.sums["margin_squared"] / pairs - margin**2
        return {
            "loss": (self.sums["main"] + self.sums["proxy"]) / weight,
            "loss_main": self.sums["main"] / weight,
            "loss_proxy": self.sums["proxy"] / weight,
            "loss_bradley_terry": self.sums["bt_main"] / weight,
            "sfc_mean": self.sums["weighted_sfc"] / weight,
            "accuracy": self.sums["main_correct"] / pairs,
            "proxy_accuracy": self.sums["proxy_correct"] / pairs,
            "margin": margin,
            "margin_std": math.sqrt(spread) if spread > 0 else 0.0,
            **{name: int(self.sums[name]) for name in COUNTS},
        }

    def sfc_metrics(self) -> dict[str, float | list[int]]:
        """The SFC's distribution over the step's pairs: quantiles (to within a bin) and a histogram over 0..1."""
        edges = {f"sfc_p{percent}": quantile(self.sfc_histogram, percent / 100) for percent in (10, 50, 90)}
        return {**edges, "sfc_histogram": list(self.sfc_histogram)}


def quantile(histogram: tuple[int, ...], share: float) -> float:
    """The value below which `share` of a histogram over 0..1 lies, linear within a bin; 0 of an empty one."""
    wanted, below = share * sum(histogram), 0
    for number, count in enumerate(histogram):
        if count and below + count >= wanted:
            return (number + (wanted - below) / count) / len(histogram)
        below += count
    return 0.0


class StepAccumulator:
    """Adds up a rank's micro-batches until the step's end: what is computed on the device, what is counted on the host.

    A rank's wish to save is among the `counts`, so that all ranks grant it at the same step.
    """

    def __init__(self, device: torch.device):
        self.zeros = torch.zeros(NUM_BINS + len(SUMS) + len(MARGINS), dtype=torch.float64, device=device)
        self.sums, self.counts = self.zeros.clone(), dict.fromkeys((*COUNTS, SAVE), 0)
        self.edges = torch.linspace(0, 1, NUM_BINS + 1, device=device)[1:-1]

    def add(
        self, loss: PairLoss, margin_P: Tensor, batch: PackedBatch, num_errors: int, balance: Tensor | None = None
    ) -> None:
        """Add one micro-batch; `margin_P` are the model's, on the device, the batch's tensors on either side."""
        counts = (
            len(batch.chosen_P), len(batch.num_responses), len(batch.main.source_T), batch.main.num_tokens_unshared,
            0 if batch.text is None else len(batch.text.source_T), len(batch.tiles), num_errors,
        )  # fmt: skip
        for name, count in zip(COUNTS, counts, strict=True):
            self.counts[name] += count
        values = [getattr(loss, name).detach().double() for name in SUMS]
        margin_P = margin_P.detach().double()
        router = values[0].new_zeros(()) if balance is None else loss.weight * balance.detach().double()
        histogram = one_hot(torch.bucketize(loss.sfc.detach(), self.edges), NUM_BINS).sum(0).double()
        self.sums += torch.cat([histogram, torch.stack([*values, margin_P.sum(), margin_P.square().sum(), router])])

    def totals(self) -> StepTotals:
        """The step's sums over all ranks; ready for the next step."""
        counts = torch.tensor(list(self.counts.values())).to(self.sums, non_blocking=True)
        sums = sharding.all_sum(torch.cat([self.sums, counts])).tolist()
        names = (*SUMS, *MARGINS, *self.counts)
        self.sums, self.counts = self.zeros.clone(), dict.fromkeys(self.counts, 0)
        return StepTotals(dict(zip(names, sums[NUM_BINS:], strict=True)), tuple(map(int, sums[:NUM_BINS])))
