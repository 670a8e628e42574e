"""The reward model: InternVL without its vocabulary head, and a score read at each response's last token.

Shapes: T packed tokens, R responses, I tiles, S pixels a tile side, D hidden size.
"""

import torch
from torch import Tensor, nn
from transformers import InternVLModel

from mmrm_fast.attention import use_trie_attention
from mmrm_fast.packing import TokenPlan


class RewardModel(nn.Module):
    """Rewards of a packed batch.

    Args:
        model: transformers' native `InternVLModel`; without a vision tower (`drop_vision`) it is a text-only proxy.
        pixel_mean, pixel_std: of the image normalisation, one a channel, for pixels in 0..1.
    """

    def __init__(self, model: InternVLModel, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]):
        super().__init__()
        hidden_size = model.config.text_config.hidden_size
        self.model = model
        self.score = ScoreHead(hidden_size, score_dtype(model.dtype))
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        use_trie_attention(model.language_model)

    def forward(self, plan: TokenPlan, tiles_ISSC: Tensor | None = None) -> Tensor:
        """Rewards [R] of the plan's responses, in fp32 (float64 for float64 models).

        Args:
            plan: the packed tokens of one branch.
            tiles_ISSC: the batch's tiles, uint8; None for a plan without image tokens.
        """
        embedding = self.model.get_input_embeddings().weight
        features = embedding[:0] if tiles_ISSC is None else self.image_features(tiles_ISSC)
        hidden = self.model.language_model(
            inputs_embeds=pack_image_tokens(embedding, features, plan.source_T).unsqueeze(0),
            position_ids=plan.position_ids_T.unsqueeze(0),
            use_cache=False,
            **plan.attention_plan(),
        ).last_hidden_state[0]
        return self.score(hidden, plan.last_index_R)

    def image_features(self, tiles_ISSC: Tensor) -> Tensor:
        """Projected image tokens [I * tokens_per_tile, D] of uint8 tiles."""
        pixels = normalize(tiles_ISSC, self.pixel_mean, self.pixel_std, self.model.dtype)
        return self.model.get_image_features(pixels).pooler_output.flatten(0, 1)

    def drop_vision(self) -> "RewardModel":
        """Remove vision tower and projector: a text-only proxy."""
        self.model.vision_tower = self.model.multi_modal_projector = None
        return self


class ScoreHead(nn.Module):
    """The bias-free score: normal with standard deviation 1 / (hidden_size + 1), read at the last tokens."""

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, hidden_size, dtype=dtype) / (hidden_size + 1))

    def forward(self, hidden_TD: Tensor, last_index_R: Tensor) -> Tensor:
        """Rewards [R] in the weight's dtype."""
        return reward_head(hidden_TD, last_index_R, self.weight)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Rewards are fp32 whatever the model computes in, float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(tiles_ISSC: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 tiles to `(x / 255 - mean) / std`, [I, 3, S, S] in `dtype`."""
    exact = score_dtype(dtype)
    mean_C, std_C = (torch.tensor(values, dtype=exact, device=tiles_ISSC.device) for values in (mean, std))
    return ((tiles_ISSC.to(exact) / 255 - mean_C) / std_C).permute(0, 3, 1, 2).to(dtype)


def pack_image_tokens(embedding_VD: Tensor, features_FD: Tensor, source_T: Tensor) -> Tensor:
    """The packed stream [T, D]: embedding row `source` where it is >= 0, feature row `-1 - source` elsewhere.

    Features that nothing reads still get a (zero) gradient, so that every rank's backward runs the same modules.
    """
    is_image = source_T < 0
    stream = torch.nn.functional.embedding(source_T.clamp(min=0), embedding_VD)
    return stream.index_put((is_image.nonzero()[:, 0],), features_FD[-1 - source_T[is_image]].to(stream.dtype))


def reward_head(hidden_TD: Tensor, last_index_R: Tensor, score_weight: Tensor) -> Tensor:
    """Score of each response's last token [R], multiplied and summed in the weight's dtype."""
    return hidden_TD[last_index_R].to(score_weight.dtype) @ score_weight[0]
