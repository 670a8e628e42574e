"""What takes the place of transformers' modules, compared with them before it does, on a tiny random twin of the model.

A release that computes a layer otherwise must not change a reward in silence. A twin has its model's classes and two
layers of few heads, in fp32 on the CPU: a comparison takes a tenth of a second whatever the model's size and device,
needs none of its weights, and is made once a process for models of one kind.
"""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import InternVLConfig, InternVLModel, PreTrainedConfig, PreTrainedModel

from mmrm_fast.data.images import NORMALIZATION
from mmrm_fast.data.packing import plan_tokens
from mmrm_fast.model.decoder import (
    packed_hidden,
    read_last_tokens,
    rope_regime,
    use_gated_product,
    use_own_length_rope,
    use_trie_attention,
)
from mmrm_fast.model.vision import OURS, PLAIN, VisionPath, normalized, use_tile_attention

BOUND = 1e-4  # of the largest value
LAYERS, HEADS, WIDTH, VOCABULARY = 2, 2, 32, 16
SHORT = 6  # tokens after which a RoPE that knows lengths changes
PROMPT = np.arange(40) % VOCABULARY  # long enough to be shared
SEQUENCES = [PROMPT[:5], *(np.append(PROMPT, np.arange(count) + count) for count in (0, 3, 6))]


@dataclass(frozen=True)
class Exact:
    """Which of our modules compute what transformers' own do."""

    vision: VisionPath
    gated_product: bool
    last_tokens: bool


def what_is_exact(model: InternVLModel) -> Exact:
    """Compare, or remember; a warning says what is left out.

    Raises:
        ValueError: the model computes something that no path here does.
    """
    return compare(type(model), json.dumps(small_config(model.config).to_dict()))


@cache
def compare(kind: type[InternVLModel], settings: str) -> Exact:
    """See `what_is_exact`; `settings` are a twin's config, as JSON."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = InternVLConfig.from_dict(json.loads(settings))
        for part in (config, config.text_config, config.vision_config):
            part._attn_implementation = "eager"
        twin = kind(config).float().eval()
        for parameter in twin.parameters():  # large enough to matter
            parameter.normal_(mean=0.1, std=parameter.shape[-1] ** -0.5)
        return Exact(compare_vision(twin), *compare_decoder(twin.language_model))


def small_config(config: InternVLConfig) -> InternVLConfig:
    """A config of the same kind; head sizes, activations, norms, the kind of RoPE and windows stay."""
    small = copy.deepcopy(config)
    shrink_text(small.text_config)
    shrink_vision(small.vision_config, grid=int(2 / config.downsample_ratio))
    if config.vision_feature_layer != -1:
        small.vision_feature_layer = 1
    return small


def shrink_text(config: PreTrainedConfig) -> None:
    """Make a text config's model small."""
    is_grouped = config.num_key_value_heads < config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.num_attention_heads, config.num_key_value_heads = HEADS, 1 if is_grouped else HEADS
    config.hidden_size, config.intermediate_size = HEADS * size, WIDTH
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = LAYERS, VOCABULARY, None
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * LAYERS)[-LAYERS:]
    if "original_max_position_embeddings" in config.rope_parameters:
        config.rope_parameters["original_max_position_embeddings"] = config.original_max_position_embeddings = SHORT
    elif config.rope_parameters["rope_type"] == "dynamic":
        config.max_position_embeddings = SHORT


def shrink_vision(config: PreTrainedConfig, *, grid: int) -> None:
    """Make a vision config's model small, over tiles of `grid` x `grid` patches."""
    config.hidden_size = HEADS * config.hidden_size // config.num_attention_heads
    config.num_attention_heads, config.intermediate_size, config.num_hidden_layers = HEADS, WIDTH, LAYERS
    config.image_size = [grid * side for side in config.patch_size]


def compare_vision(twin: InternVLModel) -> VisionPath:
    """Our path with tile attention, where it gives transformers' image tokens; else that of transformers' modules."""
    (side, _), statistics = twin.config.vision_config.image_size, NORMALIZATION["imagenet"]
    tiles = torch.randint(256, (2, side, side, 3), dtype=torch.uint8)
    expected = twin.get_image_features(normalized(tiles, *statistics, torch.float32)).pooler_output.flatten(0, 1)

    def gives(path: VisionPath) -> bool:
        return computes(expected, lambda: path.project(twin, path.tower_output(twin, tiles, *statistics)))

    if not gives(PLAIN):
        raise ValueError(f"{type(twin).__name__} computes image tokens in a way that is not supported")
    use_tile_attention(twin.vision_tower)
    if gives(OURS):
        return OURS
    tell_difference(twin.vision_tower, "the vision path of mmrm_fast")
    return PLAIN


def compare_decoder(twin: PreTrainedModel) -> tuple[bool, bool]:
    """Whether the gated product, and a last layer that reads last tokens alone, change nothing of packed sequences."""
    plan = plan_tokens(SEQUENCES, rope_regime(twin.config))
    alone = [twin(torch.from_numpy(ids)[None], use_cache=False).last_hidden_state for ids in SEQUENCES]
    expected = torch.cat([hidden[0, -1:] for hidden in alone])

    def is_same(twin: PreTrainedModel, rows_R: Tensor) -> bool:
        return computes(expected, lambda: packed_hidden(twin, twin.embed_tokens.weight[plan.source_T], plan)[rows_R])

    def changes_nothing(change: Callable[[PreTrainedModel], bool], rows_R: Tensor) -> bool:
        changed = copy.deepcopy(twin)
        if not change(changed) or is_same(changed, rows_R):
            return True
        tell_difference(twin, change.__name__)
        return False

    use_trie_attention(twin)
    use_own_length_rope(twin)
    if not is_same(twin, plan.last_index_R):
        raise ValueError(f"{type(twin).__name__} computes more than attention over its tokens: not supported")
    return changes_nothing(use_gated_product, plan.last_index_R), changes_nothing(read_last_tokens, plan.read_row_R)


def computes(expected: Tensor, compute: Callable[[], Tensor]) -> bool:
    """Whether `compute` gives the expected values, to rounding; a failure of any kind is a difference."""
    try:
        actual = compute()
    except Exception:  # a release may have renamed or moved whatever our code reads
        return False
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= BOUND * expected.abs().max())


def tell_difference(model: PreTrainedModel, what: str) -> None:
    """Warn that something is left out of a model."""
    warnings.warn(
        f"{type(model).__name__} of transformers {transformers.__version__} computes otherwise with {what}: its own "
        "modules stay, which take more time or memory",
        stacklevel=2,
    )
