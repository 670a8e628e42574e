"""Original `internvl_chat` checkpoints and transformers' native `internvl` ones: configs and weight names both ways.

Pure functions: nothing here reads or writes a file. A native tensor's rows are spans of the rows of one original
tensor (`Source`): packed `wqkv`, `qkv` of InternLM2 and InternViT become separate projections and back.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from transformers import CONFIG_MAPPING, InternVLConfig, InternVLVisionConfig, PreTrainedConfig

from mmrm_fast.data.images import NORMALIZATION, Tiling
from mmrm_fast.files import read_table
from mmrm_fast.model.reward_model import original_facts

TABLES = read_table("internvl_chat")
TEXT_MODELS, TEXT_FIELDS, TEXT_TOKENS = (TABLES[name] for name in ("text_models", "text_fields", "text_tokens"))
ARCHITECTURES = {model: name for name, model in TEXT_MODELS.items()}  # a `llama` is a Llama
EMBEDDING = "language_model.embed_tokens.weight"
LM_HEAD, SCORE = "lm_head.weight", "score.weight"


@dataclass(frozen=True)
class Source:
    """Where a native tensor is in an original checkpoint: these spans of rows of `name`, in order; None is all."""

    name: str
    spans: tuple[tuple[int, int], ...] | None = None


def native_config(original: dict, *, vocab_size: int, image_token_id: int) -> InternVLConfig:
    """transformers' config of an original one.

    What it has no field for stays in `internvl_chat`: the LLM's `architecture`, `template` and `ps_version`. Raises
    `ValueError` for an architecture or a setting that transformers' InternVL does not compute.
    """
    vision = vision_config(original["vision_config"])
    tile, ratio = tile_size(original), original.get("downsample_ratio", 0.5)
    return InternVLConfig(
        vision_config=vision,
        text_config=text_config(original["llm_config"], vocab_size),
        image_token_id=image_token_id,
        image_seq_length=int((tile // vision.patch_size[0]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=original.get("select_layer", -1),
        tie_word_embeddings=original["llm_config"].get("tie_word_embeddings", False),
        internvl_chat={
            "architecture": llm_architecture(original["llm_config"]),
            "template": original.get("template"),
            "ps_version": original.get("ps_version", "v1"),
        },
    )


def tile_size(original: dict) -> int:
    """Pixels a tile side of an original checkpoint; its position embeddings may be of another size."""
    return original.get("force_image_size") or original["vision_config"].get("image_size", 224)


def image_processor(original: dict) -> dict:
    """An original config's image settings in the names of transformers' processor (and one that it has not)."""
    side = tile_size(original)
    return {
        "crop_to_patches": original.get("dynamic_image_size", False),
        "min_patches": original.get("min_dynamic_patch", 1),
        "max_patches": original.get("max_dynamic_patch", 6),
        "size": {"height": side, "width": side},
        "use_thumbnail": original.get("use_thumbnail", False),
        "pad2square": original.get("pad2square", False),
        "image_mean": NORMALIZATION["imagenet"][0],
        "image_std": NORMALIZATION["imagenet"][1],
    }


def vision_config(original: dict) -> InternVLVisionConfig:
    """InternViT's config; it has no norm after its last layer."""
    fields = {name: original.get(theirs, default) for name, (theirs, default) in TABLES["vision_fields"].items()}
    if fields["use_qk_norm"] and fields["layer_norm_eps"] != 1e-6:
        raise ValueError(
            f"vision_config.layer_norm_eps with qk_normalization must be 1e-6, got {fields['layer_norm_eps']}"
        )
    return InternVLVisionConfig(**fields, use_mean_pooling=True)


def llm_architecture(llm: dict) -> str:
    """The LLM's class name, which must be one of `TEXT_MODELS`."""
    architecture = (llm.get("architectures") or [None])[0]
    if architecture not in TEXT_MODELS:
        raise ValueError(f"llm_config.architectures is {architecture!r}; expected one of {', '.join(TEXT_MODELS)}")
    return architecture


def text_config(llm: dict, vocab_size: int) -> PreTrainedConfig:
    """transformers' config of the LLM; InternLM2 is Llama with packed projections."""
    architecture = llm_architecture(llm)
    missing = [name for name in TABLES["required"] if name not in llm]
    if missing:
        raise ValueError(f"llm_config lacks {', '.join(missing)}")
    config_type = CONFIG_MAPPING[TEXT_MODELS[architecture]]
    known = {*config_type.__dataclass_fields__, *config_type.attribute_map, "head_dim"}
    fields = {name: llm[name] for name in TEXT_FIELDS if name in llm and name in known}
    if architecture == "InternLM2ForCausalLM":
        fields["attention_bias"] = llm.get("bias", True)
    fields |= {"vocab_size": vocab_size, **{name: llm.get(name) for name in TEXT_TOKENS}}
    return config_type(**fields, rope_parameters=rope_parameters(llm))


