"""Resumable states of a run, RUN/checkpoints/step-N: written aside by every rank, sealed, renamed; found, checked.

A folder holds torch.distributed.checkpoint's files and `checkpoint.json`: the run's state, size and CRC-32 of each
file, and a CRC-32 of itself. It is renamed to its name when all of that is on the disk, so what has the name is whole.
"""

import json
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from mmrm_fast.data.records import RecordError
from mmrm_fast.files import aside_of, file_sum, read_json, replace_folder, write_text
from mmrm_fast.train import sharding

SEAL = "checkpoint.json"


@dataclass
class RunState:
    """All of a run's state but its tensors; the same on every rank, and what a checkpoint holds of it."""

    config: dict
    data: dict = field(default_factory=dict)  # `fingerprints` of the files that it is trained on
    copies: list = field(default_factory=list)  # records that are left out, each with the one that it is a copy of
    step: int = 0
    consumed: int = 0  # records of the order
    trained: int = 0  # of those, records in steps that were applied
    skipped: list = field(default_factory=list)  # rows of skipped.jsonl
    counts: dict = field(default_factory=dict)  # of what is not trained on, by its name
    bad_steps: int = 0  # in a row, not finite
    best: float | None = None
    evaluated: int = 0  # step of the last evaluation

    def skip(self, errors: list[RecordError]) -> None:
        """Note records and responses that are not trained on, each once however often it came."""
        if errors:
            rows = [*self.skipped, *({"source": e.source, "field": e.field, "reason": e.reason} for e in errors)]
            self.skipped = list({tuple(row.values()): row for row in rows}.values())

    def count(self, what: str, number: int) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    @classmethod
    def read(cls, path: Path) -> "RunState":
        """The state in a checkpoint. Raises `ValueError` where there is none, or a field is not what it must be."""
        saved = read_seal(path)["state"]
        odd = saved.keys() ^ {own.name for own in fields(cls)}
        odd |= {own.name for own in fields(cls) if not isinstance(saved.get(own.name), own.type)}
        if odd:
            raise ValueError(f"{path / SEAL}: not the state of a run of this version: {', '.join(sorted(odd))}")
        return cls(**saved)


class Checkpoints:
    """Writes a run's checkpoints in the background and keeps the newest `keep`. Made on every rank."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder, self.keep = folder, keep
        self.group = dist.new_group(backend="gloo")  # of its own: a step's collectives overlap with a save's
        self.saving: Future | None = None
        self.saving_step = 0

    def save(self, state: RunState, tensors: dict[str, Tensor], on_seal: Callable[[], None]) -> str | None:
        """Start to write a checkpoint; returns why the one before could not be written, None where it could.

        Args:
            state: the same on every rank; copied, as the tensors are, before this returns.
            tensors: this rank's, sharded or the same on all ranks.
            on_seal: called on the first rank, in the background, when all is written but the seal.
        """
        problem = self.wait()
        writer = SealingWriter(self.folder / f"step-{state.step:08d}", asdict(state), self.keep, on_seal)
        self.saving, self.saving_step = Future(), state.step
        write = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        write.add_done_callback(partial(end_write, Path(writer.path), self.saving))
        return problem

    def wait(self) -> str | None:
        """Wait for the write that is under way; returns why it failed, None where it did not."""
        saving, self.saving = self.saving, None
        error = saving.result() if saving is not None else None
        if error is None:
            return None
        if not isinstance(error, (CheckpointException, OSError, RuntimeError)):
            raise error
        failures = getattr(error, "failures", {})  # torch's, by rank
        cause = next((failure for failure, *_ in failures.values()), error)
        return f"the checkpoint of step {self.saving_step} could not be written: {str(cause) or repr(error)}"

    def close(self) -> None:
        """Leave the group, with all ranks, when nothing is under way any more."""
        dist.barrier()
        dist.destroy_process_group(self.group)


def end_write(aside: Path, saving: Future, write: Future) -> None:
    """Give `saving` what a write failed of, if it did, when nothing is left of it on the disk."""
    error = write.exception()
    if error is not None and sharding.rank() == 0:  # every rank has stopped writing when one learns of a failure
        shutil.rmtree(aside, ignore_errors=True)
    saving.set_result(error)


class SealingWriter(FileSystemWriter):
    """torch's writer of a folder of files, which it seals and renames to `folder` when every rank is done."""

    def __init__(self, folder: Path, state: dict, keep: int, on_seal: Callable[[], None]):
        super().__init__(aside_of(folder, "ranks"))
        self.folder, self.state, self.keep, self.on_seal = folder, state, keep, on_seal

    def write_data(self, plan, planner):
        """Write this rank's files and, beside them, their sums."""
        done = super().write_data(plan, planner)
        prefix = plan.storage_data.prefix
        sums = {path.name: file_sum(path) for path in sorted(Path(self.path).glob(f"{prefix}*.distcp"))}
        write_text(Path(self.path) / f"{prefix}sums.json", json.dumps(sums))
        return done

    def finish(self, metadata, results) -> None:
        """On the first rank, after all have written: metadata, seal, rename; then the oldest checkpoints go."""
        super().finish(metadata, results)
        self.on_seal()
        path, sums = Path(self.path), {}
        for part in sorted(path.glob("__*_sums.json")):
            sums.update(read_json(part))
            part.unlink()
        sums[".metadata"] = file_sum(path / ".metadata")
        write_text(path / SEAL, sealed({"state": self.state, "files": sums}))
        replace_folder(self.folder, path)
        for path in not_kept(self.folder, self.keep):
            shutil.rmtree(path, ignore_errors=True)


