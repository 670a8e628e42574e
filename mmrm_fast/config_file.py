"""Options by their names, as flags and files see them: from a YAML file or a preset, under the command line's flags.

A file of the reference implementation (github.com/AlignRM/Generalizable-MM-RM) works as it is: its keys keep their
meaning, and so do its defaults for what it does not say. What has no meaning here is named.
"""

import argparse
import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from inspect import cleandoc
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import tyro
import yaml

PRESETS = Path(__file__).parent / "configs"
Config = TypeVar("Config")

# Keys of the reference implementation's files. What none of the tables holds is named as it is here.
MARKS = ("model_name_or_path", "bias_model_path", "dataset_path", "deepspeed", "conv_style", "learning_rate")
DEFAULTS = {
    "freeze_backbone": False, "dynamic_image_size": False, "use_thumbnail": False, "max_dynamic_patch": 12,
    "max_length": 8192, "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5, "weight_decay": 0.0, "adam_beta2": 0.999, "warmup_ratio": 0.0,
    "lr_scheduler_type": "linear", "lora_dropout": 0.05,
}  # fmt: skip
RENAMED = {
    "model_name_or_path": "model", "dataset_path": "data", "num_train_epochs": "epochs", "learning_rate": "lr",
    "adam_beta2": "beta2", "dataloader_num_workers": "num_workers", "save_steps": "save_every",
    "save_total_limit": "keep", "eval_steps": "eval_every", "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume", "center_rewards_coefficient": "center_rewards", "use_llm_lora": "llm_lora",
    "use_backbone_lora": "vision_lora", "min_dynamic_patch": "min_tiles", "use_thumbnail": "thumbnail",
}  # fmt: skip
MEANINGLESS = {
    "deepspeed": "FSDP2 shards weights, gradients and optimizer as ZeRO-3 does",
    "conv_style": "the checkpoint's own chat template is used",
    "force_image_size": "the tile size is the checkpoint's",
    "per_device_eval_batch_size": "batches are filled to --tokens-per-micro-batch",
    **dict.fromkeys(("logging_steps", "logging_first_step", "logging_strategy"), "every step is logged"),
    "save_strategy": "see --save-every and --save-minutes",
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "see --eval-every"),
    "bf16": "bfloat16 is the default with a GPU",
    "tf32": "nothing large is computed in float32",
    "remove_unused_columns": "records have no columns",
    "use_data_resampling": "the reference does not use it either",
    "drop_path_rate": "the vision tower runs without noise",
}
ONLY = {  # options of which one value is supported, with the remedy for others
    "ps_version": ("v2", "checkpoints in transformers' format shuffle pixels as v2"),
    "vision_select_layer": (-1, "the last vision layer is used"),
    "down_sample_ratio": (0.5, "pixels are shuffled 2 x 2"),
    "lora_bias": ("none", "adapters have no bias"),
    "fp16": (False, "use bfloat16 or float32"),
    "adam_beta1": (0.9, "beta1 is 0.9"),
    "warmup_steps": (0, "use warmup_ratio"),
}
COMBINED = (
    "grad_checkpoint", "gradient_checkpointing", "dynamic_image_size", "max_dynamic_patch", "bias_model_path",
    "per_device_train_batch_size", "gradient_accumulation_steps", "use_text_only", "use_image_only",
    "lr_scheduler_type", "report_to", "max_steps",
)  # fmt: skip
KEYS = {*RENAMED, *MEANINGLESS, *ONLY, *COMBINED}


def options(config: Any) -> dict[str, Any]:
    """Every option by its name, those of the groups among them."""
    values = {}
    for name, value in vars(config).items():
        values |= options(value) if is_dataclass(value) else {name: value}
    return values


def types(config_type: type) -> dict[str, Any]:
    """The types of a config's options, by name."""
    hints = {}
    for name, hint in get_type_hints(config_type).items():
        hints |= types(hint) if is_dataclass(hint) else {name: hint}
    return hints


def with_options(config: Config, /, **changed: Any) -> Config:
    """The config with some options changed, whatever group they are in."""
    for name, group in vars(config).items():
        if is_dataclass(group):
            own = {option: changed.pop(option) for option in options(group) if option in changed}
            changed[name] = replace(group, **own)
    return replace(config, **changed)


def parse(config_type: type[Config], arguments: Sequence[str], *, prog: str) -> Config:
    """The config that flags give, over what the file named by `--config` gives, over the defaults.

    Raises:
        ValueError: no such file, an unknown key or a wrong value in it.
    """
    early = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--num-gpus", "--num_gpus", type=int, default=os.environ.get("WORLD_SIZE", "1"))
    given, _ = early.parse_known_args(arguments)
    default = {}
    if given.config is not None and "config" in types(config_type):
        default["default"] = read_config(given.config, config_type, num_ranks=given.num_gpus, prog=prog)
    return tyro.cli(config_type, prog=prog, description=cleandoc(config_type.__doc__), args=arguments, **default)


