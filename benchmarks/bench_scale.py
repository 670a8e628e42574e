"""Cost as the work grows: responses, tiles, pairs of a step and ranks; the plot is log over log, with slopes.

Responses and tiles are scored, against per-response padded scoring; pairs are trained on, ours alone; ranks are whole
`train.py` processes of one thread each on the shapes data, ours alone.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import bench_score
from benchmarks.bench_end_to_end import total, train_run
from benchmarks.bench_train_step import our_side
from benchmarks.harness import MODEL_REPEATS, Case, Options, Row, interleaved, lone_row
from benchmarks.models import PROBE, cast, geometry, make_model, make_records

RESPONSES, TILES, PAIRS, RANKS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 7, 12), (1, 2, 4, 8, 16, 32), (1, 2)


def cases(options: Options) -> Iterator[Case]:
    """One case a point; `--quick` leaves out the largest ones."""
    for axis, sizes in (("responses", RESPONSES), ("tiles", TILES)):
        for size in sizes[:4] if options.quick else sizes:
            records = ((7, (150,) * size),) if axis == "responses" else ((size, (150, 150)),)
            run = partial(
                bench_score.rows, "scale", f"score {size} {axis}", records, torch.float32, options,
                kinds=["padded"], axis=axis, size=size,
            )  # fmt: skip
            yield Case(f"{size} {axis}", run)
    for size in PAIRS[:4] if options.quick else PAIRS:
        yield Case(f"{size} pairs", partial(pair_rows, size, options))
    for size in RANKS[:1] if options.quick else RANKS:
        yield Case(f"{size} ranks", partial(rank_rows, size, options))


def pair_rows(size: int, options: Options) -> Iterator[Row]:
    """A standard step of `size` pairs, the probe's records in turns."""
    records = make_records(geometry(options), [PROBE[at % len(PROBE)] for at in range(size)])
    model = cast(make_model(records.sizes), torch.float32, options.device)
    side = our_side(records.pack().to(options.device), [model], "paper")
    side.step()
    (samples,) = interleaved([side.step], repeats=min(options.repeats, MODEL_REPEATS), min_seconds=0)
    yield lone_row("scale", f"train-step {size} pairs", samples, options, {"axis": "pairs a step", "size": size})


def rank_rows(size: int, options: Options) -> Iterator[Row]:
    """Seconds a step of train.py on that many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        _, (_, *steps) = train_run(Path(folder), options, ranks=size, threads=1)
    seconds = total(steps, "seconds") / len(steps)
    yield lone_row("scale", f"train {size} ranks", [seconds], options, {"axis": "ranks", "size": size})