def sealed(content: dict) -> str:
    """Content as `checkpoint.json` has it, with its own checksum."""
    return json.dumps({**content, "sum": content_sum(content)})


def content_sum(content: dict) -> int:
    """CRC-32 of a value that JSON can hold."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_seal(path: Path) -> dict:
    """`state` and `files` of a checkpoint. Raises `ValueError` where there is none, or it is not as it was written."""
    if not (path / SEAL).is_file():
        raise ValueError(f"{path}: not a checkpoint: expected a folder such as RUN/checkpoints/step-00000100")
    content = read_json(path / SEAL)
    given = content.pop("sum", None) if isinstance(content, dict) else None
    if given is None or given != content_sum(content):
        raise ValueError(f"{path / SEAL}: damaged: it is not what its checksum was made of")
    return content


def found(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def not_kept(newest: Path, keep: int) -> list[Path]:
    """What goes now that `newest` is whole: all but the last `keep` up to it, and later steps, which a run left."""
    checkpoints = found(newest.parent)
    count = checkpoints.index(newest) + 1
    return [*checkpoints[: max(0, count - keep)], *checkpoints[count:]]


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with the newer ones. Called on every rank.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    candidates, problems = sharding.on_first_rank(lambda: found(folder)), []
    for path in reversed(candidates):
        damage = damage_of(path)
        if damage is None:
            return path, problems
        problems.append(damage)
    if candidates:
        raise ValueError("\n".join([f"{folder}: no good checkpoint to resume from:", *problems]))
    return None, problems


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, None where all is as it was written. The files are divided over the ranks."""
    try:
        files = read_seal(path)["files"]
        mine = sorted(files)[sharding.rank() :: sharding.num_ranks()]
        problems = [f"{path / name}: damaged" for name in mine if file_sum(path / name) != files[name]]
    except (OSError, ValueError) as error:
        problems = [f"{path}: damaged: {error}"]
    problems = sharding.gather_lists(problems)
    return problems[0] if problems else None


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint into tensors, in place and resharded; those it does not hold stay as they are.

    Called on every rank. The files' index is a pickle: only checkpoints of one's own runs are to be resumed.
    """
    reader = FileSystemReader(path)
    held = reader.read_metadata().state_dict_metadata
    dcp.load({name: tensor for name, tensor in tensors.items() if name in held}, storage_reader=reader)


def require_space(folder: Path, tensors: dict[str, Tensor], *, keep: int) -> None:
    """Raise `ValueError` where the disk cannot hold what is kept and one more, as the oldest goes when that is whole.

    Args:
        folder: of the checkpoints; those that are there already count.
    """
    number = max(2, max(1, keep) + 1 - len(found(folder)))
    needed = number * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        sizes = f"{number} checkpoints take {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        raise ValueError(f"{folder}: {sizes}; --keep says how many stay")
