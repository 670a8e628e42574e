"""One optimizer step: gradients of its micro-batches added up as sums, then scaled, clipped and applied by AdamW."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from mmrm_fast.config import OptimizerConfig, TrainConfig
from mmrm_fast.data.packing import Packed
from mmrm_fast.model.experts import num_experts
from mmrm_fast.train import sharding
from mmrm_fast.train.branch import Branch
from mmrm_fast.train.loss import SAVE, StepAccumulator, margins, preference_loss, with_balance
from mmrm_fast.train.proxy import Proxy


@dataclass(frozen=True)
class Outcome:
    """What a step came to, the same on every rank but for `sources`."""

    metrics: dict
    is_finite: bool  # otherwise nothing was applied
    num_errors: int  # images that could not be decoded
    save_asked: bool
    sources: list[str]  # where this rank's records came from


class Steps:
    """The branches' optimizer and what of a step is added up so far."""

    def __init__(self, branches: list[Branch], proxy: Proxy, config: TrainConfig, device: torch.device):
        if config.loss.router_aux_loss and not num_experts(branches[0].root):
            raise ValueError(f"--router-aux-loss: {config.weights.model} has no experts")
        self.branches, self.proxy, self.config, self.device = branches, proxy, config, device
        self.named = [{f"{branch.name}.{name}": p for name, p in branch.trained().items()} for branch in branches]
        self.parameters = [list(named.values()) for named in self.named]
        named = [pair for own in self.named for pair in own.items()]
        self.optimizer = make_optimizer(named, config.optimizer, fused=sharding.offloads(device, config.memory))
        self.accumulator = StepAccumulator(device)
        self.sources: list[list[str]] = []  # of this rank's records, by micro-batch

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name; the tensors themselves, not copies. Frozen weights are not among it."""
        named = {name: parameter for branch in self.named for name, parameter in branch.items()}
        tensors = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
        for name, parameter in named.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        return tensors

    def add(self, packed: Packed, step: int) -> None:
        """Forward and backward of one micro-batch of step number `step`, gradients as sums over pairs.

        The proxy's pass is over before the model's begins, so that the activations of one branch are held at a time.
        """
        config, batch = self.config.loss, packed.batch.to(self.device)
        place = (self.config.run.seed, step, len(self.sources), sharding.rank())  # all that dropout depends on
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 1)
        if self.config.memory.hold_gradients:
            for branch in self.branches:
                sharding.reduce_gradients(branch.root, packed.step is not None)
        proxy_margin_P = self.proxy.margins(self.branches, packed, batch)
        rewards, balance = self.branches[0].balanced(batch.main, batch.tiles, factor=config.router_aux_loss)
        loss = preference_loss(
            rewards, proxy_margin_P, batch, sfc_mode=config.sfc_mode, label_smoothing=config.label_smoothing,
            centering=config.center_rewards,
        )  # fmt: skip
        loss = with_balance(loss, config.router_aux_loss, balance, config.sfc_mode)
        loss.main.backward()
        self.accumulator.add(loss, margins(rewards.detach(), batch), packed.batch, len(packed.errors), balance)
        self.sources.append([sample.group.source for sample in packed.samples])

    def apply(self, share: float) -> Outcome:
        """Scale, clip and apply the added-up gradients, unless they are not finite; `share` of the training is done."""
        config, optimizer = self.config, self.config.optimizer
        totals = self.accumulator.totals()
        metrics = totals.metrics() | (totals.sfc_metrics() if config.proxy.robust else {})
        if config.loss.router_aux_loss:
            metrics["router_loss"] = totals.sums["router"] / (totals.sums["weight"] or 1.0)
        scales = totals.gradient_scales(config.loss.sfc_mode if config.proxy.robust else "standard")
        norms = gradient_norms(self.parameters, scales)
        metrics |= dict(zip(("grad_norm", "proxy_grad_norm"), norms, strict=False))
        metrics["lr"] = optimizer.lr * lr_factor(share, optimizer.warmup_ratio, optimizer.lr_schedule)
        is_finite = all(map(math.isfinite, (metrics["loss"], *norms)))
        if is_finite:
            scale_and_clip(
                self.parameters, scales, norms, max_norm=optimizer.max_grad_norm, joint=optimizer.clip == "joint"
            )
            for group in self.optimizer.param_groups:
                group["lr"] = metrics["lr"]
            self.optimizer.step()
        self.optimizer.zero_grad()
        sources, self.sources = [source for micro in self.sources for source in micro], []
        return Outcome(metrics, is_finite, int(totals.sums["errors"]), totals.sums[SAVE] > 0, sources)


def make_optimizer(
    named: list[tuple[str, Parameter]], config: OptimizerConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW over all branches; biases, of experts too, and norms do not decay. Its state is there from the start."""
    decayed = {p: p.ndim > 1 and not name.endswith("bias") for name, p in named}
    groups = [
        {"params": [p for p, decays in decayed.items() if decays == group], "weight_decay": group * config.weight_decay}
        for group in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused or None)
    for parameter in decayed:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def lr_factor(share: float, warmup_ratio: float, schedule: str = "cosine") -> float:
    """Learning rate over its peak when `share` (0 to 1) of the training is done: linear warm-up, then the schedule."""
    if share < warmup_ratio:
        return share / warmup_ratio
    if schedule == "constant":
        return 1.0
    left = (1 - share) / (1 - warmup_ratio)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def gradient_norms(branches: list[list[Parameter]], scales: tuple[float, ...]) -> list[float]:
    """Each branch's gradient norm after multiplication by its scale."""
    norms = [torch.nn.utils.get_total_norm(gradients(parameters)) for parameters in branches]
    return [float(sharding.full_value(norm)) * scale for norm, scale in zip(norms, scales, strict=False)]


def scale_and_clip(
    branches: list[list[Parameter]], scales: tuple[float, ...], norms: list[float], *, max_norm: float, joint: bool
) -> None:
    """Multiply each branch's gradients by its scale and clip them to `max_norm`, each by its own norm or `joint`ly."""
    limits = [math.hypot(*norms)] * len(norms) if joint else norms
    for parameters, scale, limit in zip(branches, scales, limits, strict=False):
        torch._foreach_mul_(gradients(parameters), scale * min(1.0, max_norm / (limit + 1e-6)))


def gradients(parameters: list[Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
