"""`mmrm-fast report RUN [RUN ...]`: one self-contained HTML page of what runs did, without a network or a script."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from mmrm_fast.data.images import load_image
from mmrm_fast.data.pictures import ImageRoots
from mmrm_fast.data.records import Group, Records
from mmrm_fast.data.types import file_of
from mmrm_fast.evaluate import plots
from mmrm_fast.evaluate.config import ReportConfig
from mmrm_fast.evaluate.page import write_page
from mmrm_fast.evaluate.reliability import calibration
from mmrm_fast.files import json_lines, read_json
from mmrm_fast.ops.pair_loss import pair_loss
from mmrm_fast.pairs import judged_accuracy
from mmrm_fast.tables import percent

SHOWN_PAIRS = 10
THUMBNAIL = (480, 320)  # pixels
CURVES = {  # title: the metrics of it, by what is appended to the run's name
    "loss": {"": "loss_main", " proxy": "loss_proxy"},
    "training accuracy": {"": "accuracy", " proxy": "proxy_accuracy"},
    "margin": {"": "margin"},
    "mean SFC": {"": "sfc_mean"},
    "gradient norm": {"": "grad_norm", " proxy": "proxy_grad_norm"},
    "learning rate": {"": "lr"},
    "tokens a second": {"": "tokens_per_second"},
    "model FLOPs utilisation": {"": "mfu"},
}
FIGURES = {"labels": "accuracy", "truth": "truth_accuracy", "proxy": "proxy_accuracy", "SFD": "sfd"}


@dataclass(frozen=True)
class Run:
    """What a run folder holds; what is not there is empty."""

    folder: Path
    name: str
    config: dict
    environment: dict
    metrics: list[dict]  # a row a step
    evaluations: list[dict]  # a row an evaluation
    results: dict[str, dict]  # figures by test set
    pairs: dict[str, list[dict]]  # evaluated pairs by test set


def report(config: ReportConfig) -> None:
    """Write the page of `config.runs`."""
    if not config.runs:
        raise ValueError("give the folder of a run, such as runs/robust")
    runs = [read_run(folder) for folder in config.runs]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    out = config.out or config.runs[0] / "report.html"
    write_page(
        out,
        "report.html",
        title=" · ".join(run.name for run in runs),
        runs=[section(run) for run in runs],
        accuracies=accuracy_table(runs),
        shared_charts=[*accuracy_chart(runs), *curve_charts(runs)],
    )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises `ValueError` where there is no run."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; expected the folder of a run, as `mmrm-fast train` leaves it")
    config, environment, results = (
        read_json(path) if (path := folder / f"{name}.json").is_file() else {}
        for name in ("config", "environment", "results")
    )
    metrics, evaluations = (read_rows(folder / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    pairs = {path.stem.removeprefix("eval-"): read_rows(path) for path in sorted(folder.glob("eval-*.jsonl"))}
    return Run(folder, folder.resolve().name, config, environment, metrics, evaluations, results, pairs)


def read_rows(path: Path) -> list[dict]:
    """JSON lines, without those that a running or killed process has left unfinished; empty where there is no file."""
    return [row for _, row in json_lines(path, left_out=lambda line: None)] if path.is_file() else []


def section(run: Run) -> dict:
    """What the template shows of one run."""
    seconds = sum(row.get("seconds") or 0 for row in run.metrics)
    pairs = sum(row.get("pairs") or 0 for row in run.metrics)
    method = "shortcut-aware" if run.config.get("robust") else "standard"
    return {
        "name": run.name,
        "summary": f"{run.name}: {method}, {len(run.metrics)} steps, {pairs:,} pairs, {seconds / 60:,.1f} minutes",
        "charts": run_charts(run),
        "galleries": galleries(run),
        "tables": {"Config": run.config, "Environment": run.environment},
    }


def accuracy_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the figures of every test set and run, for the figures that any of them has."""
    sets = {name: None for run in runs for name in run.results}
    rows = [(name, run, run.results[name]) for name in sets for run in runs if name in run.results]
    found = {head: key for head, key in FIGURES.items() if any(key in figures for _, _, figures in rows)}
    several = len(runs) > 1
    return ["test set", *(["run"] if several else []), "kind", "pairs", *found], [
        [name, *([run.name] if several else []), figures.get("kind", ""), str(figures.get("pairs", ""))]
        + [percent(figures.get(key)) for key in found.values()]
        for name, run, figures in rows
    ]


def accuracy_chart(runs: Sequence[Run]) -> list[str]:
    """Accuracy by test set, against the truth where it is known."""
    sets = {name: figures.get("kind", "") for run in runs for name, figures in run.results.items()}
    if not sets:
        return []
    judged = {
        run.name: [judged_accuracy(run.results[name]) if name in run.results else None for name in sets] for run in runs
    }
    names = [f"{name} ({kind})" if kind and kind != name else name for name, kind in sets.items()]
    title = "accuracy by test set"
    return [plots.svg(plots.bars(title, names, judged), title)]


