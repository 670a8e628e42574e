"""The paper's question on one's own data: does the shortcut-aware model hold where the standard one breaks?

Every method is trained on every environment and tested on all of them. A cell is one training, in a process of its
own; a cell whose results exist is not trained again.
"""

import csv
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from mmrm_fast.config import StudyConfig
from mmrm_fast.data.shapes import ALL_ENVIRONMENTS, ENVIRONMENTS, cached_environments
from mmrm_fast.files import read_json, write_json
from mmrm_fast.study.figures import SFD, Cell, Environment, Runs, means_table, study_figures
from mmrm_fast.study.page import KINDS, comparison_rows, write_study
from mmrm_fast.tables import print_table

METHODS = {  # options of `mmrm-fast train`
    "standard": "",
    "robust": "--robust",
    "robust-reference": "--robust --sfc-mode reference",
    "robust-balanced": "--robust --sfc-mode balanced",
    "robust-white": "--robust --proxy-image white",
    "robust-lora": "--robust --proxy-model lora",
    "robust-ngrams": "--robust --proxy-model ngrams",
    "robust-ngrams-balanced": "--robust --proxy-model ngrams --sfc-mode balanced",
    "robust-probe": "--robust --proxy-model probe",
    "robust-probe-balanced": "--robust --proxy-model probe --sfc-mode balanced",
}
OPTIONS = "options.json"  # in a cell's folder
RESERVED = ("iid", "neutral", "reversed")  # names of test sets


def study(config: StudyConfig) -> None:
    """Train every cell, write study.json, study.csv and study.html, print the table."""
    results, root = results_of(config), config.output_dir
    write_json(root / "study.json", results)
    write_csv(root / "study.csv", results["tests"])
    write_csv(root / "comparisons.csv", results["significance"])
    if config.best_of_n:
        write_csv(root / "best-of-n.csv", results["best_of_n"]["models"])
    write_study(root / "study.html", results)
    report(results, root)


def results_of(config: StudyConfig) -> dict:
    """Train the cells that are missing; what study.json holds."""
    root, started = config.output_dir, time.perf_counter()
    methods, environments = chosen_methods(config.methods), chosen_environments(config.env)
    if config.best_of_n and not of_shapes(config.env):
        raise ValueError("--best-of-n: only where the truth is known, on the synthetic environments without --env")
    root.mkdir(parents=True, exist_ok=True)
    seeds = range(config.seeds)
    trained = [name for name, own in environments.items() if own.is_trained]
    cells = [Cell(method, name, seed) for seed in seeds for name in trained for method in methods]
    missing = [cell for cell in cells if not is_trained(cell, environments, config)]
    train_cells(missing, environments, config)
    results = {
        "trained_now": len(missing),
        "seconds": round(time.perf_counter() - started, 1),
        "methods": {method: METHODS[method] for method in methods},
        "environments": {name: {"train": str(e.train), "test": str(e.test)} for name, e in environments.items()},
        **study_figures(Runs(cells, environments, root)),
    }
    if config.best_of_n:
        from mmrm_fast.study.selection import selection_figures  # loads transformers

        results["best_of_n"] = selection_figures(cells, root)
    return results


def chosen_methods(text: str) -> list[str]:
    """Method names from a list with commas. Raises `ValueError`."""
    methods = list(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"--methods {text}: expected some of {', '.join(METHODS)}")
    return methods


def chosen_environments(specs: tuple[str, ...]) -> dict[str, Environment]:
    """Environments from NAME=TRAIN,TEST, or names of shapes environments, by default the first three, which all are
    tested on. Raises `ValueError`.
    """
    if of_shapes(specs):
        trained = specs or ENVIRONMENTS
        folders = cached_environments(environments=tuple(dict.fromkeys((*trained, *ENVIRONMENTS))))
        return {
            name: Environment(
                folder / "train.jsonl",
                folder / "iid.jsonl",
                {probe: folder / f"{probe}.jsonl" for probe in ("neutral", "reversed")},
                is_trained=name in trained,
                is_tested=name in ENVIRONMENTS,
            )
            for name, folder in folders.items()
        }
    environments = {}
    for spec in specs:
        name, _, paths = spec.partition("=")
        train, _, test = paths.partition(",")
        if not (name and train and test) or "/" in name:
            raise ValueError(f"--env {spec}: environments are given as NAME=TRAIN,TEST")
        if name in environments or name in RESERVED:
            raise ValueError(f"--env {spec}: the name is taken; {', '.join(RESERVED)} are names of test sets")
        for path in (train, test):
            if not Path(path).exists():
                raise ValueError(f"--env {spec}: {path}: no such file")
        environments[name] = Environment(Path(train), Path(test), {})
    return environments


