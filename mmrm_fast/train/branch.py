"""A reward that a training trains: a model, or one of two adapters of a model."""

from dataclasses import dataclass

from torch import Tensor, nn

from mmrm_fast.checkpoint.folder import Checkpoint, CheckpointFolder
from mmrm_fast.config import WeightsConfig
from mmrm_fast.data.packing import TokenPlan
from mmrm_fast.model.experts import balance_loss, experts_of_a_token, routing
from mmrm_fast.model.lora import MAIN, PROXY, add_lora, merged
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.train import sharding


@dataclass(frozen=True)
class Branch:
    """One reward that is trained, as a function of its tokens (and tiles)."""

    name: str
    root: RewardModel  # both branches' where they are adapters of one model
    checkpoint: Checkpoint  # whose folder format its weights are saved in
    folder: CheckpointFolder
    lora_scale: float

    def __call__(self, plan: TokenPlan, tiles_ISSC: Tensor | None = None) -> Tensor:
        """Rewards [R]."""
        return self.root(plan, tiles_ISSC)

    def balanced(self, plan: TokenPlan, tiles_ISSC: Tensor | None, *, factor: float) -> tuple[Tensor, Tensor | None]:
        """Rewards [R], and the load-balancing loss of their routing: 0 without experts, None for a factor of 0."""
        if not factor:
            return self(plan, tiles_ISSC), None
        with routing(self.root.model.language_model) as logits:
            rewards = self(plan, tiles_ISSC)
        if not logits:
            return rewards, rewards.new_zeros(())
        return rewards, balance_loss(logits, experts_of_a_token(self.root))

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train for this reward, by name."""
        return {name: p for name, p in self.root.named_parameters() if p.requires_grad and self.owns(name)}

    def owns(self, name: str) -> bool:
        """Whether a parameter of the root is this branch's."""
        return True

    def state(self) -> dict[str, Tensor]:
        """The weights of a plain model, adapters merged, whole on the first rank. Called on every rank."""
        return merged(sharding.full_state(self.root), MAIN, self.lora_scale)


class AdapterBranch(Branch):
    """One of two adapters, with their score heads, on one model."""

    def __call__(self, plan: TokenPlan, tiles_ISSC: Tensor | None = None) -> Tensor:
        return self.root(plan, tiles_ISSC, branch=self.name)

    def owns(self, name: str) -> bool:
        return (name.startswith("proxy_score.") or f".{PROXY}." in name) == (self.name == PROXY)

    def state(self) -> dict[str, Tensor]:
        plain = merged(sharding.full_state(self.root), self.name, self.lora_scale)
        proxy_score = plain.pop("proxy_score.weight", None)
        if self.name == MAIN or not plain:
            return plain
        text_only = {name: value for name, value in plain.items() if name.startswith("model.language_model.")}
        return {**text_only, "score.weight": proxy_score}


def add_adapters(model: RewardModel, weights: WeightsConfig) -> None:
    if weights.llm_lora:
        add_lora(model.model.language_model, weights, MAIN)
    if weights.vision_lora and model.model.vision_tower is not None:
        add_lora(model.model.vision_tower, weights, MAIN)


def freeze(model: RewardModel, weights: WeightsConfig) -> None:
    parts = ("language_model", "vision_tower", "multi_modal_projector")
    for name, frozen in zip(parts, (weights.freeze_llm, weights.freeze_backbone, weights.freeze_mlp), strict=True):
        part = getattr(model.model, name)
        if part is not None:
            part.requires_grad_(not frozen)


def train_mode(model: RewardModel) -> None:
    """Train what is trained; frozen parts stay in evaluation mode, without noise."""
    model.train()
    for part in (model.model.language_model, model.model.vision_tower, model.model.multi_modal_projector):
        if part is not None and not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()
