"""The numbers of a study, from the run folders of its cells: accuracies and SFD by train and test set, means, tests.

A test row is one model on one test set. `judged` accuracy is against the truth where the data knows it, else against
the labels. SFD is judged by the text-only proxy of the first method that has one, on the same data and seed, so that
methods without a proxy have it too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import permutation_test

from mmrm_fast.dataset import only_paired
from mmrm_fast.evaluate import PairRow, accuracy, percent, read_rows, shortcut_failure_degradation
from mmrm_fast.records import Group, RecordFile, iter_groups
from mmrm_fast.reliability import credit, text_controls

SFD = (
    "SFD (shortcut-failure degradation): accuracy on the test pairs that the text-only proxy trained on the same data "
    "gets right, minus accuracy on those it gets wrong (its ties are in neither); our reading of Li et al., arXiv "
    "2503.03122."
)
FIGURES = ("iid labels", "iid", "ood", "neutral", "reversed", "sfd")
PARTS_OF_TRAINING = 25
RESAMPLES = 9999


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


class Runs:
    """The finished cells of a study; evaluated rows are read once."""

    def __init__(self, cells: Sequence[Cell], environments: Mapping[str, Environment], root: Path):
        self.cells, self.environments, self.root = tuple(cells), dict(environments), root
        self.methods = list(dict.fromkeys(cell.method for cell in cells))
        self.rows = cache(lambda cell, name: read_rows(cell.folder(root) / f"eval-{name}.jsonl"))

    def sets(self, cell: Cell) -> list[tuple[str, str, str]]:
        """The test sets of a cell: what it is, its kind and the name that the run knows it by."""
        trained = cell.environment
        sets = [(n, "iid", "iid") if n == trained else (n, "ood", n) for n in self.environments]
        return sets + [(probe, "probe", probe) for probe in self.environments[trained].probes]

    def ood(self, method: str) -> Iterator[tuple[str, list[PairRow]]]:
        """Environment and evaluated pairs of every test of a method's models away from their training."""
        for cell in self.cells:
            for test, kind, name in self.sets(cell):
                if cell.method == method and kind == "ood":
                    yield test, self.rows(cell, name)

    def proxy_margins(self, cell: Cell, name: str) -> np.ndarray | None:
        """Margins of the text-only proxy that judges a cell on a test set; None where no method has one."""
        for other in self.cells:
            if (other.environment, other.seed) == (cell.environment, cell.seed):
                rows = self.rows(other, name)
                if rows and rows[0].proxy_margin is not None:
                    return np.array([row.proxy_margin for row in rows])
        return None


def study_figures(runs: Runs) -> dict:
    """Everything that study.json holds."""
    tests = [row for cell in runs.cells for row in test_rows(cell, runs)]
    first, *others = runs.methods
    return {
        "definitions": {"sfd": SFD},
        "tests": tests,
        "means": {method: means([row for row in tests if row["method"] == method]) for method in runs.methods},
        "significance": [significance(first, other, runs) for other in others if len(runs.environments) > 1],
        "rules": {name: rules(environment.test) for name, environment in runs.environments.items()},
        "controls": {method: controls(method, runs) for method in runs.methods},
        "sfc": {method: sfc_over_training(method, runs) for method in runs.methods},
    }


def test_rows(cell: Cell, runs: Runs) -> Iterator[dict]:
    """The figures of one model on every test set."""
    for test, kind, name in runs.sets(cell):
        rows, proxy = runs.rows(cell, name), runs.proxy_margins(cell, name)
        margins, sign = np.array([row.margin for row in rows]), truth_sign(rows)
        known = sign != 0
        figures = {"pairs": len(rows), "labels": accuracy(margins), "judged": accuracy((margins * sign)[known])}
        if proxy is not None:
            figures["proxy"] = accuracy(proxy)
            figures["sfd"] = shortcut_failure_degradation((margins * sign)[known], (proxy * sign)[known])
        yield {**vars(cell), "test": test, "kind": kind, **figures}


def truth_sign(rows: Sequence[PairRow]) -> np.ndarray:
    """1 where the label is true, -1 where it is not, 0 where truth is a tie; 1 everywhere where truth is unknown."""
    if any(row.truth is None for row in rows):
        return np.ones(len(rows))
    return np.sign([row.truth for row in rows])


