"""train.py and score.py as whole processes on the shapes data: pairs/s, responses/s, and where the time goes.

What a training process writes of its steps says how long they took and how long each waited for its data; the rest
(imports, the check of the data, evaluation, writing) is outside of the steps.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.harness import Case, Options, Row, lone_row
from mmrm_fast.data.shapes import cached_environments
from mmrm_fast.files import json_lines
from mmrm_fast.train.command import TINY_CHECKPOINT

ROOT = Path(__file__).parents[1]
STEPS, QUICK_STEPS, SCORED = 40, 10, 500


def cases(options: Options) -> Iterator[Case]:
    """Standard and robust training, and scoring with the model that the robust one leaves."""
    for method in ("standard", "robust"):
        yield Case(f"train {method}", partial(train_rows, method, options))
    yield Case("score", partial(score_rows, options))


def train_rows(method: str, options: Options) -> Iterator[Row]:
    """One process."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, steps = train_run(Path(folder), options, robust=method == "robust")
    later = steps[1:]  # the first one's allocations are new
    details = {
        "pairs/s": total(later, "pairs") / total(later, "seconds"),
        "share of steps": total(steps, "seconds") / seconds,
        "share of data wait, inside of them": total(steps, "data_wait_seconds") / seconds,
    }
    yield lone_row("end-to-end", f"train.py {method}, shapes", [seconds], options, details)


def total(steps: list[dict], name: str) -> float:
    """Of some steps."""
    return sum(step[name] for step in steps)


def train_run(
    folder: Path, options: Options, *, robust: bool = True, ranks: int = 1, threads: int | None = None
) -> tuple[float, list[dict]]:
    """Seconds of training on shapes into `folder`, without test sets other than the data's own, and its steps."""
    data = cached_environments()["opening"]
    arguments = [
        str(ROOT / "scripts" / "train.py"), "--data", str(data / "train.jsonl"), "--model", str(TINY_CHECKPOINT),
        "--max-steps", str(QUICK_STEPS if options.quick else STEPS), "--output-dir", str(folder),
        "--eval", f"iid={data / 'iid.jsonl'}", *["--robust"] * robust,
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    seconds = process_seconds([*launcher, *arguments], threads or options.threads)
    return seconds, [step for _, step in json_lines(folder / "metrics.jsonl")]


def score_rows(options: Options) -> Iterator[Row]:
    """One process on a part of the i.i.d. test, and how long its start alone takes, on one record."""
    source = cached_environments()["opening"] / "iid.jsonl"
    lines = source.read_text().splitlines(keepends=True)[: 50 if options.quick else SCORED]
    with tempfile.TemporaryDirectory() as folder:
        train_run(Path(folder) / "run", options)
        score = partial(score_run, Path(folder), source.parent, options)
        (start, _), (seconds, responses) = score("one", lines[:1]), score("all", lines)
    # nearly all of one record's time is the start of Ray and of the process
    details = {"responses/s": responses / seconds, "seconds of one record": start}
    yield lone_row("end-to-end", "score.py, shapes", [seconds], options, details)


def score_run(folder: Path, image_root: Path, options: Options, name: str, lines: list[str]) -> tuple[float, int]:
    """Seconds of a process that scores records with the model in `folder`, and its number of scores."""
    records, scores = folder / f"{name}.jsonl", folder / f"{name}-scores.jsonl"
    records.write_text("".join(lines))
    arguments = [
        str(ROOT / "scripts" / "score.py"), "--model", str(folder / "run" / "final"), "--data", str(records),
        "--image-root", str(image_root), "--out", str(scores),
    ]  # fmt: skip
    return process_seconds(arguments, options.threads), len(scores.read_text().splitlines())


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
