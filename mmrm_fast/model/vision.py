"""Tiles to image tokens: transformers' vision tower and projector, with a faster attention and an exact norm.

Shapes: I tiles, S pixels a tile side, T the class token and the patches of a tile, C vision hidden size, D hidden size.
"""

import math

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, InternVLConfig, InternVLModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmrm_fast.ops.trie_attention import has_native, trie_attention

NAME = "mmrm_tiles"


def tower_output(model: InternVLModel, tiles_ISSC: Tensor, mean: tuple, std: tuple) -> Tensor:
    """Hidden states [I, T, C], CLS first, of the vision layer that the config picks; none behind it runs."""
    tower, layer = model.vision_tower, model.config.vision_feature_layer
    pixels = normalized(tiles_ISSC, mean, std, tower.dtype)
    if layer == -1:
        return tower(pixels).last_hidden_state
    hidden = tower.embeddings(pixels)
    for block in tower.encoder.layer[: layer + 1 + len(tower.encoder.layer) if layer < 0 else layer]:
        hidden = block(hidden)
    return hidden


def project(model: InternVLModel, hidden_ITC: Tensor) -> Tensor:
    """Image tokens [I * tokens_per_tile, D] of the vision tower's output."""
    side = math.isqrt(hidden_ITC.shape[1] - 1)
    grid = hidden_ITC[:, 1:].unflatten(1, (side, side))
    return model.multi_modal_projector(model.pixel_shuffle(grid, model.config.downsample_ratio).flatten(0, 2))


def normalized(tiles_ISSC: Tensor, mean: tuple, std: tuple, dtype: torch.dtype) -> Tensor:
    """uint8 tiles to `(x / 255 - mean) / std`, [I, 3, S, S]; computed in float32 at least."""
    exact, device = torch.promote_types(dtype, torch.float32), tiles_ISSC.device
    mean_C, std_C = (torch.tensor(values, dtype=exact).to(device, non_blocking=True) for values in (mean, std))
    return ((tiles_ISSC.to(exact) / 255 - mean_C) / std_C).permute(0, 3, 1, 2).to(dtype)


class ExactLayerNorm(nn.LayerNorm):
    """In float32 at least: a CPU sums a bfloat16 weight's gradient in bfloat16, wrong by per cents."""

    def forward(self, rows: Tensor) -> Tensor:
        exact = torch.promote_types(rows.dtype, torch.float32)
        statistics = (self.normalized_shape, self.weight.to(exact), self.bias.to(exact), self.eps)
        return nn.functional.layer_norm(rows.to(exact), *statistics).to(rows.dtype)


def use_exact_norm(model: InternVLModel) -> bool:
    """Let the projector's norm be `ExactLayerNorm`; False where it is another norm."""
    norm = model.multi_modal_projector.layer_norm
    if not isinstance(norm, nn.LayerNorm):
        return False
    norm.__class__ = ExactLayerNorm
    return True


def use_tile_attention(model: InternVLModel) -> bool:
    """Let the vision tower attend by `tile_attention_forward`."""
    AttentionInterface.register(NAME, tile_attention_forward)
    model.vision_tower.set_attn_implementation(NAME)
    return True


def tile_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """Every patch over its own tile's: `trie_attention` where it has a C++ kernel, torch's SDPA elsewhere.

    q, k, v are [I, heads, L, E]: I tiles of L patches.
    """
    num_tiles, _, length, size = query.shape
    if query.device.type != "cpu" or not has_native(query.dtype, size) or kwargs.get("dropout"):
        kwargs["is_causal"] = False
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    edges = length * torch.arange(num_tiles + 1, dtype=torch.int32)
    out = trie_attention(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        cu_seqlens_q=edges, kv_index=torch.arange(num_tiles * length), cu_seqlens_k=edges,
        max_seqlen_q=length, max_seqlen_k=length, scale=scaling, causal=False,
    )  # fmt: skip
    return out.unflatten(0, (num_tiles, length)), None


def check_vision(config: InternVLConfig) -> None:
    """Raise `ValueError` unless this module computes what this config's vision part means."""
    vision = config.vision_config
    layer, depth = config.vision_feature_layer, vision.num_hidden_layers
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise ValueError(f"vision_feature_layer must be one layer of {depth}, got {layer!r}")
    if (strategy := config.vision_feature_select_strategy) != "default":
        raise ValueError(f"vision_feature_select_strategy must be 'default', got {strategy!r}")
    if vision.num_channels != 3:
        raise ValueError(f"num_channels must be 3, got {vision.num_channels}")
    for name, (height, width) in (("image_size", vision.image_size), ("patch_size", vision.patch_size)):
        if height != width:
            raise ValueError(f"{name} must be square, got {height} x {width}")
    side, patch = vision.image_size[0], vision.patch_size[0]
    if side % patch or (side // patch * config.downsample_ratio) % 1:
        multiple = f"{1 / config.downsample_ratio:g} patches of {patch} pixels"
        raise ValueError(f"image_size must be a multiple of {multiple}, got {side}")