def rope_parameters(llm: dict) -> dict:
    """RoPE settings in transformers' form: Phi-3's `su` is longrope, its `yarn` longrope with yarn's factor."""
    scaling = dict(llm.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
    parameters = {**scaling, "rope_type": kind, "rope_theta": llm.get("rope_theta", 10_000.0)}
    if "short_factor" in scaling:
        original, longest = llm.get("original_max_position_embeddings", 4096), llm["max_position_embeddings"]
        parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        if kind == "yarn":
            parameters["attention_factor"] = 0.1 * math.log(max(longest / original, 1.0)) + 1.0
    return parameters


def source(name: str, config: InternVLConfig) -> Source:
    """The original tensor that holds the native tensor `name`."""
    part, _, rest = name.partition(".")
    if part == "vision_tower":
        return vision_source(rest, config.vision_config.hidden_size)
    if part == "multi_modal_projector":
        return Source("mlp1." + renamed(rest, TABLES["projector_names"]))
    if part == "language_model":
        return text_source(rest, config)
    if name == LM_HEAD:
        return Source("language_model." + ("output" if is_internlm2(config) else "lm_head") + ".weight")
    return Source(name)


def vision_source(name: str, hidden_size: int) -> Source:
    """A tensor of InternViT; its q, k and v are one tensor, one after another."""
    layer, found, projection = name.rpartition(".attention.")
    which = projection.partition("_proj.")[0]
    if found and which in ("q", "k", "v"):
        start = "qkv".index(which) * hidden_size
        packed = layer.replace("encoder.layer.", "encoder.layers.") + ".attn.qkv." + projection.rpartition(".")[2]
        return Source("vision_model." + packed, ((start, start + hidden_size),))
    return Source("vision_model." + renamed(name, TABLES["vision_names"]))


def text_source(name: str, config: InternVLConfig) -> Source:
    """A tensor of the LLM; InternLM2's `wqkv` holds, per key/value head, its query heads, its key and its value."""
    if not is_internlm2(config):
        return Source("language_model.model." + name)
    text = config.text_config
    layer, found, projection = name.rpartition(".self_attn.")
    which = projection.partition("_proj.")[0]
    if not found or which not in ("q", "k", "v"):
        return Source("language_model.model." + renamed(name, TABLES["internlm2_names"]))
    groups, size = text.num_attention_heads // text.num_key_value_heads, text.head_dim
    first, last = {"q": (0, groups), "k": (groups, groups + 1), "v": (groups + 1, groups + 2)}[which]
    heads = [head * (groups + 2) for head in range(text.num_key_value_heads)]
    spans = tuple(((head + first) * size, (head + last) * size) for head in heads)
    return Source(f"language_model.model.{layer}.attention.wqkv." + projection.rpartition(".")[2], spans)


def packed(parts: list[tuple[tuple[tuple[int, int], ...] | None, Tensor]]) -> Tensor:
    """The original tensor of native ones, each with its spans of rows; the inverse of `source`."""
    if parts[0][0] is None:
        return parts[0][1]
    rows = sum(len(value) for _, value in parts)
    whole = parts[0][1].new_empty(rows, *parts[0][1].shape[1:])
    for spans, value in parts:
        place = 0
        for first, last in spans:
            whole[first:last] = value[place : place + last - first]
            place += last - first
    return whole


def renamed(name: str, names: dict[str, str]) -> str:
    """`name` with each of the dotted parts in `names` replaced."""
    dotted = f".{name}."
    for ours, theirs in names.items():
        dotted = dotted.replace(f".{ours}.", f".{theirs}.")
    return dotted[1:-1]


def is_internlm2(config: InternVLConfig) -> bool:
    """Whether the native Llama layout came from InternLM2's packed one."""
    return original_facts(config).get("architecture") == "InternLM2ForCausalLM"


def original_config(config: InternVLConfig, tiling: Tiling) -> dict:
    """config.json of the original layout for a native config."""
    vision, facts = config.vision_config, original_facts(config)
    vision_fields = {theirs: getattr(vision, ours) for ours, (theirs, _) in TABLES["vision_fields"].items()}
    vision_fields |= {name: vision_fields[name][0] for name in ("image_size", "patch_size")}
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLRewardModel"],
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": tiling.max_tiles > 1,
        "force_image_size": tiling.tile_size,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "llm_config": original_text_config(config),
        "min_dynamic_patch": tiling.min_tiles,
        "max_dynamic_patch": tiling.max_tiles,
        "pad2square": tiling.pad2square,
        "ps_version": facts.get("ps_version", "v2"),
        "select_layer": config.vision_feature_layer,
        "template": facts.get("template") or "internvl2_5",
        "tie_word_embeddings": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": tiling.thumbnail,
        "vision_config": {
            **vision_fields, "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b",
            "attention_dropout": 0.0, "drop_path_rate": 0.0, "dropout": 0.0, "initializer_factor": 1.0,
        },
    }  # fmt: skip


def original_text_config(config: InternVLConfig) -> dict:
    """`llm_config` of the original layout, with RoPE settings as transformers 4 had them."""
    text = config.text_config
    architecture = original_facts(config).get("architecture") or ARCHITECTURES.get(text.model_type)
    if architecture not in TEXT_MODELS:
        raise ValueError(f"text_config.model_type {text.model_type!r} has no original layout: {', '.join(TEXT_MODELS)}")
    fields = {name: getattr(text, name) for name in (*TEXT_FIELDS, *TEXT_TOKENS) if hasattr(text, name)}
    rope = dict(text.rope_parameters)
    kind = rope.pop("rope_type")
    fields |= {"architectures": [architecture], "model_type": text.model_type, "rope_theta": rope.pop("rope_theta")}
    if architecture == "InternLM2ForCausalLM":
        fields |= {"model_type": "internlm2", "bias": fields.pop("attention_bias")}
    if kind == "longrope":
        kind = "yarn" if "attention_factor" in rope else "su"
        rope = {name: rope[name] for name in ("factor", "short_factor", "long_factor") if name in rope}
    return fields | {"rope_scaling": None if kind == "default" else {"type": kind, **rope}}
