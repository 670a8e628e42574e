"""`mmrm-fast init FILE ...`: a commented YAML file of a training on one's own data."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

import tyro
from docstring_parser import parse_from_object

from mmrm_fast.config import TrainConfig
from mmrm_fast.data.records import Records
from mmrm_fast.files import write_text

HELD_OUT = 0.02  # of the data, where there is no test set


@dataclass(frozen=True)
class InitConfig:
    """Write a commented YAML file of a training on your data, with every option in it."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Preference files of any layout that training reads."""
    eval: tuple[str, ...] = ()
    """Test sets from the training distribution, NAME=FILE. Default: a share of the data is held out."""
    eval_ood: tuple[str, ...] = ()
    """Test sets from other distributions, NAME=FILE."""
    model: Path | None = None
    """Local folder of an InternVL checkpoint. Default: the tiny one."""
    out: Path = Path("train.yaml")
    """The file, for `mmrm-fast train --config`."""


def init(config: InitConfig) -> None:
    """Write the file, and say how it is used. Raises `ValueError` where a file has no preferences."""
    if config.out.exists():
        raise ValueError(f"{config.out}: is there already: choose another --out")
    own = {"data": list(config.data), "robust": True, "output_dir": str(Path("runs") / config.out.stem)}
    own |= {"eval": list(config.eval), "eval_ood": list(config.eval_ood)}
    own |= {"eval_fraction": None if config.eval else HELD_OUT, "model": config.model and str(config.model)}
    said = [f"# mmrm-fast train --config {config.out}    (flags win over this file; --dry-run says what it takes)"]
    said += [f"# {path}: {described(Path(path))}" for path in config.data]
    write_text(config.out, "\n".join([*said, *template({name: value for name, value in own.items() if value})]) + "\n")
    print(f"{config.out}: written; next: mmrm-fast train --config {config.out} --dry-run")


def described(path: Path) -> str:
    """How many records a file has, and what the first one is."""
    records = Records(path, need_pairs=True)
    if not len(records):
        raise ValueError(f"{path}: no records")
    first = records.group(0)
    return f"{len(records):,} records; the first has {len(first.images)} images, {len(first.responses)} responses"


def template(own: dict) -> Iterator[str]:
    """Every option with its help, group by group: as a comment with its default, but for those with a value."""
    for group in vars(TrainConfig()).values():
        yield f"\n# {inspect.cleandoc(type(group).__doc__)}"
        fields = [field for base in type(group).__mro__[:-1] for field in parse_from_object(base).params]
        helps = {field.arg_name: inspect.cleandoc(field.description) for field in fields}
        for name, default in vars(group).items():
            yield "\n" + indent(helps[name], "# ")
            yield written(name, own[name]) if name in own else "# " + written(name, default)


def written(name: str, value: object) -> str:
    """A key and its value in one line of YAML, which JSON is."""
    plain = list(map(str, value)) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return f"{name}: {json.dumps(plain, ensure_ascii=False)}"
