"""The reward model: InternVL without its vocabulary head, and a score read at each response's last token.

Shapes: T packed tokens, R responses, I tiles, S pixels a tile side, D hidden size.
"""

import math

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLModel

from mmrm_fast.data.packing import TokenPlan
from mmrm_fast.model.attention import read_last_tokens, use_tile_attention, use_trie_attention
from mmrm_fast.model.mlp import use_gated_product
from mmrm_fast.model.rope import use_own_length_rope
from mmrm_fast.ops.pack_image_tokens import pack_image_tokens
from mmrm_fast.ops.patchify import patchify
from mmrm_fast.ops.pixel_shuffle_norm import pixel_shuffle_norm


class RewardModel(nn.Module):
    """Rewards of a packed batch.

    Args:
        model: transformers' native `InternVLModel`; without a vision tower (`drop_vision`) it is a text-only proxy.
        pixel_mean, pixel_std: of the image normalisation, one a channel, for pixels in 0..1.
    """

    def __init__(self, model: InternVLModel, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]):
        super().__init__()
        check_vision(model.config)
        hidden_size = model.config.text_config.hidden_size
        self.model = model
        self.score = ScoreHead(hidden_size, score_dtype(model.dtype))
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.num_vision_layers = num_vision_layers(model.config)
        self.is_transposed = original_facts(model.config).get("ps_version") == "v1"
        self.register_buffer("only_tiles", None, persistent=False)  # the vision tower's output, see `keep_only`
        use_trie_attention(model.language_model)
        use_own_length_rope(model.language_model)
        use_gated_product(model.language_model)
        use_tile_attention(model.vision_tower)
        self.reads_last_tokens = read_last_tokens(model.language_model)

    def forward(self, plan: TokenPlan, tiles_ISSC: Tensor | None = None) -> Tensor:
        """Rewards [R] of the plan's responses, in fp32 (float64 for float64 models).

        Args:
            plan: the packed tokens of one branch.
            tiles_ISSC: the batch's tiles, uint8; None for a plan without image tokens.
        """
        return self.read(self.score, plan, tiles_ISSC)

    def read(self, head: nn.Module, plan: TokenPlan, tiles_ISSC: Tensor | None) -> Tensor:
        """What a score head reads [R] of the plan's last tokens."""
        embedding = self.model.get_input_embeddings().weight
        features = embedding.detach()[:0] if tiles_ISSC is None else self.image_features(tiles_ISSC)
        hidden = self.model.language_model(
            inputs_embeds=pack_image_tokens(embedding, features, plan.source_T, plan.source_index).unsqueeze(0),
            position_ids=plan.rope_positions(),
            use_cache=False,
            **plan.attention_plan(),
        ).last_hidden_state[0]
        return head(hidden, plan.read_row_R if self.reads_last_tokens else plan.last_index_R)

    def heads(self) -> list[nn.Module]:
        """The score heads."""
        return [self.score]

    def image_features(self, tiles_ISSC: Tensor) -> Tensor:
        """Projected image tokens [I * tokens_per_tile, D] of uint8 tiles."""
        return self.project(self.tower_output(tiles_ISSC) if self.only_tiles is None else self.only_tiles)

    def tower_output(self, tiles_ISSC: Tensor) -> Tensor:
        """The vision tower's hidden states [I, 1 + patches, vision hidden] of the layer that the config picks."""
        tower = self.model.vision_tower
        hidden = self.embed_tiles(tiles_ISSC)
        for layer in tower.encoder.layer[: self.num_vision_layers]:
            hidden = layer(hidden)
        return tower.layernorm(hidden) if self.model.config.vision_feature_layer == -1 else hidden

    def project(self, hidden_ITC: Tensor) -> Tensor:
        """Image tokens [I * tokens_per_tile, D] of the vision tower's output."""
        projector = self.model.multi_modal_projector
        rows = self.shuffled_rows(hidden_ITC.to(projector.layer_norm.weight.dtype))
        if self.is_transposed:
            side = math.isqrt(len(rows) // len(hidden_ITC))
            rows = rows.unflatten(0, (-1, side, side)).transpose(1, 2).flatten(0, 2)
        return projector.linear_2(projector.act(projector.linear_1(rows)))

    def shuffled_rows(self, hidden_ITC: Tensor) -> Tensor:
        """The projector's normalised input [I * tokens_per_tile, C / ratio^2] of the tower's output, CLS first."""
        ratio, norm = self.model.config.downsample_ratio, self.model.multi_modal_projector.layer_norm
        if ratio == 0.5:
            return pixel_shuffle_norm(hidden_ITC, norm.weight, norm.bias, eps=norm.eps)
        side = math.isqrt(hidden_ITC.shape[1] - 1)
        grid = hidden_ITC[:, 1:].unflatten(1, (side, side))
        return norm(self.model.pixel_shuffle(grid, ratio).flatten(0, 2))

    @torch.no_grad()
    def keep_only(self, tiles_ISSC: Tensor) -> None:
        """Run the vision tower once, on the only tiles that this model will ever see."""
        self.register_buffer("only_tiles", self.tower_output(tiles_ISSC), persistent=False)

    def embed_tiles(self, tiles_ISSC: Tensor) -> Tensor:
        """The vision encoder's input [I, 1 + patches, vision hidden], CLS first; the patch embedding is a product."""
        embeddings = self.model.vision_tower.embeddings
        projection = embeddings.patch_embeddings.projection
        num_tiles, side = tiles_ISSC.shape[:2]
        rows = patchify(
            tiles_ISSC, self.pixel_mean, self.pixel_std,
            patch_size=projection.kernel_size[0], dtype=projection.weight.dtype,
        )  # fmt: skip
        patches = nn.functional.linear(rows, projection.weight.flatten(1), projection.bias)
        hidden = torch.cat([embeddings.cls_token.expand(num_tiles, -1, -1), patches.unflatten(0, (num_tiles, -1))], 1)
        if embeddings.position_embeddings is not None:
            hidden = hidden + embeddings.interpolate_pos_encoding(hidden, side, side)
        return embeddings.dropout(hidden)

    def drop_vision(self) -> "RewardModel":
        """Remove vision tower and projector: a text-only proxy."""
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


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Rewards are fp32 whatever the model computes in, float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_vision_layers(config: InternVLConfig) -> int:
    """Vision layers that run: those before the hidden state that `vision_feature_layer` picks."""
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return layer + 1 + depth if layer < 0 else layer


def original_facts(config: InternVLConfig) -> dict:
    """What a native config remembers of an original one: the LLM's architecture, template, ps_version."""
    return getattr(config, "internvl_chat", None) or {}


def check_vision(config: InternVLConfig) -> None:
    """Raise `ValueError` unless `RewardModel.image_features` computes what this model's vision part means."""
    vision = config.vision_config
    layer, depth = config.vision_feature_layer, vision.num_hidden_layers
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise ValueError(f"vision_feature_layer must be one layer of {depth}, got {layer!r}")
    for name, value, supported in (
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default"),
        ("num_channels", vision.num_channels, 3),
    ):
        if value != supported:
            raise ValueError(f"{name} must be {supported!r}, got {value!r}")
    for name, (height, width) in (("image_size", vision.image_size), ("patch_size", vision.patch_size)):
        if height != width:
            raise ValueError(f"{name} must be square, got {height} x {width}")
    side, patch = vision.image_size[0], vision.patch_size[0]
    if side % patch or (side // patch * config.downsample_ratio) % 1:
        raise ValueError(
            f"image_size must be a multiple of {1 / config.downsample_ratio:g} patches of {patch} pixels, got {side}"
        )
