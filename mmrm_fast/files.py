"""Files and folders that are whole or not there: written aside, synced to the disk, renamed; JSON as JSON has it."""

import glob
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

UNFINISHED, REMOVED = ".unfinished", ".removed"

LFS_POINTER = b"version https://git-lfs.github.com/spec"


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write (mode `w` or `wb`), which takes the place of `path` at the end; without it, where that fails."""
    aside = aside_of(path, os.getpid())
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def whole_folder(path: Path, *, replace: bool = False, synced: bool = True) -> Iterator[Path]:
    """A folder to fill, which appears as `path` at the end; nothing is left of it where that fails.

    Args:
        path: what it becomes; its parents are made.
        replace: let it take the place of a folder that is there.
        synced: wait until its files are on the disk, milliseconds each; not for what is easily made again.

    Raises:
        FileExistsError: `path` is there and not empty, and not to be replaced.
    """
    if not replace and path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty")
    aside = aside_of(path, os.getpid())
    try:
        aside.mkdir(parents=True)
        yield aside
        for inside in aside.rglob("*") if synced else ():
            sync(inside)
        if replace:
            replace_folder(path, aside)
        else:
            aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(path: Path, aside: Path) -> None:
    """Let a complete folder take the place of `path`, which is whole at every moment but between two renames."""
    removed = path.with_name(path.name + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)  # of a process that was killed here
    sync(aside)
    if path.exists():
        os.replace(path, removed)
    os.replace(aside, path)
    sync(path.parent)
    shutil.rmtree(removed, ignore_errors=True)


def aside_of(path: Path, owner: object) -> Path:
    """Where `owner` writes a file or folder until it is whole; hidden, so that no glob of a user's finds it."""
    return path.with_name(f".{path.name}.{owner}{UNFINISHED}")


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove what killed processes left in a folder of one file or folder, or of all; nobody writes there now."""
    for left in folder.glob(f".{glob.escape(name)}*{UNFINISHED}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """What a JSON file holds, a byte order mark or not. Raises `ValueError` naming the file where it is not JSON."""
    refuse_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def refuse_pointer(path: Path) -> None:
    """Raise `ValueError` where a git-lfs pointer stands in a file's place."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path}: a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned")


def json_lines(path: Path, *, skip_broken: bool = False) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON lines file of our own, with where they stand, "file:12"; blank lines are none.

    Args:
        skip_broken: leave out lines that are not JSON, such as one that a killed process has not finished.

    Raises:
        ValueError: a line that is not JSON, or no object.
    """
    with open(path, encoding="utf-8") as file:
        for source, line in ((f"{path}:{number}", line) for number, line in enumerate(file, 1) if line.strip()):
            try:
                row = json.loads(line)
            except ValueError as error:
                if skip_broken:
                    continue
                raise ValueError(f"{source}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{source}: a row is a JSON object")
            yield source, row


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, null where a number is NaN or infinite."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSON line a row."""
    with whole_file(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_text(path: Path, text: str) -> None:
    """Write a whole file."""
    with whole_file(path) as file:
        file.write(text)


def finite(value: object) -> object:
    """The same nested value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
