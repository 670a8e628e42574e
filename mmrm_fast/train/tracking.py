"""Where metrics go besides a run's own files: TensorBoard, Weights & Biases, MLflow, each by accelerate's tracker."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

PROJECT = "mmrm_fast"


def require_trackers(names: Sequence[str]) -> None:
    """Raise `ValueError` for a tracker whose package is not installed."""
    for name in names:
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"--report-to {name}: pip install {name}, or --report-to without it")


def start_trackers(names: Sequence[str], folder: Path, config: dict, step: int) -> list[GeneralTracker]:
    """The trackers of the run in `folder`, which goes on after `step`; on the first rank alone."""
    PartialState()  # the trackers' own log asks it for the rank
    options = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": step + 1},
        "wandb": {
            "run_name": PROJECT, "name": folder.name, "dir": str(folder), "config": config, "resume": "allow",
            "id": str(folder.resolve()).replace(os.sep, "-")[-64:],
        },
        "mlflow": {"experiment_name": PROJECT, "run_name": folder.name},
    }  # fmt: skip
    trackers = [LOGGER_TYPE_TO_CLASS[name](**options[name]) for name in names]
    for tracker in trackers:
        tracker.start()
    return trackers


def track(trackers: list[GeneralTracker], kind: str, values: dict[str, Any], step: int) -> None:
    """Report the numbers among the values as KIND/name, and in TensorBoard the histogram of the SFC."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    counts = values.get("sfc_histogram", ())
    for tracker in trackers:
        tracker.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)
        if tracker.name == "tensorboard" and sum(counts):
            edges = [(number + 1) / len(counts) for number in range(len(counts))]
            total = sum(count * (edge - 0.5 / len(counts)) for count, edge in zip(counts, edges, strict=True))
            tracker.tracker.add_histogram_raw(f"{kind}/sfc", 0, 1, sum(counts), total, total, edges, counts, step)
