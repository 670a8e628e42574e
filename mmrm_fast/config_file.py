"""Options by their names, as flags and files see them: from a YAML file or a preset, under the command line's flags."""

import os
import types
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from inspect import cleandoc
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from mmrm_fast import reference

PRESETS = Path(__file__).parent / "configs"
Config = TypeVar("Config")


def parse(config_type: type[Config], arguments: Sequence[str], *, prog: str) -> Config:
    """The config that flags give, over what the file named by `--config` gives, over the defaults.

    Raises:
        ValueError: no such file, an unknown key or a wrong value in it.
    """
    named = argument(arguments, "--config") if "config" in field_types(config_type) else None
    num_ranks = int(argument(arguments, "--num-gpus") or os.environ.get("WORLD_SIZE", "1"))
    default = {} if named is None else {"default": read_config(named, config_type, num_ranks)}
    return tyro.cli(config_type, prog=prog, description=cleandoc(config_type.__doc__), args=list(arguments), **default)


def argument(arguments: Sequence[str], name: str) -> str | None:
    """The value of a flag among the arguments."""
    for given, following in zip_longest(arguments, arguments[1:]):
        flag, has_value, value = given.partition("=")
        if flag.replace("_", "-") == name:
            return value if has_value else following
    return None


def read_config(name: str, config_type: type[Config], num_ranks: int = 1) -> Config:
    """A config from a YAML (or JSON) file or a preset; a file of the reference implementation is translated."""
    path = find(name)
    options = read_yaml(path)
    try:
        if reference.is_reference(options):
            check_names(options, {*field_types(config_type), *reference.KEYS})
            options, notes = reference.translate(options, num_ranks=num_ranks)
            say(path, notes)
        check_names(options, field_types(config_type))
        hints = field_types(config_type)
        given = {key: convert(value, hints[key], key) for key, value in options.items() if value is not None}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return with_options(config_type(), **{**given, "config": name})


def options(config: Any) -> dict[str, Any]:
    """Every option by its name, those of the groups among them."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    groups = [value for value in values.values() if is_dataclass(value)]
    own = {name: value for name, value in values.items() if not is_dataclass(value)}
    return own | {name: value for group in groups for name, value in options(group).items()}


def with_options(config: Config, /, **changed: Any) -> Config:
    """The config with some options changed, whatever group they are in."""
    for name, group in vars(config).items():
        if is_dataclass(group):
            own = {option: changed.pop(option) for option in options(group) if option in changed}
            changed[name] = replace(group, **own)
    return replace(config, **changed)


def find(name: str) -> Path:
    """The file of a preset's name or a path."""
    preset = PRESETS / f"{name}.yaml"
    if Path(name).name == name and preset.is_file():
        return preset
    if not Path(name).is_file():
        names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
        raise ValueError(f"--config {name}: no such file, and the presets are {names}")
    return Path(name)


def read_yaml(path: Path) -> dict:
    """The keys of a YAML file."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(options).__name__}")
    return options


def field_types(config_type: type) -> dict[str, Any]:
    """What a file can set, with the types."""
    types = get_type_hints(config_type)
    groups = [value for value in types.values() if is_dataclass(value)]
    own = {name: value for name, value in types.items() if not is_dataclass(value)}
    return own | {name: value for group in groups for name, value in field_types(group).items()}


def check_names(options: dict, known: Collection[str]) -> None:
    """Raise `ValueError` for a key that means nothing, naming the nearest that does."""
    for key in options:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            raise ValueError(f"unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""))


def convert(value: Any, hint: Any, key: str) -> Any:
    """A YAML value as a field's type (YAML reads 1e-5 as text). Raises `ValueError` naming the key."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        *others, last = (choice for choice in choices if choice is not type(None))
        for other in others:
            with suppress(ValueError):
                return convert(value, other, key)
        return convert(value, last, key)
    if origin is tuple:
        return tuple(convert(item, choices[0], key) for item in (value if isinstance(value, list) else [value]))
    if origin is Literal:
        if value in choices:
            return value
        raise ValueError(f"{key}: expected one of {', '.join(map(str, choices))}, got {value!r}")
    if isinstance(value, bool) == (hint is bool) and not isinstance(value, (list, dict)):
        try:
            return value if hint is bool else hint(str(value))
        except ValueError:
            pass
    raise ValueError(f"{key}: expected {hint.__name__}, got {value!r}")


def say(path: Path, notes: dict[str, str]) -> None:
    """Print what a file's keys do not do here, on one rank."""
    if notes and os.environ.get("RANK", "0") == "0":
        print(f"{path}: these keys have no meaning here:")
        print("\n".join(f"  {key}: {reason}" for key, reason in notes.items()))
