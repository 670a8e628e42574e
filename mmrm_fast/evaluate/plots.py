"""Every plot, as a figure that `save` writes to a file and `svg` makes a part of a page; legible at phone width."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.style

matplotlib.use("Agg")
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmrm_fast.files import ASSETS

matplotlib.style.use(ASSETS / "plots.mplstyle")
COLOURS = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
SIZE = (4.4, 3.0)  # inches
ORACLE = "the truth itself"  # which no model can pass
NUM_COLUMNS = 80  # of the SFC picture


def new_axes(title: str = "", height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """A figure with one plot."""
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its name, without a date: equal figures, equal files."""
    suffix = path.suffix[1:]
    figure.savefig(path, format=suffix, metadata={"Date": None} if suffix == "svg" else None)


def svg(figure: Figure, title: str) -> Markup:
    """A figure as an SVG element that takes the width it is given, for pages that escape everything else."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    _, head, text = re.split(r"(<svg [^>]*>)", file.getvalue(), maxsplit=1)
    (box,) = re.findall(r'viewBox="[^"]*"', head)
    text = re.sub(r'<g id="[a-z0-9_.]*">', "<g>", re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL))
    return Markup(f'<svg {box} role="img" aria-label="{escape(title)}">{text}')


def legend(figure: Figure, axes: Axes) -> None:
    """A legend below the plot, where it hides nothing; none for no labels."""
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2)


def reliability(calibrations: Mapping[str, dict]) -> Figure:
    """Accuracy against confidence of each `reliability.calibration`, a dot a bin, beside a calibrated diagonal."""
    figure, axes = new_axes("Calibration", SIZE[1] + 0.6)
    axes.plot([0.5, 1], [0.5, 1], color="#999", lw=1, ls="--", label="calibrated")
    for number, (label, figures) in enumerate(calibrations.items()):
        bins, colour = figures["bins"], COLOURS[number % len(COLOURS)]
        points = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
        pairs = np.array([row["pairs"] for row in bins])
        axes.plot(*points, color=colour, lw=1.2, marker="o", ms=3, label=f"{label}: ECE {figures['ece']:.3f}")
        axes.scatter(*points, s=100 * pairs / pairs.max(), color=colour, alpha=0.3, linewidth=0)
    axes.set(xlabel="confidence, sigmoid(|margin|); area: pairs", ylabel="share right", xlim=(0.48, 1.02))
    axes.set_ylim(-0.03, 1.05)
    legend(figure, axes)
    return figure


def margins(margins_P: np.ndarray, proxy_P: np.ndarray | None = None, title: str = "margins") -> Figure:
    """Histogram of r(chosen) - r(rejected), wrong pairs in another colour, and of the text-only proxy."""
    figure, axes = new_axes(title)
    everything = np.concatenate([margins_P, [0.0], () if proxy_P is None else proxy_P])
    edges = np.unique(np.append(np.histogram_bin_edges(everything, bins=40), 0.0))  # no bar has right and wrong pairs
    for name, drawn, colour in (("right or tie", margins_P >= 0, COLOURS[0]), ("wrong", margins_P < 0, COLOURS[1])):
        if drawn.any():
            axes.hist(margins_P[drawn], edges, color=colour, label=f"{name} ({drawn.sum():,})")
    if proxy_P is not None:
        axes.hist(proxy_P, edges, histtype="step", color="#444", lw=1, label="text-only proxy")
    axes.axvline(0, color="#444", lw=0.8)
    axes.set(xlabel="r(chosen) − r(rejected)", ylabel="pairs")
    legend(figure, axes)
    return figure


def best_of_n(curves: Mapping[str, Sequence[dict]]) -> Figure:
    """Expected truth of the selected response over KL, a line a model and one for `ORACLE`, N along the top."""
    figure, axes = new_axes(height=SIZE[1] + 0.6)
    for name, rows in curves.items():
        kl = [row["kl"] for row in rows]
        style = {"color": "#999", "linestyle": "--"} if name == ORACLE else {"marker": "o", "markersize": 3}
        (line,) = axes.plot(kl, [row["quality"] for row in rows], label=name, lw=1.3, **style)
        low, high = [row["low"] for row in rows], [row["high"] for row in rows]
        axes.fill_between(kl, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="KL from the policy in nats, log N − (N − 1) / N", ylabel="expected truth of the selected response")
    rows = next(iter(curves.values()))
    top = axes.secondary_xaxis("top")
    top.set_xticks([row["kl"] for row in rows], [str(row["n"]) for row in rows], fontsize=8)
    top.set_xlabel("N responses to choose from")
    legend(figure, axes)
    return figure


def sfc(curves: Mapping[str, Sequence[dict]]) -> Figure:
    """The SFC of a step over training, a line a method; of a single one also the band of its middle 80 % of pairs."""
    figure, axes = new_axes()
    for name, rows in curves.items():
        shares = [100 * row["share"] for row in rows]
        axes.plot(shares, [row["sfc_mean"] for row in rows], lw=1.3, marker=".", ms=4, label=f"{name}, mean")
        if len(curves) == 1 and all("sfc_p10" in row and "sfc_p90" in row for row in rows):
            low, high = [row["sfc_p10"] for row in rows], [row["sfc_p90"] for row in rows]
            axes.fill_between(shares, low, high, alpha=0.15, linewidth=0, label="middle 80 % of pairs")
    axes.set(xlabel="share of the training (%)", ylabel="SFC, the weight of a pair", xlim=(0, 100), ylim=(0, 1.02))
    legend(figure, axes)
    return figure


def sfc_over_time(steps: Sequence[int], histograms: np.ndarray, title: str) -> Figure:
    """How the Shortcut-Failure Coefficient is distributed, step by step: a column a step, a row a bin of 0..1."""
    figure, axes = new_axes(title)
    groups = np.array_split(np.arange(len(steps)), min(len(steps), NUM_COLUMNS))
    columns = np.array([histograms[group].sum(0) for group in groups], float)
    shares = 100 * columns / np.maximum(columns.sum(1, keepdims=True), 1)
    extent = (steps[0] - 0.5, steps[-1] + 0.5, 0, 1)
    drawn = axes.imshow(shares.T, origin="lower", aspect="auto", extent=extent, cmap="Blues", interpolation="nearest")
    figure.colorbar(drawn, label="pairs of the step (%)")
    axes.grid(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(0.5, color=COLOURS[1], lw=0.8, ls=":")
    axes.set(xlabel="step", ylabel="SFC")
    return figure


def lines(title: str, curves: Mapping[str, tuple[Sequence, Sequence]]) -> Figure:
    """Curves (x, y) by label, over steps; labels that end in "proxy" are dashed in the colour before them."""
    figure, axes = new_axes(title)
    number = -1
    for label, (x, y) in curves.items():
        dashed = label.endswith("proxy") and number >= 0
        number += not dashed
        marker = "o" if len(x) < 3 else None
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, y, color=colour, ls="--" if dashed else "-", lw=1.3, marker=marker, ms=3, label=label)
    axes.set(xlabel="step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) > 1:
        legend(figure, axes)
    return figure


def bars(title: str, names: Sequence[str], values: Mapping[str, Sequence[float | None]]) -> Figure:
    """Shares of 0..1 as horizontal bars, a group a name, a colour a label; None leaves a gap."""
    height = max(1.6, 0.34 * len(names) * max(1, 0.6 * len(values)) + 1)
    figure, axes = new_axes(title, height)
    thickness = 0.8 / len(values)
    for number, (label, shares) in enumerate(values.items()):
        places = np.arange(len(names)) + number * thickness
        numbers = [float("nan") if share is None else 100 * share for share in shares]
        drawn = axes.barh(places, numbers, thickness * 0.9, color=COLOURS[number % len(COLOURS)], label=label)
        axes.bar_label(drawn, [f"{n:.1f}" if n == n else "" for n in numbers], padding=2, fontsize=8)
    axes.axvline(50, color="#444", lw=0.8, ls=":")
    axes.set(xlabel="accuracy (%)", xlim=(0, 108), yticks=np.arange(len(names)) + 0.4 - thickness / 2)
    axes.set_yticklabels(names)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    if len(values) > 1:
        legend(figure, axes)
    return figure
