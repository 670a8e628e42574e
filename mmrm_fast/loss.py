"""The preference loss of both branches over a step: sums per micro-batch, one division at its end.

Gradients of a step are accumulated as sums over pairs, on every rank and micro-batch, and multiplied once by
`gradient_scales`, so accumulation, uneven ranks and budgets give the gradient of the global mean exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrm_fast.ops.pair_loss import PairLoss, pair_loss
from mmrm_fast.packing import PackedBatch

SUMS = ("main", "proxy", "weight", "weighted_sfc", "main_correct", "proxy_correct", "bt_main")
COUNTS = ("pairs", "records", "tokens", "tokens_unshared", "errors")


def preference_loss(
    rewards_R: Tensor, proxy_rewards_R: Tensor | None, batch: PackedBatch, *, sfc_mode: str
) -> PairLoss:
    """Sums over the batch's pairs of `SFC * L` and of `L_t` (`L` alone where there is no proxy).

    Source: Li et al., arXiv 2503.03122; see `ops.pair_loss` for the formulas and modes.
    """
    mode = "standard" if proxy_rewards_R is None else sfc_mode
    return pair_loss(rewards_R, proxy_rewards_R, batch.pairs, mode=mode, margin=batch.margin_P)


@dataclass(frozen=True)
class StepTotals:
    """Sums of one optimizer step over all its pairs and ranks, by the names in `SUMS` and `COUNTS`."""

    sums: dict[str, float]

    def gradient_scales(self, sfc_mode: str) -> tuple[float, float]:
        """Factors from accumulated sums to gradients of the mean loss, main and proxy branch.

        In `normalized` the main branch is also divided by the mean SFC.
        """
        weight, weighted_sfc = self.sums["weight"], self.sums["weighted_sfc"]
        if not weight:
            return 0.0, 0.0
        return 1 / (weighted_sfc if sfc_mode == "normalized" else weight), 1 / weight

    def metrics(self) -> dict[str, float]:
        """Means over the step's pairs, and its counts: what is logged."""
        weight, pairs = self.sums["weight"] or 1.0, self.sums["pairs"] or 1
        return {
            "loss": (self.sums["main"] + self.sums["proxy"]) / weight,
            "loss_main": self.sums["main"] / weight,
            "loss_proxy": self.sums["proxy"] / weight,
            "loss_bradley_terry": self.sums["bt_main"] / weight,
            "sfc_mean": self.sums["weighted_sfc"] / weight,
            "accuracy": self.sums["main_correct"] / pairs,
            "proxy_accuracy": self.sums["proxy_correct"] / pairs,
            **{name: int(self.sums[name]) for name in COUNTS},
        }


class StepAccumulator:
    """Adds up a rank's micro-batches, on the device until the step's end."""

    def __init__(self, device: torch.device):
        self.zeros = torch.zeros(len(SUMS) + len(COUNTS), dtype=torch.float64, device=device)
        self.sums = self.zeros.clone()

    def add(self, loss: PairLoss, batch: PackedBatch, num_errors: int) -> None:
        """Add one micro-batch."""
        counts = [
            len(batch.pairs.chosen),
            len(batch.num_responses),
            len(batch.main.source_T),
            batch.main.num_tokens_unshared,
            num_errors,
        ]
        self.sums[: len(SUMS)] += torch.stack([getattr(loss, name).detach().double() for name in SUMS])
        self.sums[len(SUMS) :] += torch.tensor(counts, device=self.sums.device)

    def totals(self, all_sum: Callable[[Tensor], Tensor]) -> StepTotals:
        """The step's sums over all ranks (`all_sum` adds a tensor up over them); ready for the next step."""
        sums, self.sums = all_sum(self.sums), self.zeros.clone()
        return StepTotals(dict(zip(SUMS + COUNTS, sums.tolist(), strict=True)))
