"""The numbers of a study, from the run folders of its cells: accuracies and SFD by train and test set, means, tests.

A test row is one model on one test set. `judged` accuracy is against the truth where the data knows it, else against
the labels. SFD is judged by the text-only proxy of the first method that has one, on the same data and seed, so that
methods without a proxy have it too.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import permutation_test

from mmrm_fast.data.records import Group, Records, iter_groups
from mmrm_fast.evaluate.reliability import credit, mean_interval, text_controls
from mmrm_fast.files import json_lines, read_json
from mmrm_fast.pairs import PairRow, judged_accuracy, read_rows, summarize, truth_sign
from mmrm_fast.tables import percent, plus_minus

SFD = (
    "SFD (shortcut-failure degradation): accuracy on the test pairs that the text-only proxy trained on the same data "
    "gets right, minus accuracy on those it gets wrong (its ties are in neither); our reading of Li et al., arXiv "
    "2503.03122."
)
FIGURES = {  # of a method, and their heads
    "iid labels": "i.i.d. labels", "iid": "i.i.d.", "ood": "o.o.d.", "neutral": "neutral", "reversed": "reversed",
    "sfd": "SFD",
}  # fmt: skip
COSTS = ("time", "memory")
FITTED = Path("shortcut", "fitted.json")  # of a run whose proxy was fitted before its first step
PARTS_OF_TRAINING = 25
RESAMPLES = 9999
BATCH_VALUES = 1 << 20  # resampled differences in memory at a time


@dataclass(frozen=True)
class Cell:
    """One training: a method on an environment with a seed."""

    method: str
    environment: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Its run folder."""
        return root / f"{self.method}-{self.environment}-{self.seed}"


@dataclass(frozen=True)
class Environment:
    """A training file, the test file of its distribution, and probes of its shortcut by name."""

    train: Path
    test: Path
    probes: Mapping[str, Path]
    is_trained: bool = True
    is_tested: bool = True  # by models of other environments


class Runs:
    """The finished cells of a study; evaluated rows and test files are read once."""

    def __init__(self, cells: Sequence[Cell], environments: Mapping[str, Environment], root: Path):
        self.cells, self.environments, self.root = tuple(cells), dict(environments), root
        self.methods = list(dict.fromkeys(cell.method for cell in cells))
        self.steps = cache(lambda cell: [row for _, row in json_lines(cell.folder(root) / "metrics.jsonl")])
        self.rows = cache(lambda cell, name: read_rows(cell.folder(root) / f"eval-{name}.jsonl"))
        self.groups = cache(self.read_groups)

    def read_groups(self, environment: str) -> dict[int, Group]:
        """The records of an environment's test by their position."""
        groups = iter_groups(Records(self.environments[environment].test, split="test"))
        return {group.record: group for group in groups if isinstance(group, Group)}

    def of(self, method: str) -> list[Cell]:
        """The cells of a method."""
        return [cell for cell in self.cells if cell.method == method]

    def sets(self, cell: Cell) -> list[tuple[str, str, str]]:
        """The test sets of a cell: what it is, its kind and the name that the run knows it by."""
        trained = cell.environment
        others = [name for name, own in self.environments.items() if own.is_tested and name != trained]
        sets = [(trained, "iid", "iid"), *((name, "ood", name) for name in others)]
        return sets + [(probe, "probe", probe) for probe in self.environments[trained].probes]

    def ood(self, method: str) -> Iterator[tuple[str, list[PairRow]]]:
        """Environment and evaluated pairs of every test of a method's models away from their training."""
        for cell in self.of(method):
            for test, kind, name in self.sets(cell):
                if kind == "ood":
                    yield test, self.rows(cell, name)

    def figures(self, cell: Cell, name: str) -> dict[str, float]:
        """The figures of a cell on a test set, with the first text-only proxy of its data and seed, if one is there."""
        likes = [other for other in self.cells if (other.environment, other.seed) == (cell.environment, cell.seed)]
        judged = ([row.proxy_margin for row in self.rows(other, name)] for other in likes)
        rows = self.rows(cell, name)
        proxies = next((found for found in judged if None not in found), [None] * len(rows))
        return summarize([replace(row, proxy_margin=proxy) for row, proxy in zip(rows, proxies, strict=True)])


