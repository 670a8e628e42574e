"""`python benchmarks/run.py`: time everything against its baseline, verified in the same run; `--help` for options."""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

# GNU OpenMP's waiting threads otherwise spin without end: one busy neighbour makes a step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Huge pages behind torch's CPU tensors: the page faults of large fp32 activations cost a tenth of their products.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from tqdm import tqdm

from benchmarks import bench_depth, bench_end_to_end, bench_ops, bench_scale, bench_score, bench_serve, bench_train_step
from benchmarks.harness import Case, Options
from benchmarks.report import ResultFile, environment, plot, print_rows, read_rows, regressions, results_path

SUITES = {
    "train-step": bench_train_step.cases,
    "score": bench_score.cases,
    **{suite: partial(bench_ops.cases, suite) for suite in ("preprocess", "loader", "plan", "ops")},
    "scale": bench_scale.cases,
    "end-to-end": bench_end_to_end.cases,
    "serve": bench_serve.cases,
    "depth": bench_depth.cases,
}


def main() -> int:
    """Run the suites; returns 1 where a row's results differ from its baseline's."""
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    earlier = read_rows(options.compare) if options.compare else []
    results = ResultFile(results_path(options), environment(options), resume=options.full)
    unfinished = [(name, case) for name, case in cases(options) if name not in results.finished]
    if results.finished:
        print(f"{len(results.finished)} cases are in {results.path} already; without that file they run again")
    for name, case in (bar := tqdm(unfinished)):
        bar.set_description(name)
        results.add(name, list(case.run()))
    print_rows(results.environment, results.rows)
    slower = [f"slower: {line}" for line in regressions(results.rows, earlier)]
    print(*slower, results.path, *plot(results.path, results.environment, results.rows), sep="\n")
    return 0 if all(row.verified is not False for row in results.rows) else 1


def cases(options: Options) -> Iterator[tuple[str, Case]]:
    """Every case of the suites that are asked for, with a name that no other has."""
    for suite in [options.suite] if options.suite else SUITES:
        for case in SUITES[suite](options):
            yield f"{suite}: {case.name}", case


if __name__ == "__main__":
    sys.exit(main())
