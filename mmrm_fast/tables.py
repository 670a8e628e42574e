"""Tables and figures for the terminal."""

import math
import sys

import numpy as np
from rich.console import Console
from rich.table import Table


def results_table(results: dict[str, dict]) -> Table:
    """Accuracies of the main model and of the text-only proxy, by test set, and the o.o.d. mean."""
    table = Table(title="Accuracy (%)")
    for column in ("test set", "kind", "pairs", "labels", "truth", "proxy (text only)", "SFD"):
        table.add_column(column, justify="left" if column in ("test set", "kind") else "right")
    keys = ("accuracy", "truth_accuracy", "proxy_accuracy", "sfd")
    for name, figures in results.items():
        cells = (percent(figures.get(key)) for key in keys)
        table.add_row(name, figures["kind"], str(figures["pairs"]), *cells)
    ood = [figures for figures in results.values() if figures["kind"] == "ood"]
    if ood:
        means = (percent(np.mean([f[key] for f in ood]) if all(key in f for f in ood) else None) for key in keys)
        table.add_section()
        table.add_row("mean", "ood", str(sum(f["pairs"] for f in ood)), *means)
    return table


def print_table(table: Table) -> None:
    """Print a table, at its full width where the output is not a terminal."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def signed(value: float) -> str:
    """A correlation, a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:+.2f}"


def percent(value: float | None) -> str:
    """A share as a percentage, a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