def read_config(name: str, config_type: type[Config], *, num_ranks: int = 1, prog: str | None = None) -> Config:
    """A config from a YAML (or JSON) file or a preset; a file of the reference implementation is translated."""
    path, said = find(name), io.StringIO()
    try:
        given = read_yaml(path)
        if any(mark in given for mark in MARKS):
            check_names(given, {*types(config_type), *KEYS})
            given, notes = translate(given, num_ranks=num_ranks)
            say(path, notes)
        check_names(given, types(config_type))
        with redirect_stderr(said):
            typed = (tyro.conf.FlagConversionOff,)  # `--robust=True`
            config = tyro.cli(config_type, prog=prog, args=list(flags(given, types(config_type))), config=typed)
    except SystemExit:
        raise ValueError(f"{path}:\n{said.getvalue()}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return with_options(config, config=name)


def find(name: str) -> Path:
    """The file of a preset's name or a path."""
    preset = PRESETS / f"{name}.yaml"
    if Path(name).name == name and preset.is_file():
        return preset
    if not Path(name).is_file():
        presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
        raise ValueError(f"--config {name}: no such file, and no preset ({presets})")
    return Path(name)


def read_yaml(path: Path) -> dict:
    """The keys of a YAML file."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid YAML: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"expected keys and values, got {type(given).__name__}")
    return given


def check_names(given: dict, known: Collection[str]) -> None:
    """Raise `ValueError` for a key that means nothing, naming the nearest that does."""
    for key in given.keys() - known:
        near = get_close_matches(str(key), known, n=1)
        raise ValueError(f"unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""))


def flags(given: Mapping, hints: Mapping) -> Iterator[str]:
    """Keys and values as command-line arguments; null is the default."""
    for key, value in given.items():
        if isinstance(value, list) and get_origin(hints[key]) is tuple:
            yield from (f"--{key}", *map(str, value))
        elif value is not None:
            yield f"--{key}={value}"


def say(path: Path, notes: Mapping[str, str]) -> None:
    """Print what a file's keys do not do here, on one rank."""
    if notes and os.environ.get("RANK", "0") == "0":
        print(f"{path}: these keys have no meaning here:")
        print("\n".join(f"  {key}: {reason}" for key, reason in notes.items()))


def translate(given: Mapping, *, num_ranks: int) -> tuple[dict, dict[str, str]]:
    """A file of the reference implementation as options of ours, and why some keys have no meaning here.

    Args:
        given: the file's keys; those that are no reference keys come back as they are.
        num_ranks: GPUs, by which the reference multiplies its batch.

    Raises:
        ValueError: an option with a value that is not supported.
    """
    given = {**DEFAULTS, **given}
    for key, (value, remedy) in ONLY.items():
        if given.get(key, value) != value:
            raise ValueError(f"{key}: {given[key]!r} is not supported: {remedy}")
    if given.get("drop_path_rate") and not given["freeze_backbone"]:
        raise ValueError("drop_path_rate: chosen and rejected would get other features; 0, or freeze_backbone: true")
    ours = {RENAMED.get(key, key): value for key, value in given.items() if key in RENAMED or key not in KEYS}
    ours["max_tiles"] = given["max_dynamic_patch"] if given["dynamic_image_size"] else 1
    pairs = num_ranks * given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    ours |= {"pairs": "expand", "pairs_per_step": pairs}  # each a sample of its own
    ours["lr_schedule"] = str(given["lr_scheduler_type"]).removesuffix("_with_warmup")
    proxy = given.get("bias_model_path")
    if proxy is not None:
        ours |= {"robust": True, "proxy_image": "white"}
        ours |= {} if proxy == given.get("model_name_or_path") else {"proxy_model": proxy}  # else it follows `--model`
    for kind in filter(lambda kind: given.get(f"use_{kind}_only"), ("text", "image")):
        ours["inputs"] = kind
    if given.get("grad_checkpoint") or given.get("gradient_checkpointing"):
        ours["activation_checkpointing"] = "full"
    if given.get("report_to") is not None:
        ours["report_to"] = [] if given["report_to"] == "none" else given["report_to"]
    if given.get("max_steps", -1) != -1:
        ours["max_steps"] = given["max_steps"]
    return ours, {key: reason for key, reason in MEANINGLESS.items() if key in given}
