"""The reward model: InternVL without its vocabulary head, and a score read at each response's last token.

Shapes: T packed tokens, R responses, I tiles, S pixels a tile side, D hidden size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLModel

from mmrm_fast.data.packing import TokenPlan
from mmrm_fast.model.decoder import packed_hidden
from mmrm_fast.model.self_check import prepare
from mmrm_fast.model.vision import check_vision, project, tower_output
from mmrm_fast.ops.pack_image_tokens import pack_image_tokens

Head = Callable[[Tensor, Tensor], Tensor]


class RewardModel(nn.Module):
    """Rewards of a packed batch.

    Args:
        model: transformers' native `InternVLModel`; without its vision part (`drop_vision`) it reads text alone.
        pixel_mean, pixel_std: of the image normalisation, one a channel, for pixels in 0..1.
    """

    def __init__(self, model: InternVLModel, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]):
        super().__init__()
        check_vision(model.config)
        self.model = model
        hidden_size = model.config.text_config.hidden_size
        self.score = ScoreHead(hidden_size, torch.promote_types(model.dtype, torch.float32))
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.is_transposed = original_facts(model.config).get("ps_version") == "v1"
        self.register_buffer("only_tiles", None, persistent=False)  # the vision tower's output, see `keep_only`
        self.reads_last_tokens = prepare(model)

    def forward(self, plan: TokenPlan, tiles_ISSC: Tensor | None = None, *, head: Head | None = None) -> Tensor:
        """Rewards [R] of the plan's responses, in fp32 (float64 for float64 models).

        uint8 tiles are None for a plan without image tokens; `head` reads (hidden [T, D], last tokens [R]) in the
        score's place.
        """
        return self.read(head or self.score, plan, tiles_ISSC)

    def read(self, head: Head, plan: TokenPlan, tiles_ISSC: Tensor | None) -> Tensor:
        """What a score head reads [R] of the plan's last tokens."""
        embedding = self.model.get_input_embeddings().weight
        features = embedding.detach()[:0] if tiles_ISSC is None or self.is_text else self.image_features(tiles_ISSC)
        embeds = pack_image_tokens(embedding, features, plan.source_T, plan.source_index)
        hidden = packed_hidden(self.model.language_model, embeds, plan)
        return head(hidden, plan.read_row_R if self.reads_last_tokens else plan.last_index_R)

    def heads(self) -> list[nn.Module]:
        """The score heads."""
        return [self.score]

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in order: vision layers, then decoder layers."""
        tower = self.model.vision_tower
        return [*(tower.encoder.layer if tower is not None else ()), *self.model.language_model.layers]

    def image_features(self, tiles_ISSC: Tensor) -> Tensor:
        """Projected image tokens [I * tokens_per_tile, D] of uint8 tiles."""
        return self.project(self.tower_output(tiles_ISSC) if self.only_tiles is None else self.only_tiles)

    def tower_output(self, tiles_ISSC: Tensor) -> Tensor:
        """The vision tower's hidden states [I, 1 + patches, vision hidden] of the layer that the config picks."""
        return tower_output(self.model, tiles_ISSC, self.pixel_mean, self.pixel_std)

    def project(self, hidden_ITC: Tensor) -> Tensor:
        """Image tokens [I * tokens_per_tile, D] of the vision tower's output."""
        features = project(self.model, hidden_ITC.to(self.model.multi_modal_projector.layer_norm.weight.dtype))
        if self.is_transposed:
            side = math.isqrt(len(features) // len(hidden_ITC))
            features = features.unflatten(0, (-1, side, side)).transpose(1, 2).flatten(0, 2)
        return features

    @torch.no_grad()
    def keep_only(self, tiles_ISSC: Tensor) -> None:
        """Run the vision tower once, on the only tiles that this model will ever see."""
        self.register_buffer("only_tiles", self.tower_output(tiles_ISSC), persistent=False)

    @property
    def is_text(self) -> bool:
        """Whether it reads text alone."""
        return self.model.multi_modal_projector is None

    def drop_vision(self) -> "RewardModel":
        """Remove vision tower and projector: what is left reads text alone."""
        self.model.vision_tower = self.model.multi_modal_projector = None
        return self


class ScoreHead(nn.Module):
    """The bias-free score, read at the last tokens."""

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(new_score(hidden_size).to(dtype))

    def forward(self, hidden_TD: Tensor, last_index_R: Tensor) -> Tensor:
        """Rewards [R] in the weight's dtype."""
        return hidden_TD[last_index_R].to(self.weight.dtype) @ self.weight[0]


def new_score(hidden_size: int) -> Tensor:
    """A score's first weight [1, D]: normal with standard deviation 1 / (D + 1), in fp32."""
    return torch.randn(1, hidden_size, dtype=torch.float32) / (hidden_size + 1)


def original_facts(config: InternVLConfig) -> dict:
    """What a native config remembers of an original one: the LLM's architecture, template, ps_version."""
    return getattr(config, "internvl_chat", None) or {}
