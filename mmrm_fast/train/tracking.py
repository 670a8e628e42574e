"""Where metrics go besides a run's own files: TensorBoard, Weights & Biases, MLflow, each by accelerate's tracker."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch.utils.tensorboard import SummaryWriter

from mmrm_fast.train.loss import NUM_BINS

PROJECT = "mmrm_fast"


def require_trackers(names: Sequence[str]) -> None:
    """Raise `ValueError` for a tracker whose package is not installed."""
    installed = set(map(str, get_available_trackers()))
    for name in names:
        if name not in installed:
            raise ValueError(f"--report-to {name}: pip install {name}, or --report-to without it")


class Trackers:
    """The trackers of a run, which goes on in them after `step` where they can.

    Args:
        names: of accelerate's trackers.
        folder: the run folder, for TensorBoard's files and as the run's name.
        config: what the run is described by.
        step: optimizer steps done.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: dict, *, step: int):
        PartialState()  # accelerate's trackers log through it; only the first rank has them
        options = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": step + 1},
            "wandb": {
                "run_name": PROJECT, "name": folder.name, "dir": str(folder), "config": config,
                "id": str(folder.resolve()).replace(os.sep, "-")[-64:], "resume": "allow",
            },
            "mlflow": {"experiment_name": PROJECT, "run_name": folder.name},
        }  # fmt: skip
        self.trackers: list[GeneralTracker] = [LOGGER_TYPE_TO_CLASS[name](**options[name]) for name in names]
        for tracker in self.trackers:
            tracker.start()

    def log(self, kind: str, values: dict[str, Any], step: int) -> None:
        """The numbers among the values, as KIND/name."""
        shown = {f"{kind}/{name}": value for name, value in values.items() if is_number(value)}
        for tracker in self.trackers:
            tracker.log(shown, step=step)
            if tracker.name == "tensorboard" and sum(values.get("sfc_histogram", ())):
                add_histogram(tracker.tracker, f"{kind}/sfc", values["sfc_histogram"], step)

    def close(self) -> None:
        """Send what is left."""
        for tracker in self.trackers:
            tracker.finish()


def is_number(value: Any) -> bool:
    """Whether a tracker can plot it."""
    return isinstance(value, int | float) and math.isfinite(value)


def add_histogram(writer: SummaryWriter, name: str, counts: list[int], step: int) -> None:
    """A histogram over 0..1 that is counted already."""
    edges = [(number + 1) / NUM_BINS for number in range(NUM_BINS)]
    total = sum(count * (edge - 0.5 / NUM_BINS) for count, edge in zip(counts, edges, strict=True))
    writer.add_histogram_raw(name, 0, 1, sum(counts), total, total, edges, counts, step)