def of_shapes(specs: tuple[str, ...]) -> bool:
    """Whether the environments are the synthetic ones."""
    return all(spec in ALL_ENVIRONMENTS for spec in specs)


def is_trained(cell: Cell, environments: Mapping[str, Environment], config: StudyConfig) -> bool:
    """Whether the cell's results are there. Raises `ValueError` where it was trained with other options."""
    folder = cell.folder(config.output_dir)
    before, now = folder / OPTIONS, options(cell, environments, config)
    if before.exists() and (other := read_json(before)) != now:
        raise ValueError(
            f"{folder}: was trained with {shlex.join(other)}, not {shlex.join(now)}: choose another --output-dir, or"
            " delete the folder"
        )
    return (folder / "results.json").exists()


def train_cells(cells: list[Cell], environments: Mapping[str, Environment], config: StudyConfig) -> None:
    """Train cells, `config.jobs` at a time; the first failure stops the study with the end of its log."""
    with (
        ThreadPoolExecutor(config.jobs) as pool,
        tqdm(total=len(cells), desc="trainings", unit=" runs", disable=not cells) as bar,
    ):
        runs = [pool.submit(train_cell, cell, environments, config) for cell in cells]
        for run in as_completed(runs):
            if run.exception():
                pool.shutdown(cancel_futures=True)
            run.result()
            bar.update()


def train_cell(cell: Cell, environments: Mapping[str, Environment], config: StudyConfig) -> None:
    """Train one cell in a process of its own, its output in log.txt."""
    folder = cell.folder(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / OPTIONS, options(cell, environments, config))
    threads = max(1, len(os.sched_getaffinity(0)) // config.jobs)
    with open(folder / "log.txt", "w") as log:
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command(cell, environments, config), stdout=log, stderr=subprocess.STDOUT, env=variables)
    if done.returncode:
        tail = (folder / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"{cell} failed, see {folder / 'log.txt'}:\n{tail}")


def command(cell: Cell, environments: Mapping[str, Environment], config: StudyConfig) -> list[str]:
    """The command line that trains a cell."""
    launcher = [sys.executable, "-m"]
    if config.processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={config.processes}", "-m"]
    run = ["--output-dir", str(cell.folder(config.output_dir)), "--resume", "auto"]
    return [*launcher, "mmrm_fast.cli", "train", *options(cell, environments, config), *run]


def options(cell: Cell, environments: Mapping[str, Environment], config: StudyConfig) -> list[str]:
    """What a cell is trained with."""
    own = environments[cell.environment]
    if not of_shapes(config.env):
        data = ["--data", str(own.train), "--eval", f"iid={own.test}"]
        others = [f"{name}={other.test}" for name, other in environments.items() if name != cell.environment]
        data += ["--eval-ood", *others] if others else []
    else:
        data = ["--environment", cell.environment]
    model = ["--model", str(config.model)] if config.model else []
    method = shlex.split(METHODS[cell.method]) + shlex.split(config.options)
    return [*data, *model, "--seed", str(cell.seed), *method]


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows as CSV."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def report(results: dict, root: Path) -> None:
    """Print the table, the tests of significance and where everything is."""
    title = "Accuracy (%), mean over seeds; o.o.d.: the other environments' tests; truth where known"
    print_table(title, *means_table(results), num_text=2)
    print(SFD)
    print_comparisons("o.o.d. accuracy in points", comparison_rows(results["significance"], scale=100, digits=1))
    if selection := results.get("best_of_n"):
        for kind, title in KINDS.items():
            best = f"truth of the best of {selection['sizes'][-1]}, {title}"
            print_comparisons(best, comparison_rows(selection[kind]["comparisons"]))
    print(f"figures: {root}/study.json, study.csv, comparisons.csv; page: {root / 'study.html'}")


def print_comparisons(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print paired differences, a line each."""
    if rows:
        print(f"{title}, paired over {rows[0][-1]} records, p corrected for {len(rows)} comparisons:")
    for names, difference, low, high, p, _ in rows:
        print(f"  {names}: {difference} ({low} to {high}), p = {p}")