def study_figures(runs: Runs) -> dict:
    """Everything that study.json holds."""
    tests = [row for cell in runs.cells for row in test_rows(cell, runs)]
    credits = {method: ood_credits(method, runs) for method in runs.methods}
    return {
        "definitions": {"sfd": SFD},
        "tests": tests,
        "means": {method: means([row for row in tests if row["method"] == method]) for method in runs.methods},
        "significance": compare(pairs_of(runs.methods), credits) if len(runs.environments) > 1 else [],
        "rules": {name: rules(name, runs) for name in runs.environments},
        "controls": {method: controls(method, runs) for method in runs.methods},
        "costs": {method: cost(method, runs) for method in runs.methods},
        "sfc": {method: sfc_over_training(method, runs) for method in runs.methods},
    }


def test_rows(cell: Cell, runs: Runs) -> Iterator[dict]:
    """The figures of one model on every test set."""
    for test, kind, name in runs.sets(cell):
        own = runs.figures(cell, name)
        row = {"pairs": own["pairs"], "labels": own["accuracy"], "judged": judged_accuracy(own)}
        proxy = {"proxy": own["proxy_accuracy"], "sfd": own["sfd"]} if "sfd" in own else {}
        yield {**vars(cell), "test": test, "kind": kind, **row, **proxy}


def means(tests: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Mean of each figure over environments and seeds, and its spread: the deviation of the seeds' means, None for one.

    `ood`: the mean over trained environments of the mean over the other environments' tests; `sfd` likewise.
    """
    table, seeds = {}, sorted({row["seed"] for row in tests})
    for figure in FIGURES:
        by_seed = [seed_mean([row for row in tests if row["seed"] == seed], figure) for seed in seeds]
        if not np.isnan(by_seed).all():
            spread = float(np.std(by_seed)) if len(by_seed) > 1 else None
            table[figure] = {"mean": float(np.mean(by_seed)), "spread": spread}
    return table


def means_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of text: by method and trained environment (mean over seeds), then the means with their spread.

    Time and memory are over the first method's. A row without cells stands between methods; figures that no method has
    are left out.
    """
    shown = [figure for figure in FIGURES if any(figure in overall for overall in results["means"].values())]
    rows = []
    for method, overall in results["means"].items():
        for name in results["environments"]:
            tests = [row for row in results["tests"] if (row["method"], row["environment"]) == (method, name)]
            own = means(tests)
            cells = [percent(own.get(figure, {}).get("mean")) for figure in shown]
            rows += [[method, name, *cells, *([""] * len(COSTS))]] if tests else []
        cells = [plus_minus(percent, **overall.get(figure, {"mean": None})) for figure in shown]
        own, first = results["costs"][method], next(iter(results["costs"].values()))
        costs = [f"{own[name] / first[name]:.2f}" if own[name] and first[name] else "-" for name in COSTS]
        rows += [[method, "mean ± spread", *cells, *costs], []]
    return ["method", "trained on", *map(FIGURES.get, shown), *COSTS], rows[:-1]


def cost(method: str, runs: Runs) -> dict[str, float | None]:
    """Seconds of a training, what comes before its first step included, and its peak memory in bytes, as means."""
    seconds, peaks = [], []
    for cell in runs.of(method):
        fitted, steps = cell.folder(runs.root) / FITTED, runs.steps(cell)
        before = read_json(fitted)["seconds"] if fitted.exists() else 0.0
        seconds.append(before + sum(row.get("seconds") or 0 for row in steps))
        peaks.append(max((row.get("peak_memory_bytes") or 0 for row in steps), default=0))
    return dict(zip(COSTS, (float(np.mean(values)) or None for values in (seconds, peaks)), strict=True))


def seed_mean(tests: Sequence[dict], figure: str) -> float:
    """One figure of one method and seed, the mean of its trained environments' means."""
    kind, key = {"iid labels": ("iid", "labels"), "sfd": ("ood", "sfd")}.get(figure, (figure, "judged"))
    values: dict[str, list[float]] = {}
    for row in tests:
        if kind in (row["kind"], row["test"]) and key in row:
            values.setdefault(row["environment"], []).append(row[key])
    return float(np.mean([np.mean(own) for own in values.values()])) if values else float("nan")


def pairs_of(methods: Sequence[str]) -> list[tuple[str, str]]:
    """The methods that are compared: every one with the first, and with the paper's `robust` where that is another."""
    first, *others = methods
    bases = [first, "robust"] if "robust" in others else [first]
    return [(base, other) for base in bases for other in others if other != base]


def compare(pairs: Sequence[tuple[str, str]], values: Mapping[str, Mapping[Hashable, Sequence[float]]]) -> list[dict]:
    """Differences of two methods each, second minus first, paired by test record.

    A record's difference is that of the means over its values. `p_value` is of the permutation test that swaps the
    methods in each record (two-sided, `RESAMPLES` permutations, the exact McNemar test's idea for more than one
    model), `p_holm` the same corrected by Holm for all `pairs`; the 95 % interval is a bootstrap over records and not
    corrected. All hold for these trained models; how much another seed changes is the spread beside the means.

    Args:
        values: by method and record, such as the credits of a method's models on the pairs of the record.
    """
    rows = [{"first": a, "second": b} | paired_difference(values[a], values[b]) for a, b in pairs]
    order, corrected = sorted(rows, key=lambda row: row["p_value"]), 0.0
    for place, row in enumerate(order):
        corrected = max(corrected, min(1.0, row["p_value"] * (len(order) - place)))
        row["p_holm"] = corrected
    return rows


def paired_difference(first: Mapping[Hashable, Sequence[float]], second: Mapping[Hashable, Sequence[float]]) -> dict:
    """The mean difference over records with its interval and p-value, see `compare`."""
    difference = np.array([np.mean(second[key]) - np.mean(first[key]) for key in first])
    test = permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0),
        batch=max(1, BATCH_VALUES // len(difference)),
    )  # fmt: skip
    low, high = map(float, mean_interval(difference))
    mean = float(difference.mean())
    return {"records": len(difference), "difference": mean, "low": low, "high": high, "p_value": float(test.pvalue)}


