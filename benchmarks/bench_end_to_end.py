"""train.py and score.py as whole processes on the shapes data: pairs/s, responses/s, and where the time goes.

The training process is the command itself under timed.py, which counts the seconds inside data preparation, forward,
backward and optimizer; the rest (imports, data check, writing) is overhead.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.harness import Case, Options, Row, lone_row
from mmrm_fast.data.records import RecordFile, iter_groups
from mmrm_fast.data.shapes import cached_environments
from mmrm_fast.train.defaults import TINY_CHECKPOINT

ROOT = Path(__file__).parents[1]
STEPS, QUICK_STEPS, SCORED = 40, 10, 500


@dataclass(frozen=True)
class TrainRun:
    """A training process."""

    seconds: float  # of the whole process
    step_seconds: float  # mean of the steps but the first
    pairs_per_second: float  # over those steps
    shares: dict[str, float]  # of the process's time


def cases(options: Options) -> Iterator[Case]:
    """Standard and robust training, and scoring with the model that the robust one leaves."""
    for method in ("standard", "robust"):
        yield Case(f"train {method}", partial(train_rows, method, options))
    yield Case("score", partial(score_rows, options))


def train_rows(method: str, options: Options) -> Iterator[Row]:
    """One process."""
    run = train_run(options, robust=method == "robust", threads=options.threads)
    shares = {f"share of {name}": share for name, share in run.shares.items()}
    details = {"pairs/s": run.pairs_per_second, **shares}
    yield lone_row("end-to-end", f"train.py {method}, shapes", run.seconds, options, details)


def train_run(
    options: Options, *, robust: bool = True, ranks: int = 1, threads: int, folder: Path | None = None
) -> TrainRun:
    """Train on shapes without test sets other than the data's own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch) / "run"
        seconds_file = Path(scratch) / "seconds.json"
        data = cached_environments()["opening"]
        arguments = [
            str(ROOT / "benchmarks" / "timed.py"), str(seconds_file), "train", "--data", str(data / "train.jsonl"),
            "--model", str(TINY_CHECKPOINT), "--max-steps", str(QUICK_STEPS if options.quick else STEPS),
            "--output-dir", str(folder), "--eval", f"iid={data / 'iid.jsonl'}", *["--robust"] * robust,
        ]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        seconds = process_seconds([*launcher, *arguments], threads)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        inside = json.loads(seconds_file.read_text())
    later = rows[1:]
    shares = {name: value / seconds for name, value in inside.items()}
    shares["overhead"] = 1 - sum(shares.values())
    total = sum(each["seconds"] for each in later)
    return TrainRun(seconds, total / len(later), sum(each["pairs"] for each in later) / total, shares)


def score_rows(options: Options) -> Iterator[Row]:
    """One process on a part of the i.i.d. test, and how long its start alone takes, on one record."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train_run(options, threads=options.threads, folder=folder / "run")
        source = cached_environments()["opening"] / "iid.jsonl"
        lines = source.read_text().splitlines()[: 50 if options.quick else SCORED]
        times, responses = {}, 0
        for name, chosen in (("start", lines[:1]), ("all", lines)):
            data = folder / f"{name}.jsonl"
            data.write_text("\n".join(chosen) + "\n")
            files = ["--data", str(data), "--image-root", str(source.parent), "--out", str(folder / "scores.jsonl")]
            arguments = [str(ROOT / "scripts" / "score.py"), "--model", str(folder / "run" / "final"), *files]
            times[name] = process_seconds(arguments, options.threads)
            responses = sum(len(group.responses) for group in iter_groups(RecordFile(data, source.parent)))
    details = {
        "responses/s": responses / times["all"],
        "seconds of one record": times["start"],  # nearly all of it is the start of Ray and of the process
    }
    yield lone_row("end-to-end", "score.py, shapes", times["all"], options, details)


def process_seconds(arguments: list[str], threads: int) -> float:
    """Seconds of a Python process; raises with its output when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.perf_counter() - start
