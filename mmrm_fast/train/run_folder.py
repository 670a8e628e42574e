"""Where a run is and whether it may go on there: its folder, its progress, its signals."""

import json
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import options
from mmrm_fast.data.records import RecordError
from mmrm_fast.files import read_json
from mmrm_fast.train import sharding
from mmrm_fast.train.resume import damage_of, newest_good, read_progress

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
# What may differ when a run goes on: none of it changes which records make a step or what is computed from them.
FREE = {
    "resume", "overwrite", "output_dir", "save_every", "save_minutes", "keep", "num_workers", "eval", "eval_ood",
    "eval_every", "best", "report_to", "check", "check_records", "skip_bad", "tokens_per_micro_batch", "compile",
    "activation_checkpointing", "reshard_after_forward", "replicas", "cpu_offload", "max_bad_steps", "config",
    "num_gpus", "gpu_memory", "dry_run",
}  # fmt: skip
WORK = ("metrics.jsonl", CHECKPOINTS, "best", "final")  # what a run folder without progress does not have
WRITTEN = (*WORK, CONFIG, "evaluations.jsonl", "tensorboard", "proxy", "results.json", "skipped.jsonl", "eval-*.jsonl")


@dataclass
class Progress:
    """All of a run's state but its tensors; the same on every rank."""

    config: dict
    step: int = 0
    consumed: int = 0  # records of the order
    skipped: list[dict] = field(default_factory=list)  # what skipped.jsonl lists
    counts: Counter = field(default_factory=Counter)  # of what is not trained on, by its name
    bad_steps: int = 0  # in a row, not finite
    best: float | None = None
    evaluated: int = 0  # step of the last evaluation

    def saved(self) -> dict:
        """As JSON; a copy."""
        return {**vars(self), "skipped": list(self.skipped), "counts": dict(self.counts)}

    @classmethod
    def of(cls, saved: dict) -> "Progress":
        """From what `saved` gave."""
        return cls(**{**saved, "counts": Counter(saved["counts"])})

    def skip(self, errors: list[RecordError]) -> None:
        """Note records and responses that are not trained on, each once however often it came."""
        if errors:
            rows = [*self.skipped, *({"source": e.source, "field": e.field, "reason": e.reason} for e in errors)]
            self.skipped = list({tuple(row.values()): row for row in rows}.values())


def config_json(config: TrainConfig) -> dict:
    """The config as it is saved with the run: options by name, without their groups."""
    return json.loads(json.dumps(options(config), default=str))


def open_run(config: TrainConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run starts from, None for its beginning, and what is wrong with newer ones.

    Called on every rank, before anything that takes long.

    Raises:
        ValueError: the run folder cannot be written to, or holds a run that this would damage or cannot continue.
    """
    folder = config.run.output_dir
    sharding.on_first_rank(lambda: require_writable(folder))
    if config.run.resume is None:
        sharding.on_first_rank(lambda: require_free(folder, config.run.overwrite))  # emptied when all is checked
        return None, []
    if config.run.resume == "auto":
        path, problems = newest_good(folder / CHECKPOINTS)
    else:
        path, problems = Path(config.run.resume), []
        if path.resolve().parent != (folder / CHECKPOINTS).resolve():
            raise ValueError(f"--resume {path}: not a checkpoint of the run folder {folder}")
        sharding.on_first_rank(lambda: read_progress(path))
        damage = damage_of(path)
        if damage:
            raise ValueError(f"--resume: {damage}")
    sharding.on_first_rank(lambda: require_same(config, path))
    return path, problems


def require_writable(folder: Path) -> None:
    """Raise `ValueError` where files cannot be made in the folder; leaves nothing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise ValueError(f"{folder}: the run folder cannot be written to: {error.strerror or error}") from None
    finally:
        for made in missing:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise `ValueError` where the folder holds a run, unless it may be replaced."""
    if not overwrite and any((folder / name).exists() for name in WORK):
        raise ValueError(
            f"{folder}: holds a run already: --resume auto continues it, --overwrite replaces it, or choose another"
            " --output-dir"
        )


def remove_run(folder: Path) -> None:
    """Delete what a run wrote into its folder."""
    for name in WRITTEN:
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_same(config: TrainConfig, checkpoint: Path | None) -> None:
    """Raise `ValueError` where the run in the folder was of a different config."""
    folder = config.run.output_dir
    if checkpoint is not None:
        before = read_progress(checkpoint)["config"]
    elif (folder / CONFIG).exists():
        before = read_json(folder / CONFIG)
    else:
        return
    now = config_json(config)
    changed = [name for name in sorted({*before, *now} - FREE) if before.get(name) != now.get(name)]
    if changed:
        listed = ", ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in changed)
        raise ValueError(f"{folder}: cannot be resumed with a different config: {listed}")


class Stopped(Exception):
    """A rank was told to end, and all know it."""


@contextmanager
def terminations() -> Iterator[list[int]]:
    """A list to which SIGTERM adds instead of ending the process."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
