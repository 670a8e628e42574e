"""What the settings of a checkpoint's folder may be, by their names: looked at before anything is built from them."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers.activations import ACT2FN

PARTS = ("vision_config", "text_config", "llm_config")
LARGEST = {  # whole numbers from 1 on, or a list of them; null is the default
    "num_hidden_layers": 1 << 10, "hidden_size": 1 << 17, "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20, "num_attention_heads": 1 << 10, "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 12, "vocab_size": 1 << 24, "num_experts": 1 << 12, "num_local_experts": 1 << 12,
    "num_experts_per_tok": 1 << 12, "sliding_window": 1 << 31, "max_position_embeddings": 1 << 31,
    "patch_size": 1 << 10, "image_size": 1 << 12, "force_image_size": 1 << 12, "num_channels": 4,
    "image_seq_length": 1 << 20, "min_dynamic_patch": 1 << 8, "max_dynamic_patch": 1 << 8, "model_max_length": 1 << 128,
}  # fmt: skip
UP_TO = {"downsample_ratio": 1.0, "rms_norm_eps": 1.0, "layer_norm_eps": 1.0, "rope_theta": 1e30}  # numbers over 0
MAX_GROWTH = 256  # times that a tokenizer's normalizers may lengthen a text
SHOWN = 80


def check_settings(settings: object, source: Path) -> dict:
    """The settings of config.json or tokenizer_config.json. Raises `ValueError` naming the one that cannot be."""
    require(isinstance(settings, dict), source, "it", settings, "an object")
    for part in PARTS:
        value = settings.get(part)
        require(value is None or isinstance(value, dict), source, part, value, "an object")
    for prefix, part in (("", settings), *((f"{name}.", settings.get(name) or {}) for name in PARTS)):
        for name, value in part.items():
            check_setting(prefix + name, name, value, source)
    return settings


def check_setting(shown: str, name: str, value: object, source: Path) -> None:
    """Raise `ValueError` for one that cannot be."""
    if value is None:
        return
    if name in LARGEST:
        numbers = value if isinstance(value, (list, tuple)) and value else [value]
        holds = all(is_number(item) and item == int(item) and 1 <= item <= LARGEST[name] for item in numbers)
        require(holds, source, shown, value, f"a whole number from 1 to {LARGEST[name]}")
    if name in UP_TO:
        require(
            is_number(value) and 0 < value <= UP_TO[name], source, shown, value, f"a number over 0, to {UP_TO[name]}"
        )
    if name == "hidden_act":
        require(isinstance(value, str) and value in ACT2FN, source, shown, value, "an activation of transformers")


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (
        isinstance(value, int) or math.isfinite(value)
    )  # fmt: skip


def require(holds: bool, source: Path, name: str, value: object, expected: str) -> None:
    """Raise `ValueError` for a value that is not as expected."""
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "..."
        raise ValueError(f"{source}: {name} is {shown}; expected {expected}")


def check_tokenizer(content: object, source: Path) -> None:
    """Raise `ValueError` where the normalizers of a tokenizer.json lengthen a text more than `MAX_GROWTH` times."""
    require(isinstance(content, dict), source, "it", content, "an object")
    growth = 1
    for node in nodes(content.get("normalizer")):
        if node.get("type") == "Replace" and isinstance(node.get("content"), str):
            growth *= max(1, len(node["content"]))
        if node.get("type") == "Prepend" and isinstance(node.get("prepend"), str):
            growth *= 1 + len(node["prepend"]) // SHOWN
    require(growth <= MAX_GROWTH, source, "normalizer", content.get("normalizer"), f"at most {MAX_GROWTH} times a text")


def nodes(value: object) -> Iterator[Mapping]:
    """The objects in a value of JSON."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
