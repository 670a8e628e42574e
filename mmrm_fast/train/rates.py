"""Figures of a step that come from its time: throughput, memory, utilisation."""

import resource
from operator import mul
from typing import Any

import torch

from mmrm_fast.model.experts import EXPERTS, expert_share
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.train.sharding import num_ranks

PEAK_FLOPS = {  # dense bf16, by the first part of a GPU's name that is listed here
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
}  # fmt: skip


class Rates:
    """What a step of some seconds comes to.

    Operations are those of matrix products with weights (attention's own are not counted): 2 a weight and token in the
    forward pass, as many for the gradient of the input and of a trained weight.

    Args:
        models: main model and, where there is one, proxy.
        tokens_per_tile: image tokens of a tile.
        device: what a rank runs on.
    """

    def __init__(self, models: list[RewardModel], tokens_per_tile: int, device: torch.device):
        self.text = [pass_flops(model.model.language_model.layers, expert_share(model)) for model in models]
        tower = models[0].model.vision_tower
        self.tile = (4 * tokens_per_tile + 1) * pass_flops(tower.encoder) if tower else 0
        self.device, self.peak = device, peak_flops(device)

    def __call__(self, row: dict[str, Any], seconds: float) -> dict[str, float]:
        """The figures of a step with the counts of `row`."""
        flops = self.flops(row["tokens"], row["text_tokens"], row["tiles"])
        utilisation = {"mfu": flops / seconds / (self.peak * num_ranks())} if self.peak else {}
        return {
            "seconds": seconds,
            "sharing": row["tokens_unshared"] / max(row["tokens"], 1),
            "tokens_per_second": row["tokens"] / seconds,
            "flops_per_second": flops / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            **utilisation,
        }

    def flops(self, tokens: float, text_tokens: float, tiles: float) -> float:
        """Operations in all passes of all models over so many tokens, of the proxy's text, and tiles."""
        return sum(map(mul, self.text, (tokens, text_tokens))) + self.tile * tiles


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second of a GPU; None of what is not listed, and of a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def pass_flops(part: torch.nn.Module, share: float = 1.0) -> float:
    """Operations a token in all passes of a part, through a share of its experts."""
    weights = [
        (p.numel() * (share if EXPERTS in name else 1), p.requires_grad)
        for name, p in part.named_parameters()
        if p.ndim > 1
    ]
    trained = sum(number for number, is_trained in weights if is_trained)
    total = sum(number for number, _ in weights)
    return 2 * total + (2 * total + 2 * trained if trained else 0)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has had: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
