"""A study as one HTML file with nothing outside of it: heat maps, tables, curves; wide parts scroll on a phone."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from mmrm_fast.study.figures import mean_and_spread
from mmrm_fast.tables import percent, signed

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.wide { overflow-x: auto; } .maps { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; white-space: normal; } th:first-child { text-align: left; } tbody tr { border-top: 1px solid #ddd; }
.map td { min-width: 3.2rem; text-align: center; } .map tbody tr { border: 0; } .own { outline: 2px solid #333; outline-offset: -2px; }
p, figcaption { margin: .3rem 0; } small, .note { color: #555; font-size: .85rem; }
figure { margin: 0; } svg { width: 100%; max-width: 40rem; height: auto; display: block; }
@media (max-width: 30rem) { th, td { padding: .25rem; font-size: .8rem; } }
"""  # noqa: E501
KINDS = {"ood": "out of distribution", "reversed": "own cue reversed"}  # of sets of candidates
LABELS = {"iid labels": "i.i.d. labels", "iid": "i.i.d.", "ood": "o.o.d.", "sfd": "SFD"}


def write_page(path: Path, results: dict) -> None:
    """Write study.html from what study.json holds."""
    parts = [
        "<h1>Does it hold out of distribution?</h1>",
        f"<p>{len(results['means'])} methods, {len(results['environments'])} environments, "
        f"seeds: {len({row['seed'] for row in results['tests']})}. Accuracy in per cent, against the truth where the "
        "data knows it, else against the labels; a tie counts half.</p>",
        *means_section(results),
        *significance_section(results),
        *best_of_n_section(results),
        *maps_section(results),
        *controls_section(results),
        *sfc_section(results),
    ]
    title = "mmrm_fast study"
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(parts)
    path.write_text(f"{head}<title>{title}</title><style>{STYLE}</style>\n{body}\n</html>\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def means_section(results: dict) -> list[str]:
    """Means of every method with their spread over seeds."""
    figures = list(dict.fromkeys(name for means in results["means"].values() for name in means))
    rows = [
        [LABELS.get(name, name), *(mean_and_spread(means.get(name)) for means in results["means"].values())]
        for name in figures
    ]
    return [
        "<h2>Means</h2>",
        table(["", *results["means"]], rows),
        '<p class="note">Means over environments and seeds ± the standard deviation of the seeds\' means. o.o.d.: '
        f"tests of the environments that a model was not trained on. {escape(results['definitions']['sfd'])}</p>",
    ]


def significance_section(results: dict) -> list[str]:
    """Paired differences of o.o.d. accuracy."""
    if not results["significance"]:
        return []
    return [
        "<h2>Difference out of distribution</h2>",
        comparison_table(results["significance"], "points", 100, 1),
        '<p class="note">Paired by test record: interval by bootstrap, not corrected; p by a two-sided permutation '
        f"test that swaps the methods, corrected by Holm for the {len(results['significance'])} comparisons.</p>",
    ]


def comparison_table(rows: Sequence[dict], unit: str, scale: float, digits: int) -> str:
    """Paired differences, a row each."""
    cells = [
        [
            f"{row['second']} minus {row['first']}",
            *(f"{scale * row[key]:+.{digits}f}" for key in ("difference", "low", "high")),
            f"{row['p_holm']:.4f}", f"{row['records']:,}",
        ]
        for row in rows
    ]  # fmt: skip
    return table([unit, "difference", "95 % from", "to", "p", "records"], cells)


def best_of_n_section(results: dict) -> list[str]:
    """What models select out of N candidates whose truth is known: curves, a table and differences at the largest N."""
    if "best_of_n" not in results:
        return []
    from mmrm_fast.evaluate import plots  # matplotlib takes a second to import
    from mmrm_fast.evaluate.best_of_n import ORACLE

    found = results["best_of_n"]
    parts = ["<h2>Best of N</h2>"]
    for kind, title in KINDS.items():
        curves = found[kind]["curves"]
        rows = [[name, *map(quality_and_spread, curve)] for name, curve in curves.items()]
        parts += [
            f"<h3>true quality of the response selected out of N, {title}</h3>",
            plots.svg(plots.best_of_n(curves, quality="expected truth of the selected response", bound=ORACLE), title),
            table(["N", *map(str, found["sizes"])], rows),
            comparison_table(found[kind]["comparisons"], f"N = {found['sizes'][-1]}", 1, 3),
        ]
    note = (
        "Truth: share of the attributes a response names that are so. Out of distribution: candidates with the cues of "
        "environments that a model was not trained on; own cue reversed: of its own, the cue on the worse responses. "
        "Bands and intervals: bootstrap over prompts; ±: deviation of the seeds' means; p as above."
    )
    return [*parts, f'<p class="note">{note}</p>']


def quality_and_spread(row: dict) -> str:
    """A quality with its spread over seeds where there is one."""
    spread = row.get("spread")
    return f"{row['quality']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def maps_section(results: dict) -> list[str]:
    """A heat map of accuracy and of SFD by trained and tested environment, and the proxy's accuracy."""
    parts = ["<h2>Trained on (rows), tested on (columns)</h2>"]
    for key, title, low, high in (("judged", "accuracy", 0.5, 1.0), ("sfd", "SFD", 0.6, 0.0)):
        parts.append(f"<h3>{title}, mean over seeds</h3>" + '<div class="maps">')
        parts += [heat_map(results, method, key, low, high) for method in results["means"]]
        parts.append("</div>")
    parts.append(
        '<p class="note">Framed: the own environment. Red to blue: accuracy from 50 or less to 100, SFD from 60 or '
        "more to 0.</p>"
    )
    first = next((r["method"] for r in results["tests"] if "proxy" in r), None)
    if first is not None:
        parts += ["<h3>accuracy of the text-only proxy (labels)</h3>", heat_map(results, first, "proxy", 0.5, 1.0, "")]
    return parts


def heat_map(results: dict, method: str, key: str, worst: float, best: float, caption: str | None = None) -> str:
    """One method's matrix of a figure, its own environment framed; `worst` is red, `best` blue."""
    names = list(results["environments"])
    rows = []
    for trained in names:
        drawn = []
        for tested in names:
            value = cell_mean(results, method, trained, tested, key)
            own = ' class="own"' if tested == trained else ""
            drawn.append(f'<td{own} style="background:{colour(value, worst, best)}">{percent(value)}</td>')
        rows.append(f"<tr><th>{escape(trained)}</th>{''.join(drawn)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    title = escape(method if caption is None else caption)
    return (
        f'<figure class="wide"><figcaption>{title}</figcaption><table class="map"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></figure>"
    )


def cell_mean(results: dict, method: str, trained: str, tested: str, key: str) -> float | None:
    """A figure of one method, trained and tested environment, over seeds; None where there is none."""
    values = [
        row[key]
        for row in results["tests"]
        if (row["method"], row["environment"], row["test"]) == (method, trained, tested) and key in row
    ]
    return float(np.mean(values)) if values else None


def colour(value: float | None, worst: float, best: float) -> str:
    """A background on which black text is legible: red at `worst`, white halfway, blue at `best`."""
    if value is None or np.isnan(value):
        return "#eee"
    share = float(np.clip((value - worst) / (best - worst), 0, 1))
    end = (244, 140, 120) if share < 0.5 else (130, 180, 235)
    strength = abs(2 * share - 1)
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in end)


def controls_section(results: dict) -> list[str]:
    """Accuracy by length difference, correlations with length and format, rules without a model."""
    names = list(results["environments"])
    rules = list(next(iter(results["rules"].values())))
    parts = [
        "<h2>What length and format explain</h2>",
        "<h3>rules without a model, accuracy on the labels of each test</h3>",
        table(["rule", *names], [[rule, *(percent(results["rules"][name][rule]) for name in names)] for rule in rules]),
    ]
    known = {method: figures for method, figures in results["controls"].items() if figures}
    if known:
        buckets = next(iter(known.values()))["buckets"]
        rows = [
            [f"{name} ({bucket['pairs']:,})", *(percent(f["buckets"][name]["accuracy"]) for f in known.values())]
            for name, bucket in buckets.items()
            if bucket["pairs"]
        ]
        correlations = [
            [name, *(signed(figures["correlation"][name]) for figures in known.values())]
            for name in ("length", "format")
        ]
        parts += [
            "<h3>o.o.d. accuracy on labels by how the preferred response compares in length (pairs)</h3>",
            table(["", *known], rows),
            "<h3>rank correlation of the margin with the difference in length and in format</h3>",
            table(["", *known], correlations),
        ]
    return parts


def sfc_section(results: dict) -> list[str]:
    """The SFC over training, a curve a method."""
    curves = {method: curve for method, curve in results["sfc"].items() if curve}
    if not curves:
        return []
    from mmrm_fast.evaluate import plots  # matplotlib takes a second to import

    title = "Shortcut-failure coefficient over training"
    return [f"<h2>{title}</h2>", plots.svg(plots.sfc(curves), title)]
