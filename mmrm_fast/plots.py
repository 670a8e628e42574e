"""Plots, each an SVG (or PNG) of its own: reliability, margins, best of N, the SFC over training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import matplotlib
import numpy as np

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "figure.figsize": (5.2, 3.6), "figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
        "legend.frameon": False, "svg.hashsalt": "mmrm_fast", "axes.axisbelow": True,
    }
)  # fmt: skip
from matplotlib import pyplot  # noqa: E402


def save(figure, file: Path | BinaryIO) -> None:
    """Write a figure in the format of its name, SVG where there is none, without a date: equal figures, equal files."""
    suffix = file.suffix[1:] if isinstance(file, Path) else "svg"
    figure.savefig(file, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    pyplot.close(figure)


def plot_reliability(calibration: dict, path: Path) -> None:
    """Accuracy against confidence, a dot a bin (the more pairs the larger), beside a calibrated model's diagonal."""
    figure, axes = pyplot.subplots()
    bins = calibration["bins"]
    sizes = np.sqrt([b["pairs"] for b in bins])
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", label="perfectly calibrated")
    points = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    axes.plot(*points, color="C0", alpha=0.5)
    axes.scatter(*points, s=20 + 180 * sizes / sizes.max(), color="C0", label="pairs by confidence (area: how many)")
    axes.set(xlim=(0.48, 1.02), ylim=(-0.03, 1.05), xlabel="confidence, sigmoid(|margin|)", ylabel="accuracy")
    axes.set_title(f"ECE {calibration['ece']:.3f}, Brier {calibration['brier']:.3f}", fontsize=10)
    legend = axes.legend(loc="best", fontsize=8)
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([30])
    save(figure, path)


def plot_margins(margins: np.ndarray, path: Path) -> None:
    """Histogram of the margins, wrong pairs (below 0) in another colour."""
    figure, axes = pyplot.subplots()
    edges = np.histogram_bin_edges(np.append(margins, 0.0), bins=40)
    edges = np.unique(np.append(edges, 0.0))  # no bar has both right and wrong pairs
    for name, drawn, colour in (("right or tie", margins >= 0, "C0"), ("wrong", margins < 0, "C3")):
        if drawn.any():
            axes.hist(margins[drawn], edges, color=colour, label=f"{name} ({drawn.sum():,})")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="margin: reward of the preferred response minus the other's", ylabel="pairs")
    axes.legend(fontsize=8)
    save(figure, path)


def plot_best_of_n(curves: Mapping[str, Sequence[dict]], path: Path, *, quality: str, bound: str) -> None:
    """Expected quality of the selected response over KL, a line a model, N along the top.

    Args:
        curves: per model rows `{"n", "kl", "quality", "low", "high"}`.
        quality: what the quality is, for the axis.
        bound: the curve that no model can pass.
    """
    figure, axes = pyplot.subplots(figsize=(5.6, 4.0))
    for name, rows in curves.items():
        kl = [row["kl"] for row in rows]
        style = {"color": "grey", "linestyle": "--"} if name == bound else {"marker": "o", "markersize": 4}
        (line,) = axes.plot(kl, [row["quality"] for row in rows], label=name, **style)
        low, high = [row["low"] for row in rows], [row["high"] for row in rows]
        axes.fill_between(kl, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="KL from the policy in nats, log N - (N - 1) / N", ylabel=quality)
    rows = next(iter(curves.values()))
    top = axes.secondary_xaxis("top")
    top.set_xticks([row["kl"] for row in rows], [str(row["n"]) for row in rows], fontsize=8)
    top.set_xlabel("N responses to choose from")
    axes.legend(fontsize=8)
    save(figure, path)


def plot_sfc(curves: Mapping[str, Sequence[dict]], file: Path | BinaryIO) -> None:
    """The SFC of a step over training, a line a method and, where known, the band of its middle 80 % of pairs."""
    figure, axes = pyplot.subplots()
    for name, rows in curves.items():
        shares = [100 * row["share"] for row in rows]
        (line,) = axes.plot(shares, [row["sfc_mean"] for row in rows], marker=".", label=f"{name}, mean")
        if all("sfc_p10" in row and "sfc_p90" in row for row in rows):
            low, high = [row["sfc_p10"] for row in rows], [row["sfc_p90"] for row in rows]
            axes.fill_between(
                shares, low, high, color=line.get_color(), alpha=0.12, linewidth=0, label="middle 80 % of pairs"
            )
    axes.set(xlabel="share of the training (%)", ylabel="SFC of a pair", xlim=(0, 100), ylim=(-0.02, 1.02))
    axes.legend(fontsize=8)
    save(figure, file)
