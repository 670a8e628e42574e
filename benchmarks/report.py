"""Rows out: the table, the JSON file that an interrupted run continues, the comparison with an earlier file, plots."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import Options, Row
from mmrm_fast.files import read_json, write_json
from mmrm_fast.machine import this_machine
from mmrm_fast.tables import print_table

RESULTS = Path(__file__).parent / "results"
SLOWER = 1.1  # times the earlier file's seconds, and more than either side's spread
CAPTION = (
    "times: median ± (slowest - fastest); ratio: baseline / ours; bound: the least it can take / ours;"
    " MiB: peak of a call; error: relative; computed: nothing was timed"
)


def environment(options: Options) -> dict[str, str | int]:
    """What a reader needs to compare two files of results."""
    return {
        "date": date.today().isoformat(),
        **this_machine().record(),
        "threads": options.threads,
        "geometry": "full" if options.full else "reduced",
        "repeats": options.repeats,
    }


def results_path(options: Options) -> Path:
    """Where this run's rows go; runs of one day with different options do not overwrite each other."""
    if options.json is not None:
        return options.json
    day, device = date.today().isoformat(), options.device.type
    parts = [day, device, options.suite, options.full and "full", options.quick and "quick"]
    return RESULTS / ("-".join(part for part in parts if part) + ".json")


class ResultFile:
    """A file of rows, written after every case; `finished` are the cases that it holds whole.

    With `resume` it is the newest one whose environment is the same but for the date, which may be an earlier day's.
    """

    def __init__(self, path: Path, environment: dict, *, resume: bool):
        self.path, self.environment = path, environment
        self.rows: list[Row] = []
        self.finished: list[str] = []
        for earlier in [path, *of_all_days(path)] if resume else []:
            content = read_json(earlier) if earlier.is_file() else {"environment": {}}
            if content["environment"] | {"date": None} == environment | {"date": None}:
                self.path, self.environment = earlier, content["environment"]
                self.rows, self.finished = read_rows(earlier), content["finished"]
                break

    def add(self, case: str, rows: Iterable[Row]) -> None:
        """Add a finished case."""
        self.rows += rows
        self.finished.append(case)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": self.environment, "finished": self.finished, "rows": list(map(asdict, self.rows))}
        write_json(self.path, content)


def of_all_days(path: Path) -> list[Path]:
    """Files whose names differ from this one's in the date alone, the newest first."""
    _, is_dated, rest = path.name.partition(date.today().isoformat())
    return sorted(path.parent.glob(f"????-??-??{rest}"), reverse=True) if is_dated else []


def read_rows(path: Path) -> list[Row]:
    """The rows of a file."""
    return [Row(**row) for row in read_json(path)["rows"]]


def regressions(rows: Sequence[Row], earlier: Sequence[Row]) -> list[str]:
    """One line a row that takes longer than in the earlier rows by more than a tenth and more than the spread."""
    before = {key(row): row for row in earlier if row.seconds}
    lines = []
    for row in rows:
        old = before.get(key(row))
        if old is None or not row.seconds or row.computed:
            continue
        noise = 1 + max(row.spread or 0, old.spread or 0)
        if row.seconds > max(SLOWER, noise) * old.seconds:
            ratios = f", ratio to {row.baseline} {old.ratio:.2f} -> {row.ratio:.2f}" if old.ratio and row.ratio else ""
            times = f"{duration(old.seconds)} -> {duration(row.seconds)}"
            lines.append(f"{row.case}, {row.dtype}: {times}, {row.seconds / old.seconds:.2f} times as long{ratios}")
    return lines


def key(row: Row) -> tuple[str, ...]:
    """What makes two rows of two files the same."""
    return row.suite, row.case, row.device, row.dtype, row.baseline


