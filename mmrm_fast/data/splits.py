"""Which files a name stands for: a file, a glob's, a folder's; of a folder whose files are splits, those of one."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json", ".json.gz")
CSV = ".csv"  # in a folder, where there is nothing else
FAILURES = "errors.jsonl"  # beside the shards of a scoring run
NO_RECORDS = (FAILURES, "dataset_infos.json", "dataset_dict.json")

Split = Literal["train", "test"]
SPLITS = {  # by how the names of their files begin
    "train": re.compile(r"train(ing)?(?![a-z])", re.IGNORECASE),
    "test": re.compile(r"(test(ing)?|filtered)(?![a-z])", re.IGNORECASE),  # RewardBench has `raw` and `filtered`
    "validation": re.compile(r"(val(id(ation)?)?|dev|eval)(?![a-z])", re.IGNORECASE),
}
WANTED = {"train": ("train", None), "test": ("test", "validation", None)}  # the first that is there; None: of no split
PREFERENCES = "_prefs"  # a hub's `train_sft` holds the same records as its `train_prefs`, without preferences


def record_files(spec: str | Path, split: Split | None = None) -> tuple[list[Path], list[Path]]:
    """The files that `spec` names, in the order of their names, and those of its folder that are left.

    It is a file, a glob, or a folder: all files in it or in its `data` that can hold records, of those that are splits
    the one that is meant, if any is. Raises `ValueError` where there is none.
    """
    path = Path(spec)
    if path.is_dir():
        found = next(filter(None, map(in_folder, (path, path / "data"))), [])
        taken = of_split(found, split)
    else:
        files = [path] if path.is_file() else sorted(file for file in matching(path) if file.is_file())
        once: dict[Path, Path] = {}
        taken = found = [file for file in files if once.setdefault(file.resolve(), file) is file]
    if not taken:
        what = "no record files in this folder" if path.is_dir() else "no such file"
        raise ValueError(f"{spec}: {what}; expected {', '.join(KINDS)}, a folder or a glob of them")
    return taken, [file for file in found if file not in taken]


def matching(pattern: Path) -> Iterator[Path]:
    """What a glob matches; `**` is every folder from there on, each once however many links lead to it."""
    parts = pattern.parts
    if "**" not in parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    place, seen = parts.index("**"), set()
    for start in matching(Path(*parts[:place])):
        for folder, inside, _ in os.walk(start, followlinks=True):
            found = os.stat(folder)
            if (found.st_dev, found.st_ino) in seen:
                inside.clear()
                continue
            seen.add((found.st_dev, found.st_ino))
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            yield from matching(Path(glob.escape(folder), *(parts[place + 1 :] or "*")))


def said_left(taken: list[Path], left: list[Path]) -> str | None:
    """Which files of folders were taken and which left, None where there was nothing to choose."""
    folders = {file.parent for file in left}
    chosen = ", ".join(str(file) for file in taken if file.parent in folders)
    return f"taken: {chosen}; left, of other splits: {', '.join(file.name for file in left)}" if left else None


def in_folder(folder: Path) -> list[Path]:
    """The files of a folder that can hold records."""
    files = sorted(file for file in folder.glob("*") if file.is_file() and file.name not in NO_RECORDS)
    kinds = [file for file in files if file.name.endswith(KINDS)]
    return kinds or [file for file in files if file.suffix == CSV]


def of_split(files: list[Path], split: Split | None) -> list[Path]:
    """Those that belong to a split; all of them where none of them does."""
    of = {file: next((name for name, pattern in SPLITS.items() if pattern.match(file.name)), None) for file in files}
    for wanted in WANTED[split] if split else ():
        if own := [file for file in files if of[file] == wanted]:
            return [file for file in own if PREFERENCES in file.name] or own
    return files