def ood_credits(method: str, runs: Runs) -> dict[tuple[str, int], list[float]]:
    """Credits of a method's models by (o.o.d. test set, record)."""
    credits: dict[tuple[str, int], list[float]] = {}
    for test, rows in runs.ood(method):
        sign = truth_sign(rows)
        for row, right, known in zip(rows, credit(sign * [row.margin for row in rows]), sign, strict=True):
            if known:
                credits.setdefault((test, row.record), []).append(float(right))
    return credits


def rules(environment: str, runs: Runs) -> dict[str, float]:
    """Label accuracy of rules that look at length or format alone, on one environment's test."""
    pairs = [(group.responses, pair) for group in runs.groups(environment).values() for pair in group.pairs]
    chosen, rejected = ([texts[getattr(pair, end)] for texts, pair in pairs] for end in ("chosen", "rejected"))
    return text_controls(np.zeros(len(pairs)), chosen, rejected)["rules"]


def controls(method: str, runs: Runs) -> dict:
    """A method's accuracy by length difference and correlations with length and format, over all its o.o.d. tests."""
    rows = [(row, runs.groups(test)[row.record].responses) for test, rows in runs.ood(method) for row in rows]
    if not rows:
        return {}
    chosen, rejected = ([texts[getattr(row, end)] for row, texts in rows] for end in ("chosen", "rejected"))
    figures = text_controls(np.array([row.margin for row, _ in rows]), chosen, rejected)
    return {name: figures[name] for name in ("buckets", "correlation")}


def sfc_over_training(method: str, runs: Runs) -> list[dict[str, float]]:
    """The SFC's mean and 10, 50 and 90 % quantiles of a step, averaged over runs, by share of the training."""
    parts: list[dict[str, list[float]]] = [{} for _ in range(PARTS_OF_TRAINING)]
    for cell in runs.of(method):
        steps = runs.steps(cell)
        for number, step in enumerate(steps):
            part = parts[number * PARTS_OF_TRAINING // len(steps)]
            for name in ("sfc_mean", "sfc_p10", "sfc_p50", "sfc_p90"):
                if step.get(name) is not None:  # null where the step was not finite
                    part.setdefault(name, []).append(step[name])
    curve = [
        {"share": (number + 0.5) / PARTS_OF_TRAINING, **{name: float(np.mean(v)) for name, v in part.items()}}
        for number, part in enumerate(parts)
        if part
    ]
    return [] if all(row.get("sfc_mean") == 1 for row in curve) else curve  # a weight of 1: no SFC
