"""What takes the place of transformers' modules, compared with them before it does, on a tiny random twin of the model.

A release that computes a layer otherwise must not change a reward in silence. A twin has its model's classes and two
layers of few heads, in fp32 on the CPU: a comparison takes a tenth of a second whatever the model's size and device,
needs none of its weights, and is made once a process for models of one kind.
"""

import copy
import json
import math
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLModel, PreTrainedConfig

from mmrm_fast.data.images import NORMALIZATION
from mmrm_fast.data.packing import plan_tokens
from mmrm_fast.model import decoder, vision

Change = Callable[[nn.Module], bool]  # of a model or its decoder, in place; False where there is nothing to change

VISION_CHANGES: tuple[Change, ...] = (vision.use_tile_attention, vision.use_exact_norm)
DECODER_CHANGES: tuple[Change, ...] = (decoder.use_gated_product, decoder.read_last_tokens)
BOUND = 1e-4  # of the largest value
LAYERS, HEADS, WIDTH, VOCABULARY = 2, 2, 32, 16
SHORT = 6  # tokens after which a RoPE that knows lengths changes, and of a window
EXPERTS = 4
SMALL = {
    "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": WIDTH,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "sliding_window": SHORT, "attention_chunk_size": SHORT, "floor_scale": SHORT,
}  # fmt: skip
PROMPT = np.arange(40) % VOCABULARY  # long enough to be shared
SEQUENCES = [PROMPT[:5], *(np.append(PROMPT, np.arange(count) + count) for count in (0, 3, 6))]


def prepare(model: InternVLModel) -> bool:
    """Let a model compute packed batches, by those changes of `vision` and `decoder` that leave what it computes.

    Returns:
        whether its decoder returns the tokens that are read alone.

    Raises:
        ValueError: the model computes something that no path here does.
    """
    try:
        check_parts(model.language_model)
        exact = compare(type(model), small_config(model.config).to_json_string(use_diff=False))
        decoder.use_trie_attention(model.language_model)
    except Exception as cause:  # of whatever model the config names
        names = f"{type(model).__name__} with {type(model.language_model).__name__}"
        raise ValueError(f"{names} is not supported: {message(cause)}") from cause
    decoder.use_own_length_rope(model.language_model)
    if model.language_model.dtype == torch.float64:
        model.language_model.set_experts_implementation("eager")  # `grouped_mm` takes no float64
    for part, changes in ((model, VISION_CHANGES), (model.language_model, DECODER_CHANGES)):
        done = [change(part) for change in changes if change in exact]
    return decoder.read_last_tokens in exact and done[-1]


def check_parts(language_model: nn.Module) -> None:
    """Raise `ValueError` for parts of a text model that mean more than is computed here or a folder holds."""
    config = language_model.config
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(f"it has layers of {' and '.join(sorted(others))}")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"its keys and values are of kv_lora_rank {config.kv_lora_rank}, latent attention")
    missing = [name for name in ("embed_tokens", "layers", "norm") if not hasattr(language_model, name)]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}, as decoders of one kind of layer have")
    embedding = language_model.embed_tokens
    if type(embedding) is not nn.Embedding:
        raise ValueError(f"its token embedding is {type(embedding).__name__}, more than a table")
    buffers = [name for name, _ in language_model.named_buffers() if not name.startswith("rotary_emb.")]
    if buffers:
        raise ValueError(f"it has values that are no parameters, such as {buffers[0]}: they would not be loaded")


