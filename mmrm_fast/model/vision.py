"""Tiles to image tokens: transformers' vision tower and projector, without what nothing reads, or by their own forward.

Shapes: I tiles, S pixels a tile side, T the class token and the patches of a tile, C vision hidden size, D hidden size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, InternVLConfig, InternVLModel, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmrm_fast.ops.trie_attention import has_native, trie_attention

NAME = "mmrm_tiles"


class VisionPath(NamedTuple):
    """A way to compute image tokens, over a transformers model."""

    tower_output: Callable[..., Tensor]  # (model, tiles [I, S, S, 3] uint8, mean, std) -> [I, T, C], CLS first
    project: Callable[[InternVLModel, Tensor], Tensor]  # (model, [I, T, C]) -> [I * tokens_per_tile, D]


def tower_output(model: InternVLModel, tiles_ISSC: Tensor, mean: tuple, std: tuple) -> Tensor:
    """The vision tower's hidden states of the layer that the config picks; those behind it are not run."""
    tower = model.vision_tower
    hidden = tower.embeddings(normalized(tiles_ISSC, mean, std, tower.dtype))
    for layer in tower.encoder.layer[: num_layers(model.config)]:
        hidden = layer(hidden)
    return tower.layernorm(hidden) if model.config.vision_feature_layer == -1 else hidden


def project(model: InternVLModel, hidden_ITC: Tensor) -> Tensor:
    """Image tokens of the vision tower's output."""
    projector = model.multi_modal_projector
    rows = exact_layer_norm(projector.layer_norm, shuffled(model, hidden_ITC))
    return projector.linear_2(projector.act(projector.linear_1(rows)))


def exact_layer_norm(norm: nn.LayerNorm, rows: Tensor) -> Tensor:
    """`norm(rows)` in float32 at least: a CPU sums a bfloat16 weight's gradient in bfloat16, wrong by per cents."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    statistics = (norm.normalized_shape, norm.weight.to(exact), norm.bias.to(exact), norm.eps)
    return nn.functional.layer_norm(rows.to(exact), *statistics).to(rows.dtype)


def shuffled(model: InternVLModel, hidden_ITC: Tensor) -> Tensor:
    """The patches of the vision tower's output, folded: [I * tokens_per_tile, C / ratio^2]."""
    side = math.isqrt(hidden_ITC.shape[1] - 1)
    grid = hidden_ITC[:, 1:].unflatten(1, (side, side))
    return model.pixel_shuffle(grid, model.config.downsample_ratio).flatten(0, 2)


def plain_tower_output(model: InternVLModel, tiles_ISSC: Tensor, mean: tuple, std: tuple) -> Tensor:
    """`tower_output` by transformers' own forward."""
    layer = model.config.vision_feature_layer
    pixels = normalized(tiles_ISSC, mean, std, model.vision_tower.dtype)
    outputs = model.vision_tower(pixels, output_hidden_states=layer != -1)
    return outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]


def plain_project(model: InternVLModel, hidden_ITC: Tensor) -> Tensor:
    """`project` by transformers' own forward."""
    return model.multi_modal_projector(shuffled(model, hidden_ITC))


def normalized(tiles_ISSC: Tensor, mean: tuple, std: tuple, dtype: torch.dtype) -> Tensor:
    """uint8 tiles to `(x / 255 - mean) / std`, [I, 3, S, S]; computed in float32 at least."""
    exact = torch.promote_types(dtype, torch.float32)
    mean_C, std_C = (
        torch.tensor(values, dtype=exact).to(tiles_ISSC.device, non_blocking=True) for values in (mean, std)
    )
    return ((tiles_ISSC.to(exact) / 255 - mean_C) / std_C).permute(0, 3, 1, 2).to(dtype)


OURS, PLAIN = VisionPath(tower_output, project), VisionPath(plain_tower_output, plain_project)


def use_tile_attention(vision_tower: PreTrainedModel) -> None:
    """Let a transformers vision tower attend by `tile_attention_forward`."""
    AttentionInterface.register(NAME, tile_attention_forward)
    vision_tower.set_attn_implementation(NAME)


def tile_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """Every patch over its own tile's: `trie_attention` where it has a C++ kernel, torch's SDPA elsewhere.

    q, k, v are [I, heads, L, E]: I tiles of L patches.
    """
    num_tiles, _, length, size = query.shape
    if query.device.type != "cpu" or not has_native(query.dtype, size) or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    edges = length * torch.arange(num_tiles + 1, dtype=torch.int32)
    out = trie_attention(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        cu_seqlens_q=edges,
        kv_index=torch.arange(num_tiles * length),
        cu_seqlens_k=edges,
        max_seqlen_q=length,
        max_seqlen_k=length,
        scale=scaling,
        causal=False,
    )
    return out.unflatten(0, (num_tiles, length)), None


def num_layers(config: InternVLConfig) -> int:
    """Vision layers that run: those before the hidden state that `vision_feature_layer` picks."""
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return layer + 1 + depth if layer < 0 else layer


def check_vision(config: InternVLConfig) -> None:
    """Raise `ValueError` unless this module computes what this config's vision part means."""
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
