"""The paper's question on one's own machine: does the shortcut-aware model hold where the standard one breaks?

Every method is trained on every environment and tested on all of them. A cell is one training, in a process of its
own; a cell whose results exist is not trained again.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from tqdm import tqdm

from mmrm_fast.config import StudyConfig
from mmrm_fast.evaluate import percent, print_table, read_rows, shortcut_failure_degradation
from mmrm_fast.shapes import ENVIRONMENTS, cached_environments

METHODS = ("standard", "robust")
FIGURES = ("iid_labels", "iid_truth", "ood_truth", "neutral", "reversed", "sfd")


@dataclass(frozen=True)
class Cell:
    """One training: a method on an environment with a seed."""

    method: str
    environment: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Its run folder."""
        return root / f"{self.method}-{self.environment}-{self.seed}"


def study(config: StudyConfig) -> dict:
    """Train every cell, write study.json and study.csv, print the table; returns what study.json holds."""
    root = config.output_dir
    root.mkdir(parents=True, exist_ok=True)
    environments = cached_environments()
    seeds = 1 if config.quick else config.seeds
    cells = [Cell(method, name, seed) for seed in range(seeds) for name in ENVIRONMENTS for method in METHODS]
    train_cells([cell for cell in cells if not (cell.folder(root) / "results.json").exists()], config)
    rows = [{**vars(cell), **cell_figures(cell, root)} for cell in cells]
    results = {"cells": rows, "means": means(rows), "iid_bounds": iid_bounds(rows, environments)}
    (root / "study.json").write_text(json.dumps(results, indent=2) + "\n")
    with open(root / "study.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print_table(study_table(results))
    print(f"all figures: {root / 'study.json'}")
    return results


def train_cells(cells: list[Cell], config: StudyConfig) -> None:
    """Train cells, `config.jobs` at a time; the first failure stops the study with the end of its log."""
    with ThreadPoolExecutor(config.jobs) as pool, tqdm(total=len(cells), desc="trainings") as bar:
        runs = [pool.submit(train_cell, cell, config) for cell in cells]
        for run in as_completed(runs):
            if run.exception():
                pool.shutdown(cancel_futures=True)
            run.result()
            bar.update()


def train_cell(cell: Cell, config: StudyConfig) -> None:
    """Train one cell in a process of its own, its output in log.txt."""
    folder = cell.folder(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mmrm_fast.cli", "train", "--environment", cell.environment]
    command += ["--seed", str(cell.seed), "--output-dir", str(folder), "--overwrite"]
    command += ["--robust"] if cell.method == "robust" else []
    threads = max(1, len(os.sched_getaffinity(0)) // config.jobs)
    with open(folder / "log.txt", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        tail = (folder / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"{cell} failed, see {folder / 'log.txt'}:\n{tail}")


def cell_figures(cell: Cell, root: Path) -> dict[str, float]:
    """The figures of one cell; its SFD is judged by the proxy of the robust run on the same data and seed."""
    folder = cell.folder(root)
    sets = json.loads((folder / "results.json").read_text())
    ood = [figures["truth_accuracy"] for figures in sets.values() if figures["kind"] == "ood"]
    return {
        "iid_labels": sets["iid"]["accuracy"],
        "iid_truth": sets["iid"]["truth_accuracy"],
        "ood_truth": float(np.mean(ood)),
        "neutral": sets["neutral"]["truth_accuracy"],
        "reversed": sets["reversed"]["truth_accuracy"],
        "sfd": ood_degradation(cell, root, [name for name, figures in sets.items() if figures["kind"] == "ood"]),
    }


def ood_degradation(cell: Cell, root: Path, sets: list[str]) -> float:
    """Mean SFD over the o.o.d. sets, against the truth."""
    proxied = Cell("robust", cell.environment, cell.seed).folder(root)
    values = []
    for name in sets:
        rows = read_rows(cell.folder(root) / f"eval-{name}.jsonl")
        sign = np.sign([row.truth for row in rows])
        proxy = np.array([row.proxy_margin for row in read_rows(proxied / f"eval-{name}.jsonl")])
        values.append(shortcut_failure_degradation(np.array([row.margin for row in rows]) * sign, proxy * sign))
    return float(np.mean(values))


def means(rows: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Per method and figure, the mean over environments and seeds and its spread (std of the seeds' means)."""
    table = {}
    for method in METHODS:
        seeds = sorted({row["seed"] for row in rows})
        by_seed = {
            figure: [np.mean([r[figure] for r in rows if (r["method"], r["seed"]) == (method, seed)]) for seed in seeds]
            for figure in FIGURES
        }
        table[method] = {figure: [float(np.mean(v)), float(np.std(v))] for figure, v in by_seed.items()}
    return table


def iid_bounds(rows: list[dict], environments: dict[str, Path]) -> list[dict]:
    """Per environment, what robust loses on noisy i.i.d. labels and what only the cues can predict of them."""
    bounds = []
    for name, folder in environments.items():
        facts = json.loads((folder / "environment.json").read_text())["splits"]["iid"]
        labels = {
            m: np.mean([r["iid_labels"] for r in rows if (r["method"], r["environment"]) == (m, name)]) for m in METHODS
        }
        lost = float(labels["standard"] - labels["robust"])
        bounds.append({"environment": name, "lost": lost, "allowed": facts["allowed_loss"] + 0.02})
    return bounds


def study_table(results: dict) -> Table:
    """One row a method and environment (mean over seeds), then the means with their spread."""
    table = Table(
        title="Accuracy (%), mean over seeds; o.o.d. = the other environments' i.i.d. tests, judged by the truth"
    )
    for column in (
        "method",
        "trained on",
        "i.i.d. labels",
        "i.i.d. truth",
        "o.o.d. truth",
        "neutral",
        "reversed",
        "SFD",
    ):
        table.add_column(column, justify="left" if column in ("method", "trained on") else "right")
    for cells in table_rows(results):
        table.add_row(*cells)
    return table


def table_rows(results: dict) -> Iterator[tuple[str, ...]]:
    """The study table's cells."""
    for method in METHODS:
        for name in ENVIRONMENTS:
            own = [row for row in results["cells"] if (row["method"], row["environment"]) == (method, name)]
            yield method, name, *(percent(float(np.mean([row[figure] for row in own]))) for figure in FIGURES)
    for method, figures in results["means"].items():
        yield method, "mean ± spread", *(f"{percent(m)} ± {percent(s)}" for m, s in figures.values())