def print_rows(environment: dict, rows: Sequence[Row]) -> None:
    """One line a row, and one with its details."""
    title = " · ".join(f"{name} {value}" for name, value in environment.items())
    heads = ("case", "ours", "baseline", "ratio", "bound", "MiB", "base MiB", "error", "verified")
    print_table(title, heads, map(cells, rows))
    print(CAPTION)
    for row in rows:
        if row.details:
            figures = ", ".join(f"{name} {number(value)}" for name, value in row.details.items())
            print(f"{row.case}, {row.dtype}: {figures}")


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    verdict = {True: "yes", False: "[bold red]FAILED[/]", None: "computed" if row.computed else ""}
    error = "" if row.max_error is None else f"{row.max_error:.1e}"
    return [
        f"{row.case}, {row.dtype}" if row.suite not in ("ops", "plan") else row.case,
        timed(row.seconds, row.spread),
        f"{row.baseline} {timed(row.baseline_seconds, row.baseline_spread)}",
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if row.bound_fraction is None else f"{row.bound_fraction:.0%}",
        *("" if peak is None else f"{peak / 2**20:,.0f}" for peak in (row.peak_bytes, row.baseline_peak_bytes)),
        "not finite" if row.verified is False and row.max_error is None else error,
        verdict[row.verified],
    ]


def timed(seconds: float | None, spread: float | None) -> str:
    """A time and its spread."""
    return "" if seconds is None else duration(seconds) + ("" if spread is None else f" ±{spread:.0%}")


def number(value: float | str) -> str:
    """Three digits, or the text as it is."""
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def duration(seconds: float) -> str:
    """Seconds with a unit that leaves three digits before the point at most."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def plot(path: Path, environment: dict, rows: Sequence[Row]) -> list[Path]:
    """Plots beside the JSON file: ratios of the model suites, and cost against size of `scale`; their paths."""
    ratios = [row for row in rows if row.ratio and row.suite in ("train-step", "score", "preprocess")]
    scaled = [row for row in rows if row.suite == "scale" and "size" in row.details]
    figures = {
        path.with_suffix(".png"): plot_ratios(ratios) if ratios else None,
        path.with_name(path.stem + "-scale.png"): plot_scale(scaled) if scaled else None,
    }
    made = {place: figure for place, figure in figures.items() if figure}
    for place, figure in made.items():
        figure.suptitle("{cpu}, {threads} threads, GPU: {gpus}".format_map(environment), fontsize=9)
        figure.savefig(place, dpi=120)
    return list(made)


def plot_ratios(rows: Sequence[Row]) -> Figure:
    """Horizontal bars: how many times faster than each baseline."""
    baselines = list(dict.fromkeys(row.baseline for row in rows))
    figure = Figure(figsize=(9, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        [f"{row.case}, {row.dtype} / {row.baseline}" for row in rows],
        [row.ratio for row in rows],
        color=[f"C{baselines.index(row.baseline)}" for row in rows],
    )
    axes.bar_label(bars, fmt="%.1fx", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times faster than the baseline after the slash")
    return figure


def plot_scale(rows: Sequence[Row]) -> Figure:
    """Seconds against what grows, log-log, one panel each, with the slopes of fitted lines."""
    names = list(dict.fromkeys(row.details["axis"] for row in rows))
    figure = Figure(figsize=(4 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [row for row in rows if row.details["axis"] == name]
        draw_line(axes, "ours", [(row.details["size"], row.seconds) for row in points])
        draw_line(axes, points[0].baseline, [(row.details["size"], row.baseline_seconds) for row in points])
        axes.set(xlabel=name, ylabel="seconds")
        axes.legend()
    return figure


def draw_line(axes: Axes, name: str, points: Sequence[tuple[float, float | None]]) -> None:
    """Points and the slope of log(seconds) over log(size); nothing where they were not measured."""
    measured = np.array([point for point in points if point[1]])
    if len(measured):
        sizes, seconds = measured.T
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0] if len(measured) > 1 else np.nan
        axes.loglog(sizes, seconds, marker="o", label=f"{name}, slope {slope:.2f}")
