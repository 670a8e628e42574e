"""Low-rank adapters (LoRA) on the linear layers of language model and vision tower, by peft's layers."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mmrm_fast.config import TrainConfig
from mmrm_fast.model import RewardModel, ScoreHead
from mmrm_fast.packing import TokenPlan

MAIN, PROXY = "main", "proxy"


class TwoAdapterModel(RewardModel):
    """Reward model and text-only proxy as two adapters and two score heads on one frozen language model.

    A branch's backward pass must end before the other's forward: layers recompute with the adapter of the last one.
    """

    def __init__(self, model: RewardModel):
        super().__init__(model.model, model.pixel_mean, model.pixel_std)
        self.score = model.score
        self.only_tiles = model.only_tiles
        self.proxy_score = ScoreHead(self.score.weight.shape[1], self.score.weight.dtype)

    def forward(self, plan: TokenPlan, tiles_ISSC: Tensor | None = None, *, branch: str = MAIN) -> Tensor:
        """Rewards [R] of one branch."""
        self.branch = branch
        activate(self.model.language_model, branch)
        head = self.score if branch == MAIN else self.proxy_score
        return self.read(head, plan, tiles_ISSC)

    def image_features(self, tiles_ISSC: Tensor) -> Tensor:
        """Image tokens; the proxy's white tile passes through the model's projector without training it."""
        if self.branch == MAIN:
            return self.project(self.tower_output(tiles_ISSC))
        return super().image_features(tiles_ISSC).detach()

    def heads(self) -> list[nn.Module]:
        return [self.score, self.proxy_score]


def add_lora(part: nn.Module, config: TrainConfig, name: str) -> None:
    """Freeze a language model or vision tower and add an adapter to each linear layer of its blocks.

    That is every target of the reference implementation; query, key and value get an adapter each where it has one
    for all three. Adapters are fp32.
    """
    blocks = part.encoder.layer if hasattr(part, "encoder") else part.layers
    targets = {
        key.removesuffix(".base_layer").rpartition(".")[2]
        for key, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in key
    }
    lora = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=sorted(targets)
    )
    part.requires_grad_(False)
    inject_adapter_in_model(lora, part, adapter_name=name)
    for key, parameter in part.named_parameters():
        if ".lora_" in key:  # peft lets only the last adapter train
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def activate(language_model: nn.Module, name: str) -> None:
    """Compute with one adapter (peft's own `set_adapter` would also freeze the others)."""
    for module in language_model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [name]


def merged(state: dict[str, Tensor], name: str, scale: float) -> dict[str, Tensor]:
    """The weights of a plain model: one adapter added in, W + scale * B A, in fp32, the others left out.

    Args:
        state: whole weights by name; weights without an adapter are passed on.
        name: the adapter.
        scale: `lora_alpha / lora_r`.
    """
    plain = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        layer, found, rest = key.partition(".base_layer.")
        down = state.get(f"{layer}.lora_A.{name}.weight")
        if found and rest == "weight" and down is not None:
            up = state[f"{layer}.lora_B.{name}.weight"]
            value = torch.addmm(value.float(), up.float(), down.float(), alpha=scale)
        plain[f"{layer}.{rest}" if found else key] = value
    return plain
