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

from mmrm_fast.files import read_table

PRESETS = Path(__file__).parent / "configs"
Config = TypeVar("Config")

REFERENCE = read_table("reference_options")
RENAMED, MEANINGLESS, ONLY = (REFERENCE[name] for name in ("renamed", "meaningless", "only"))
KEYS = {*RENAMED, *MEANINGLESS, *ONLY, *REFERENCE["combined"]}


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
    """The config that flags give, over what the file named by `--config` gives, over the defaults."""
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
        if any(mark in given for mark in REFERENCE["marks"]):
            check_names(given, {*types(config_type), *KEYS})
            given, notes = translate(given, num_ranks=num_ranks)
            if notes and os.environ.get("RANK", "0") == "0":
                print(f"{path}: these keys have no meaning here:", *map(": ".join, notes.items()), sep="\n  ")
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


def translate(given: Mapping, *, num_ranks: int) -> tuple[dict, dict[str, str]]:
    """A file of the reference implementation, whose batch is of so many GPUs, as options of ours.

    Keys that are not the reference's come back as they are; beside them why some keys have no meaning here. Raises
    `ValueError` for an option with a value that is not supported.
    """
    given = {**REFERENCE["defaults"], **given}
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
