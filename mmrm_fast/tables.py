"""Tables and figures for the terminal."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, also where a name in them is no Unicode."""
    for line in lines:
        print(line.encode(errors="replace").decode())


def print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int = 1) -> None:
    """Print rows of text, at their full width where the output is not a terminal.

    The first `num_text` columns are words; a row without cells is a line.
    """
    table = Table(title=title)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < num_text else "right")
    for row in rows:
        table.add_row(*row) if row else table.add_section()
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_results(results: Mapping[str, Mapping]) -> None:
    """Print accuracies of the main model and of the text-only proxy, by test set, and the o.o.d. mean."""
    heads = ("test set", "kind", "pairs", "labels", "truth", "proxy (text only)", "SFD")
    keys = ("accuracy", "truth_accuracy", "proxy_accuracy", "sfd")
    rows = [
        (name, figures["kind"], str(figures["pairs"]), *(percent(figures.get(key)) for key in keys))
        for name, figures in results.items()
    ]
    ood = [figures for figures in results.values() if figures["kind"] == "ood"]
    if ood:
        means = (percent(np.mean([f[key] for f in ood]) if all(key in f for f in ood) else None) for key in keys)
        rows += [(), ("mean", "ood", str(sum(f["pairs"] for f in ood)), *means)]
    print_table("Accuracy (%)", heads, rows, num_text=2)
    reasons = {"identical_pairs": "whose two sides are the same", "undrawn_pairs": "over --max-pairs"}
    for name, figures in results.items():
        for key, reason in reasons.items():
            if figures.get(key):
                print(f"{name}: {figures[key]} pairs {reason} are in no figure")


def plus_minus(show: Callable[[float], str], mean: float | None, spread: float | None = None) -> str:
    """A figure with its spread where there is one."""
    return show(mean) + ("" if spread is None else f" ± {show(spread)}")


def signed(value: float) -> str:
    """A correlation, a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:+.2f}"


def percent(value: float | None) -> str:
    """A share as a percentage, a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