@cache
def compare(kind: type[InternVLModel], settings: str) -> frozenset[Change]:
    """The changes that leave what models of a kind compute; `settings` are a twin's config, as JSON."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = InternVLConfig.from_dict(json.loads(settings))
        config.text_config._attn_implementation = "eager"  # which computes all there is, such as sinks
        twin = kind(config).float().eval()
        for parameter in twin.parameters():  # large enough to matter
            parameter.normal_(mean=0.1, std=parameter.shape[-1] ** -0.5)
        return frozenset([*compare_vision(twin), *compare_decoder(twin.language_model)])


def small_config(config: InternVLConfig) -> InternVLConfig:
    """A config of the same kind; head sizes, activations, norms, the kind of RoPE and windows stay."""
    small = copy.deepcopy(config)
    shrink_text(small.text_config)
    vision, grid = small.vision_config, int(2 / config.downsample_ratio)
    vision.hidden_size = HEADS * vision.hidden_size // vision.num_attention_heads
    vision.num_attention_heads, vision.intermediate_size, vision.num_hidden_layers = HEADS, WIDTH, LAYERS
    vision.image_size = [grid * side for side in vision.patch_size]
    if config.vision_feature_layer != -1:
        small.vision_feature_layer = 1
    return small


def shrink_text(config: PreTrainedConfig) -> None:
    """Make a text config's model small, and the lengths at which it changes shorter than the sequences."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    is_grouped = getattr(config, "num_key_value_heads", None) not in (None, heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    last = {kind: layer for layer, kind in enumerate(getattr(config, "layer_types", None) or layers * [None])}
    kept = (sorted(last.values()) * LAYERS)[-LAYERS:]  # of two kinds where there are
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:  # one a layer
            setattr(config, name, [value[layer] for layer in kept])
    config.num_attention_heads, config.hidden_size = HEADS, HEADS * size
    config.num_hidden_layers, config.vocab_size = LAYERS, VOCABULARY
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 1 if is_grouped else HEADS
    for name, value in SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(value, getattr(config, name)))
    config.pad_token_id = config.pad_token_id and 0
    rope = getattr(config, "rope_parameters", None) or {}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = config.original_max_position_embeddings = SHORT
    elif rope.get("rope_type") == "dynamic":
        config.max_position_embeddings = SHORT


def compare_vision(twin: InternVLModel) -> list[Change]:
    """The changes of the vision part under which its image tokens are transformers'."""
    (side, _), statistics = twin.config.vision_config.image_size, NORMALIZATION["imagenet"]
    tiles = torch.randint(256, (2, side, side, 3), dtype=torch.uint8)
    pixels = vision.normalized(tiles, *statistics, torch.float32)

    expected = twin.get_image_features(pixels).pooler_output.flatten(0, 1)

    def features(twin: InternVLModel) -> Tensor:
        return vision.project(twin, vision.tower_output(twin, tiles, *statistics))

    return harmless(VISION_CHANGES, twin, features, expected)


def compare_decoder(twin: nn.Module) -> list[Change]:
    """The changes of the decoder under which packed sequences end in the hidden states that each has by itself."""
    plan = plan_tokens(SEQUENCES, decoder.rope_regime(twin.config))
    alone = [twin(torch.from_numpy(ids)[None], use_cache=False).last_hidden_state for ids in SEQUENCES]
    expected = torch.cat([hidden[0, -1:] for hidden in alone])

    def packed(twin: nn.Module) -> Tensor:
        hidden = decoder.packed_hidden(twin, twin.embed_tokens.weight[plan.source_T], plan)
        return hidden[plan.last_index_R if len(hidden) == len(plan.source_T) else plan.read_row_R]

    decoder.use_trie_attention(twin)
    decoder.use_own_length_rope(twin)
    return harmless(DECODER_CHANGES, twin, packed, expected)


def harmless(
    changes: tuple[Change, ...], twin: nn.Module, compute: Callable[[nn.Module], Tensor], expected: Tensor
) -> list[Change]:
    """The changes under which a twin still computes what is expected. Raises what hinders it where it never does."""
    if cause := deviation(compute, twin, expected):
        raise cause
    found = []
    for change in changes:
        changed = copy.deepcopy(twin)
        if not change(changed) or not (cause := deviation(compute, changed, expected)):
            found.append(change)
            continue
        name = f"{type(twin).__name__} of transformers {transformers.__version__}"
        cost = f"its own modules stay, which take more time or memory; {message(cause)}"
        warnings.warn(f"{name} computes otherwise with {change.__name__}: {cost}", stacklevel=2)
    return found


def deviation(compute: Callable[[nn.Module], Tensor], twin: nn.Module, expected: Tensor) -> Exception | None:
    """Why a twin does not compute the expected values, to rounding; None where it does."""
    try:
        actual = compute(twin)
        error = (actual - expected).abs().max() / expected.abs().max() if actual.shape == expected.shape else math.inf
    except Exception as failure:  # a release may have renamed or moved whatever our code reads
        return failure
    if error <= BOUND:
        return None
    name = type(twin).__name__
    return ValueError(f"{name} computes more than attention over its tiles or tokens: values differ by {error:.1e}")


def message(cause: Exception) -> str:
    """An exception's words, with its kind where it is not one of ours."""
    return str(cause) if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"
