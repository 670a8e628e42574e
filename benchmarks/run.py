"""`python benchmarks/run.py`: time everything against its baseline, verified in the same run; `--help` for options."""

import os
import sys
from pathlib import Path

# GNU OpenMP's waiting threads otherwise spin without end: one busy neighbour makes a step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from rich.console import Console

from benchmarks import (
    bench_pack_image_tokens,
    bench_pair_loss,
    bench_patchify,
    bench_pixel_shuffle_norm,
    bench_plan_trie,
    bench_reward_head,
    bench_train_step,
)
from benchmarks.harness import Options, environment, print_table, results_path, write_json

SUITES = {
    "train-step": (bench_train_step,),
    "ops": (bench_pair_loss, bench_reward_head, bench_pack_image_tokens, bench_pixel_shuffle_norm, bench_patchify),
    "plan": (bench_plan_trie,),
}


def main() -> int:
    """Run the suites; returns 1 where a row's results differ from its baseline's."""
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    console, rows = Console(width=None if sys.stdout.isatty() else 120), []
    for suite in [options.suite] if options.suite else SUITES:
        with console.status(f"{suite} ..."):
            for bench in SUITES[suite]:
                rows.extend(bench.rows(options))
    print_table(console, environment(options), rows)
    write_json(results_path(options), environment(options), rows)
    return 0 if all(row.verified for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
