"""The optimizer's side of a step: AdamW, learning rate and clipping."""

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from mmrm_fast.config import OptimizerConfig
from mmrm_fast.train.sharding import full_value


def make_optimizer(parameters: list[Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all branches; biases and norms do not decay. Its state is there from the start."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))
    for parameter in parameters:
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
    return [float(full_value(norm)) * scale for norm, scale in zip(norms, scales, strict=False)]


def scale_and_clip(
    branches: list[list[Parameter]], scales: tuple[float, ...], norms: list[float], *, max_norm: float, joint: bool
) -> None:
    """Multiply each branch's gradients by its scale and clip them to `max_norm`, each by its own norm or `joint`ly."""
    limits = [math.hypot(*norms)] * len(norms) if joint else norms
    for parameters, scale, limit in zip(branches, scales, limits, strict=False):
        torch._foreach_mul_(gradients(parameters), scale * min(1.0, max_norm / (limit + 1e-6)))


def gradients(parameters: list[Parameter]) -> list[Tensor]:
    """The gradients that there are."""
    return [p.grad for p in parameters if p.grad is not None]
