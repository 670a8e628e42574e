"""Charts of runs as inline SVG; text stays text, so that a page can be searched and stays small."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#c8501e", "#2b7d4f", "#8a4fa3", "#8c6d1f", "#3c8c93")
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
SIZE = (4.4, 2.7)  # inches
NUM_COLUMNS = 80  # of the SFC picture
NUM_BINS = 10  # of the calibration


def lines(title: str, curves: Mapping[str, tuple[Sequence, Sequence]], *, ylabel: str = "") -> str:
    """Curves (x, y) by label, over steps; labels that end in "proxy" are dashed in the colour before them."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(title)
        number = -1
        for label, (x, y) in curves.items():
            dashed = label.endswith("proxy") and number >= 0
            number += not dashed
            marker = "o" if len(x) < 3 else None
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(x, y, color=colour, ls="--" if dashed else "-", lw=1.3, marker=marker, ms=3, label=label)
        axes.set(xlabel="step", ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(curves) > 1:
            axes.legend()
        return svg(figure, title)


def sfc_over_time(steps: Sequence[int], histograms: np.ndarray) -> str:
    """How the Shortcut-Failure Coefficient is distributed, step by step: a column a step, a row a bin of 0..1."""
    title = "SFC of the training pairs"
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(title)
        groups = np.array_split(np.arange(len(steps)), min(len(steps), NUM_COLUMNS))
        columns = np.array([histograms[group].sum(0) for group in groups], float)
        shares = columns / np.maximum(columns.sum(1, keepdims=True), 1)
        extent = (steps[0] - 0.5, steps[-1] + 0.5, 0, 1)
        axes.imshow(shares.T, origin="lower", aspect="auto", extent=extent, cmap="Blues", interpolation="nearest")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.axhline(0.5, color=COLOURS[1], lw=0.8, ls=":")
        axes.set(xlabel="step", ylabel="SFC")
        return svg(figure, title)


def margins(title: str, margins_P: np.ndarray, proxy_P: np.ndarray | None) -> str:
    """Histogram of r(chosen) - r(rejected), of the model and of the text-only proxy."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(title)
        everything = margins_P if proxy_P is None else np.concatenate([margins_P, proxy_P])
        bins = np.histogram_bin_edges(everything, 40)
        axes.hist(margins_P, bins, color=COLOURS[0], alpha=0.75, label="model")
        if proxy_P is not None:
            axes.hist(proxy_P, bins, histtype="step", color=COLOURS[1], lw=1.2, label="text-only proxy")
            axes.legend()
        axes.axvline(0, color="#444", lw=0.8)
        axes.set(xlabel="r(chosen) − r(rejected)", ylabel="pairs")
        return svg(figure, title)


def reliability(curves: Mapping[str, np.ndarray]) -> str:
    """How often the preferred response is the chosen one against how sure the model is, sigmoid(|margin|), by label."""
    title = "Calibration"
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(title)
        axes.plot([0.5, 1], [0.5, 1], color="#999", lw=0.8, ls=":")
        for number, (label, margins_P) in enumerate(curves.items()):
            confidence, right, pairs = confidence_bins(margins_P)
            error = np.average(np.abs(confidence - right), weights=pairs)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(confidence, right, "o-", ms=3, lw=1.2, color=colour, label=f"{label}: ECE {error:.3f}")
        axes.set(xlabel="confidence", ylabel="share right", xlim=(0.48, 1.02), ylim=(-0.02, 1.04))
        axes.legend(loc="lower left", fontsize=7)
        return svg(figure, title)


def confidence_bins(margins_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, share of right pairs (a tie is half) and number of pairs, in bins of about as many pairs."""
    order = np.argsort(np.abs(margins_P))
    bins = [group for group in np.array_split(order, min(NUM_BINS, len(order))) if len(group)]
    confidence = 1 / (1 + np.exp(-np.abs(margins_P)))
    right = (margins_P > 0) + 0.5 * (margins_P == 0)
    means = [[confidence[group].mean(), right[group].mean(), len(group)] for group in bins]
    return tuple(np.array(means).T)


def bars(title: str, names: Sequence[str], values: Mapping[str, Sequence[float | None]]) -> str:
    """Shares of 0..1 as horizontal bars, a group a name, a colour a label; None leaves a gap."""
    with matplotlib.rc_context(STYLE):
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
        axes.invert_yaxis()
        if len(values) > 1:
            figure.legend(loc="outside upper right", ncols=2)
        return svg(figure, title)


def new_axes(title: str, height: float = SIZE[1]):
    """A figure with one plot."""
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def svg(figure: Figure, title: str) -> str:
    """A figure as an SVG element that takes the width it is given."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text, count=1
    )
    return re.sub(r'<g id="[a-z0-9_.]*">', "<g>", re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL))
