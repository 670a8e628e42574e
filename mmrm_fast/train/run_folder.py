"""A run's folder: whether a run may begin or go on there, and what is written in it."""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch import Tensor

from mmrm_fast import files
from mmrm_fast.checkpoint.folder import Checkpoint, save_checkpoint
from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import options
from mmrm_fast.machine import this_machine
from mmrm_fast.pairs import PairRow, write_rows
from mmrm_fast.train import sharding
from mmrm_fast.train.margins import SHORTCUT
from mmrm_fast.train.resume import SEAL, RunState, damage_of, newest_good

CONFIG, ENVIRONMENT, CHECKPOINTS = "config.json", "environment.json", "checkpoints"
METRICS, EVALUATIONS, RESULTS, SKIPPED = "metrics.jsonl", "evaluations.jsonl", "results.json", "skipped.jsonl"
BEST, FINAL, PROXY = "best", "final", "proxy"
PROJECT = "mmrm_fast"  # in trackers
WORK = (METRICS, CHECKPOINTS, BEST, FINAL)  # what a run folder without progress does not have
WRITTEN = (*WORK, CONFIG, ENVIRONMENT, EVALUATIONS, "tensorboard", PROXY, SHORTCUT, RESULTS, SKIPPED, "eval-*.jsonl")
# What may differ when a run goes on: none of it changes which records make a step or what is computed from them.
FREE = {
    "resume", "overwrite", "accept_changed_data", "output_dir", "save_every", "save_minutes", "keep", "num_workers",
    "eval", "eval_ood", "eval_every", "best", "report_to", "check_records", "skip_bad", "tokens_per_micro_batch",
    "compile", "activation_checkpointing", "reshard_after_forward", "replicas", "hold_gradients", "cpu_offload",
    "config", "num_gpus", "gpu_memory", "dry_run", "deterministic", "max_bad_steps",
}  # fmt: skip


class RunFolder:
    """What a run writes of itself, on its first rank; `begin` comes first."""

    def __init__(self, path: Path):
        self.path, self.checkpoints = path, path / CHECKPOINTS
        self.trackers: list[GeneralTracker] = []

    def clear(self, *, replace: bool) -> None:
        """Make the folder; remove the run in it where that is to be replaced, and what a killed one left unfinished."""
        self.path.mkdir(parents=True, exist_ok=True)
        for found in [found for name in WRITTEN for found in self.path.glob(name)] if replace else ():
            files.remove(found)
        files.recover(self.path)

    def begin(self, state: RunState, report_to: tuple[str, ...]) -> None:
        """Write what the run is and what it runs on; go on after the state's step."""
        machine = this_machine().record() | {"ranks": str(sharding.num_ranks())}
        files.write_json(self.path / ENVIRONMENT, machine)
        files.write_text(self.path / CONFIG, json.dumps(state.config, indent=2) + "\n")
        for name in (METRICS, EVALUATIONS):
            keep_until(self.path / name, state.step)
        self.trackers = start_trackers(report_to, self.path, state.config, state.step)

    def log_step(self, row: dict[str, Any]) -> None:
        append_json(self.path / METRICS, row)
        self.track("train", {name: value for name, value in row.items() if name != "step"}, row["step"])

    def log_evaluation(self, step: int, results: dict[str, dict]) -> None:
        """The figures of all test sets after a step."""
        append_json(self.path / EVALUATIONS, {"step": step, "sets": results})
        for name, figures in results.items():
            self.track(f"eval/{name}", figures, step)

    def track(self, kind: str, values: dict[str, Any], step: int) -> None:
        """Report the numbers among the values as KIND/name, and in TensorBoard the histogram of the SFC."""
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        counts = values.get("sfc_histogram", ())
        for tracker in self.trackers:
            tracker.log({name: value for name, value in numbers.items() if math.isfinite(value)}, step=step)
            if tracker.name == "tensorboard" and sum(counts):
                edges = [(number + 1) / len(counts) for number in range(len(counts))]
                total = sum(count * (edge - 0.5 / len(counts)) for count, edge in zip(counts, edges, strict=True))
                sums = (sum(counts), total, total)
                tracker.tracker.add_histogram_raw(f"{kind}/sfc", 0, 1, *sums, edges, counts, step)

    def write_weights(self, name: str, checkpoint: Checkpoint, state: dict[str, Tensor], **notes: dict) -> None:
        """A plain checkpoint in a folder of this name, with notes as JSON files beside the weights."""
        with files.whole_folder(self.path / name, replace=True) as folder:
            save_checkpoint(folder, checkpoint, state)
            for note, value in notes.items():
                files.write_json(folder / f"{note}.json", value)

    def write_results(self, rows: dict[str, list[PairRow]], results: dict[str, dict], skipped: list[dict]) -> None:
        """The pairs of every test set, what was not trained on, and last the figures."""
        for name, own in rows.items():
            write_rows(self.path / f"eval-{name}.jsonl", own)
        files.write_json_lines(self.path / SKIPPED, skipped)
        files.write_json(self.path / RESULTS, results)

    def close(self) -> None:
        """Let the trackers send what is left."""
        for tracker in self.trackers:
            tracker.finish()


