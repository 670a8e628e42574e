"""Files and folders, whole or not there: written aside, synced, renamed, by one process; JSON as JSON has it."""

import errno
import fcntl
import glob
import json
import math
import os
import platform
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

UNFINISHED, REPLACED, LOCK = ".unfinished", ".replaced", ".lock"

ASSETS = Path(__file__).parent / "assets"
CHUNK_BYTES = 1 << 24
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
    """Let a complete folder take the place of `path`; killed between the two renames, `recover` undoes the first."""
    replaced = path.with_name(f".{path.name}{REPLACED}")
    sync(aside)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(path, replaced)
    os.replace(aside, path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def aside_of(path: Path, owner: object) -> Path:
    """Where `owner` writes a file or folder until it is whole; hidden, so that no glob of a user's finds it."""
    return path.with_name(f".{path.name}.{owner}{UNFINISHED}")


def recover(folder: Path, name: str = "", is_whole: Callable[[Path], bool] = lambda aside: False) -> None:
    """Undo what killed processes left half done of a folder's files and folders; nobody writes there now.

    Args:
        folder: what was replaced comes back where nothing took its place, what is unfinished goes.
        name: look at names that begin so; all of them.
        is_whole: whether what looks unfinished lacks its name alone, which it then gets.
    """
    for left in folder.glob(f".{glob.escape(name)}*{REPLACED}"):
        restore(left, left.name[1 : -len(REPLACED)])
    for left in folder.glob(f".{glob.escape(name)}*{UNFINISHED}"):
        if is_whole(left):
            restore(left, left.name[1 : -len(UNFINISHED)].rpartition(".")[0])
        else:
            remove(left)


def restore(left: Path, name: str) -> None:
    """Give a file or folder its name, or remove it where something has that."""
    if left.with_name(name).exists():
        remove(left)
    else:
        os.replace(left, left.with_name(name))
        sync(left.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made, until the end of the context, or of this process.

    Raises:
        ValueError: one is in it; the message says which.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = take_lock(folder / LOCK)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


def take_lock(path: Path) -> int:
    """The open file of a lock that this process has; the process and its host stand in it.

    A POSIX lock: unlike one of `flock`, forks do not have it, and it ends with its process although they live on.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        host, _, pid = os.pread(descriptor, 1 << 10, 0).decode(errors="replace").strip().rpartition(" ")
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_taken = False
        except OSError as error:  # a file system without locks has the names alone
            is_taken = error.errno in (errno.EACCES, errno.EAGAIN) or lives(host, pid)
        if is_taken:
            os.close(descriptor)
            owner = f"process {pid} on {host} is at work there" if pid else "another process is at work there"
            raise ValueError(f"{path.parent}: {owner}; wait for its end (if it has ended, delete {path})")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # its owner has removed it
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{platform.node()} {os.getpid()}\n".encode(), 0)
    return descriptor


def lives(host: str, pid: str) -> bool:
    """Whether a process is, or may be, alive; of another host it is not known."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return bool(pid) and host != platform.node()
    except PermissionError:
        pass
    return True


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sum(path: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def read_json(path: Path) -> Any:
    """What a JSON file holds, a byte order mark or not. Raises `ValueError` naming the file where it is not JSON."""
    refuse_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def read_table(name: str) -> dict:
    """A table of names that comes with the package."""
    return yaml.safe_load((ASSETS / "tables" / f"{name}.yaml").read_text(encoding="utf-8"))


def refuse_pointer(path: Path) -> None:
    """Raise `ValueError` where a git-lfs pointer stands in a file's place."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path}: a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned")


def json_lines(path: Path, *, left_out: Callable[[str], object] | None = None) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON lines file of our own, with where they stand, "file:12"; blank lines are none.

    Args:
        left_out: told of each line that is no object, such as one that a killed process has not finished, and why.

    Raises:
        ValueError: such a line, where nobody is told.
    """
    with open(path, "rb") as file:
        for source, line in ((f"{path}:{number}", line) for number, line in enumerate(file, 1) if line.strip()):
            try:
                row = json.loads(line)
                problem = None if isinstance(row, dict) else "a row is a JSON object"
            except (ValueError, RecursionError) as error:
                problem = f"not valid JSON ({error})"
            if problem is None:
                yield source, row
            elif left_out is None:
                raise ValueError(f"{source}: {problem}")
            else:
                left_out(f"{source}: {problem}")


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
