"""A study as one page: heat maps, tables and curves of what study.json holds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mmrm_fast.evaluate import plots
from mmrm_fast.evaluate.page import write_page
from mmrm_fast.study.figures import means_table
from mmrm_fast.tables import percent, plus_minus, signed

KINDS = {"ood": "out of distribution", "reversed": "own cue reversed"}  # of sets of candidates


def write_study(path: Path, results: dict) -> None:
    """Write study.html from what study.json holds."""
    curves = {method: curve for method, curve in results["sfc"].items() if curve}
    write_page(
        path,
        "study.html",
        title="Does it hold out of distribution?",
        results=results,
        num_seeds=len({row["seed"] for row in results["tests"]}),
        means=means_table(results),
        significance=comparison_rows(results["significance"], scale=100, digits=1),
        selections=list(selections(results["best_of_n"])) if "best_of_n" in results else [],
        maps=list(maps(results)),
        sfc_chart=plots.svg(plots.sfc(curves), "weight of a pair over training") if curves else "",
        **controls(results),
    )


def comparison_rows(rows: Sequence[dict], *, scale: float = 1, digits: int = 3) -> list[list[str]]:
    """What is compared, difference, interval, corrected p and number of records of paired differences, as text."""
    return [
        [
            f"{row['second']} minus {row['first']}",
            *(f"{scale * row[key]:+.{digits}f}" for key in ("difference", "low", "high")),
            f"{row['p_holm']:.4f}",
            f"{row['records']:,}",
        ]
        for row in rows
    ]


def selections(found: dict) -> Iterator[dict]:
    """By kind of candidates, what models select out of N: chart, table, and differences at the largest N."""
    for kind, title in KINDS.items():
        curves = found[kind]["curves"]
        yield {
            "title": title,
            "chart": plots.svg(plots.best_of_n(curves), title),
            "sizes": list(map(str, found["sizes"])),
            "rows": [
                [name, *(plus_minus("{:.3f}".format, row["quality"], row.get("spread")) for row in curve)]
                for name, curve in curves.items()
            ],
            "comparisons": comparison_rows(found[kind]["comparisons"]),
        }


def maps(results: dict) -> Iterator[tuple[str, float, float, dict[str, list]]]:
    """Title, the figures that are worst and best, and by method a matrix by trained (rows) and tested environment."""
    methods = list(results["means"])
    yield "accuracy, mean over seeds", 0.5, 1.0, {method: matrix(results, method, "judged") for method in methods}
    yield "SFD, mean over seeds", 0.6, 0.0, {method: matrix(results, method, "sfd") for method in methods}
    with_proxy = next((row["method"] for row in results["tests"] if "proxy" in row), None)
    if with_proxy is not None:
        title = "accuracy of the text-only proxy (labels)"
        yield title, 0.5, 1.0, {"": matrix(results, with_proxy, "proxy")}


def matrix(results: dict, method: str, key: str) -> list[list[float | None]]:
    """A figure of one method, mean over seeds, a row a trained environment; None where there is none."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in (row for row in results["tests"] if row["method"] == method and key in row):
        found.setdefault((row["environment"], row["test"]), []).append(row[key])
    means, names = {place: float(np.mean(values)) for place, values in found.items()}, results["environments"]
    return [[means.get((trained, tested)) for tested in names] for trained in names]


def controls(results: dict) -> dict[str, list]:
    """Rows of rules without a model, accuracy by length difference, correlations with length and format."""
    tests, known = results["rules"], {method: own for method, own in results["controls"].items() if own}
    buckets = next(iter(known.values()))["buckets"] if known else {}
    return {
        "controlled": list(known),
        "rules": [[rule, *(percent(own[rule]) for own in tests.values())] for rule in next(iter(tests.values()))],
        "buckets": [
            [f"{name} ({bucket['pairs']:,})", *(percent(own["buckets"][name]["accuracy"]) for own in known.values())]
            for name, bucket in buckets.items()
            if bucket["pairs"]
        ],
        "correlations": [
            [name, *(signed(own["correlation"][name]) for own in known.values())] for name in ("length", "format")
        ],
    }