def means(tests: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Mean of each figure over environments and seeds, and its spread: the deviation of the seeds' means, None for one.

    `ood`: the mean over trained environments of the mean over the other environments' tests; `sfd` likewise.
    """
    table = {}
    for figure in FIGURES:
        by_seed = [seed_mean([row for row in tests if row["seed"] == seed], figure) for seed in seeds_of(tests)]
        if not np.isnan(by_seed).all():
            spread = float(np.std(by_seed)) if len(by_seed) > 1 else None
            table[figure] = {"mean": float(np.mean(by_seed)), "spread": spread}
    return table


def mean_and_spread(figure: dict | None) -> str:
    """A mean with its spread in per cent, a dash where there is none."""
    if figure is None:
        return "-"
    return percent(figure["mean"]) + ("" if figure["spread"] is None else f" ± {percent(figure['spread'])}")


def seeds_of(tests: Sequence[dict]) -> list[int]:
    """The seeds among test rows."""
    return sorted({row["seed"] for row in tests})


def seed_mean(tests: Sequence[dict], figure: str) -> float:
    """One figure of one method and seed, the mean of its trained environments' means."""
    kind, key = {"iid labels": ("iid", "labels"), "sfd": ("ood", "sfd")}.get(figure, (figure, "judged"))
    values: dict[str, list[float]] = {}
    for row in tests:
        if kind in (row["kind"], row["test"]) and key in row:
            values.setdefault(row["environment"], []).append(row[key])
    return float(np.mean([np.mean(own) for own in values.values()])) if values else float("nan")


def significance(first: str, second: str, runs: Runs) -> dict:
    """Difference of o.o.d. accuracy, second minus first method, over the test records, paired.

    A record's difference is the mean over its pairs and over all models that did not train on its environment; the
    p-value is of the permutation test that swaps the methods in each record (two-sided, `RESAMPLES` permutations,
    the exact McNemar test's idea for more than one model), the interval a bootstrap over records. Both hold for these
    trained models; how much another seed changes is the spread beside the means.
    """
    credits = [ood_credits(method, runs) for method in (first, second)]
    difference = np.array([np.mean(credits[1][key]) - np.mean(credits[0][key]) for key in credits[0]])
    test = permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    number = len(difference)
    times = np.random.default_rng(1).multinomial(number, np.full(number, 1 / number), 2000)
    low, high = np.percentile(times @ difference / number, [2.5, 97.5])
    return {
        "first": first, "second": second, "records": number, "difference": float(difference.mean()),
        "low": float(low), "high": float(high), "p_value": float(test.pvalue),
    }  # fmt: skip


def ood_credits(method: str, runs: Runs) -> dict[tuple[str, int], list[float]]:
    """Credits of a method's models by (o.o.d. test set, record)."""
    credits: dict[tuple[str, int], list[float]] = {}
    for test, rows in runs.ood(method):
        sign = truth_sign(rows)
        for row, right, known in zip(rows, credit(sign * [row.margin for row in rows]), sign, strict=True):
            if known:
                credits.setdefault((test, row.record), []).append(float(right))
    return credits


def paired_responses(test: Path) -> Iterator[Group]:
    """The records of a test file with the responses that evaluated rows count."""
    return (only_paired(group) for group in iter_groups(RecordFile(test)) if isinstance(group, Group))


def rules(test: Path) -> dict[str, float]:
    """Label accuracy of rules that look at length or format alone, on one test file."""
    pairs = [(group.responses, pair) for group in paired_responses(test) for pair in group.pairs]
    chosen, rejected = ([texts[getattr(pair, end)] for texts, pair in pairs] for end in ("chosen", "rejected"))
    return text_controls(np.zeros(len(pairs)), chosen, rejected)["rules"]


def controls(method: str, runs: Runs) -> dict:
    """A method's accuracy by length difference and correlations with length and format, over all its o.o.d. tests."""
    texts = {
        name: {group.record: group.responses for group in paired_responses(environment.test)}
        for name, environment in runs.environments.items()
    }
    rows = [(row, texts[test][row.record]) for test, rows in runs.ood(method) for row in rows]
    if not rows:
        return {}
    chosen, rejected = [text[row.chosen] for row, text in rows], [text[row.rejected] for row, text in rows]
    figures = text_controls(np.array([row.margin for row, _ in rows]), chosen, rejected)
    return {"buckets": figures["buckets"], "correlation": figures["correlation"]}


def sfc_over_training(method: str, runs: Runs) -> list[dict[str, float]]:
    """The SFC's mean and 10, 50 and 90 % quantiles of a step, averaged over runs, by share of the training."""
    parts: list[dict[str, list[float]]] = [{} for _ in range(PARTS_OF_TRAINING)]
    for cell in (cell for cell in runs.cells if cell.method == method):
        with open(cell.folder(runs.root) / "metrics.jsonl") as file:
            steps = [json.loads(line) for line in file]
        for number, step in enumerate(steps):
            part = parts[number * PARTS_OF_TRAINING // len(steps)]
            for name in ("sfc_mean", "sfc_p10", "sfc_p50", "sfc_p90"):
                if name in step:
                    part.setdefault(name, []).append(step[name])
    curve = [
        {"share": (number + 0.5) / PARTS_OF_TRAINING, **{name: float(np.mean(v)) for name, v in part.items()}}
        for number, part in enumerate(parts)
        if part
    ]
    return [] if all(row.get("sfc_mean") == 1 for row in curve) else curve  # a weight of 1: no SFC