def start_trackers(names: Sequence[str], folder: Path, config: dict, step: int) -> list[GeneralTracker]:
    """TensorBoard, Weights & Biases, MLflow, for the run in `folder` that goes on after `step`."""
    PartialState()  # the trackers' own log asks it for the rank
    given = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": step + 1},
        "wandb": {
            "run_name": PROJECT, "name": folder.name, "dir": str(folder), "config": config, "resume": "allow",
            "id": str(folder.resolve()).replace(os.sep, "-")[-64:],
        },
        "mlflow": {"experiment_name": PROJECT, "run_name": folder.name},
    }  # fmt: skip
    trackers = [LOGGER_TYPE_TO_CLASS[name](**given[name]) for name in names]
    for tracker in trackers:
        tracker.start()
    return trackers


def append_json(path: Path, row: dict) -> None:
    """Append one JSON line; numbers that are not finite become null."""
    with open(path, "a") as file:
        file.write(json.dumps(files.finite(row), allow_nan=False) + "\n")


def keep_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, and what is no row, which is said; no row is left of a file for step 0."""
    if path.exists():
        rows = [row for _, row in files.json_lines(path, left_out=partial(print, "left out:", file=sys.stderr))]
        files.write_json_lines(path, [row for row in rows if row["step"] <= step])


def config_json(config: TrainConfig) -> dict:
    """The config as it is saved with the run: options by name, without their groups."""
    return json.loads(json.dumps(options(config), default=str))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run folder. Raises `ValueError` where one is in it, or it cannot be written to."""
    with ExitStack() as stack:

        def enter() -> None:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                raise ValueError(f"{folder}: the run folder cannot be written to: {there} is no folder to write in")
            stack.enter_context(files.locked(folder))

        sharding.on_first_rank(enter)
        yield


def open_run(config: TrainConfig) -> Path | None:
    """The checkpoint that a run starts from, None for its beginning; says what is wrong with newer ones.

    Called on every rank, before anything that takes long.

    Raises:
        ValueError: the run folder holds a run that this would damage or cannot continue.
    """
    folder = config.run.output_dir
    if config.run.resume is None:
        sharding.on_first_rank(lambda: require_free(folder, config.run.overwrite))  # emptied when all is checked
        return None
    sealed = lambda aside: (aside / SEAL).is_file()  # noqa: E731 what a killed run had sealed gets its name
    sharding.on_first_rank(lambda: files.recover(folder / CHECKPOINTS, is_whole=sealed))
    if config.run.resume == "auto":
        path, problems = newest_good(folder / CHECKPOINTS)
        if problems and sharding.rank() == 0:
            print("\n".join(problems), file=sys.stderr)
    else:
        path = Path(config.run.resume)
        if path.resolve().parent != (folder / CHECKPOINTS).resolve():
            raise ValueError(f"--resume {path}: not a checkpoint of the run folder {folder}")
        sharding.on_first_rank(lambda: RunState.read(path))
        damage = damage_of(path)
        if damage:
            raise ValueError(f"--resume: {damage}")
    sharding.on_first_rank(lambda: require_same(config, path))
    return path


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise `ValueError` where the folder holds a run, unless it may be replaced."""
    if not overwrite and any((folder / name).exists() for name in WORK):
        raise ValueError(
            f"{folder}: holds a run already: --resume auto continues it, --overwrite replaces it, or choose another"
            " --output-dir"
        )


def require_same(config: TrainConfig, checkpoint: Path | None) -> None:
    """Raise `ValueError` where the run in the folder was of a different config."""
    folder = config.run.output_dir
    if checkpoint is not None:
        before = RunState.read(checkpoint).config
    elif (folder / CONFIG).exists():
        before = files.read_json(folder / CONFIG)
    else:
        return
    now, before = config_json(config), config_json(TrainConfig()) | before
    unused = {"tokens_per_batch"} if now["pairs_per_step"] else set()
    gone = {name for name in before.keys() - now if not before[name]}  # and was not set
    changed = [name for name in sorted(before.keys() - FREE - unused - gone) if before[name] != now.get(name)]
    if changed:
        listed = ", ".join(f"{name} {before[name]!r} -> {now.get(name)!r}" for name in changed)
        raise ValueError(f"{folder}: cannot be resumed with a different config: {listed}")