def curve_charts(runs: Sequence[Run]) -> Iterable[str]:
    """One chart a metric, a colour a run, for the metrics that there are."""
    for title, parts in CURVES.items():
        curves = {run.name + suffix: series(run, key) for run in runs for suffix, key in parts.items()}
        curves = {name: (x, y) for name, (x, y) in curves.items() if any(y)}
        if curves:
            yield plots.svg(plots.lines(title, curves), title)


def series(run: Run, key: str) -> tuple[list, list]:
    """A metric's steps and values, where it has any."""
    if key == "sfc_mean" and not run.config.get("robust"):
        return [], []
    rows = [(row["step"], row[key]) for row in run.metrics if row.get(key) is not None and "step" in row]
    return [step for step, _ in rows], [value for _, value in rows]


def run_charts(run: Run) -> list[str]:
    """The charts of one run: tests during training, SFC over time, calibration, margins by test set."""
    drawn = {"test accuracy": plots.lines("test accuracy", tested)} if (tested := test_accuracies(run)) else {}
    rows = [row for row in run.metrics if row.get("sfc_histogram") and any(row["sfc_histogram"])]
    if rows and run.config.get("robust"):
        title, histograms = "SFC of the training pairs", np.array([row["sfc_histogram"] for row in rows])
        drawn[title] = plots.sfc_over_time([row["step"] for row in rows], histograms, title)
    sets = {name: np.array([row["margin"] for row in rows], float) for name, rows in run.pairs.items() if rows}
    if sets:
        drawn["Calibration"] = plots.reliability({name: calibration(values) for name, values in sets.items()})
    for name, values in sets.items():
        proxy = [row.get("proxy_margin") for row in run.pairs[name]]
        title = f"margins on {name}"
        drawn[title] = plots.margins(values, None if None in proxy else np.array(proxy, float), title)
    return [plots.svg(figure, title) for title, figure in drawn.items()]


def test_accuracies(run: Run) -> dict[str, tuple[list, list]]:
    """By test set, the steps it was evaluated after and the accuracies, against the truth where it is known."""
    curves: dict[str, tuple[list, list]] = {}
    for row in run.evaluations:
        for name, figures in row.get("sets", {}).items():
            steps, shares = curves.setdefault(name, ([], []))
            steps.append(row["step"])
            shares.append(judged_accuracy(figures))
    return curves


def galleries(run: Run) -> list[tuple[str, str, list[dict]]]:
    """Heading, note and pairs of the pairs worth looking at."""
    mode = run.config.get("sfc_mode", "paper")
    rows = [{**row, "set": name} for name, rows in run.pairs.items() for row in rows]
    weighted = [row for row in rows if row.get("proxy_margin") is not None]
    margins = torch.tensor([(row["margin"], row["proxy_margin"]) for row in weighted]).double().reshape(-1, 2)
    for row, weight in zip(weighted, pair_loss(*margins.unbind(1), mode=mode).sfc.tolist(), strict=True):
        row["weight"] = weight
    note = f"The evaluated pairs that the run's mode, {mode}, weighs most: the text-only proxy fails on them."
    found = [
        ("Most up-weighted pairs", note, sorted(weighted, key=lambda row: -row["weight"])),
        ("Worst pairs", "The evaluated pairs with the lowest margin.", sorted(rows, key=lambda row: row["margin"])),
    ]
    roots = ImageRoots.parse(run.config.get("image_root") or [])
    open_file = cache(lambda path, name: Records(path, image_root=roots, name=name))
    return [(*said, [row | shown(row, open_file) for row in pairs[:SHOWN_PAIRS]]) for *said, pairs in found]


def shown(row: dict, open_file: Callable[[str, str], Records]) -> dict:
    """As much of an evaluated pair's record as can be read."""
    card = {"prompt": "", "chosen": "", "rejected": "", "images": []}
    try:
        group = record_at(row["source"], row["record"], open_file(file_of(row["source"]), row["set"]))
        card |= {"prompt": text_of(group)} | {end: group.responses[row[end]] for end in ("chosen", "rejected")}
        card["images"] = [thumbnail(image) for image in group.images]
    except (ValueError, OSError, IndexError) as error:
        card["problem"] = str(error)
    return card


def record_at(source: str, record: int, file: Records) -> Group:
    """The record that stands at `source`, "FILE:LINE" or "FILE[PLACE]", and was number `record` of its set."""
    for place in (record, *range(len(file))):
        if place < len(file) and file.source(place) == source:
            return file.group(place)
    raise ValueError(f"{source}: no such record any more")


def text_of(group: Group) -> str:
    """A prompt as text, the messages of a conversation one after the other."""
    if isinstance(group.prompt, str):
        return group.prompt
    return "\n".join(f"{message.role}: {message.content} {message.extra}".strip() for message in group.prompt)


def thumbnail(image: str | bytes) -> str:
    """A picture as a data URL of a JPEG no larger than `THUMBNAIL`."""
    picture = load_image(image)
    picture.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
