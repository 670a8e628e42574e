"""What a run reports: metrics.jsonl and evaluations.jsonl, each step once, and the trackers that are asked for."""

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import options
from mmrm_fast.files import finite, json_lines, write_text
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.pairs import judged_accuracy
from mmrm_fast.train.loss import NUM_BINS

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}  # bf16


class MetricsLog:
    """Rows of a run folder, appended; a resumed run first drops what came after its checkpoint.

    Args:
        folder: the run folder.
        config: says which trackers are used; each is imported only then.
        step: optimizer steps done already.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, step: int):
        self.folder = folder
        for name in (METRICS, EVALUATIONS):
            keep_until(folder / name, step)
        trackers = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
        self.trackers = [trackers[name](folder, config, step) for name in config.run.report_to]

    def step(self, row: dict[str, Any]) -> None:
        """One optimizer step."""
        append_json(self.folder / METRICS, row)
        for tracker in self.trackers:
            tracker.log(row["step"], {f"train/{name}": value for name, value in row.items() if name != "step"})

    def evaluation(self, step: int, results: dict[str, dict]) -> None:
        """The figures of all test sets after a step."""
        append_json(self.folder / EVALUATIONS, {"step": step, "sets": results})
        figures = {f"eval/{name}/{key}": value for name, values in results.items() for key, value in values.items()}
        for tracker in self.trackers:
            tracker.log(step, figures)

    def close(self) -> None:
        """Flush the trackers."""
        for tracker in self.trackers:
            tracker.close()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, config: TrainConfig, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--report-to tensorboard: pip install tensorboard, or --report-to without it") from None
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in numbers(values).items():
            self.writer.add_scalar(name, value, step)
        counts = values.get("train/sfc_histogram")
        if counts and sum(counts):
            edges = [(number + 1) / NUM_BINS for number in range(NUM_BINS)]
            total = sum(count * (edge - 0.5 / NUM_BINS) for count, edge in zip(counts, edges, strict=True))
            self.writer.add_histogram_raw("train/sfc", 0, 1, sum(counts), total, total, edges, counts, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, resumed by its folder's name."""

    def __init__(self, folder: Path, config: TrainConfig, step: int):
        try:
            import wandb
        except ImportError:
            raise ValueError("--report-to wandb: pip install wandb") from None
        self.run = wandb.init(
            project="mmrm_fast", name=folder.name, dir=str(folder), config=options(config),
            id=str(folder.resolve()).replace(os.sep, "-")[-64:], resume="allow",
        )  # fmt: skip

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(numbers(values), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow, on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, config: TrainConfig, step: int):
        try:
            import mlflow
        except ImportError:
            raise ValueError("--report-to mlflow: pip install mlflow") from None
        self.mlflow = mlflow
        mlflow.start_run(run_name=folder.name)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.mlflow.log_metrics(numbers(values), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """What a tracker can plot."""
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def append_json(path: Path, row: dict) -> None:
    """Append one JSON line; numbers that are not finite become null."""
    with open(path, "a") as file:
        file.write(json.dumps(finite(row), allow_nan=False) + "\n")


def keep_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, and one that was cut short; no row is left of a file for step 0."""
    if path.exists():
        rows = [row for _, row in json_lines(path, skip_broken=True) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has had: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second of a known GPU; None of any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


class Rates:
    """Figures of a step that come from its time: throughput, memory, utilisation.

    Operations are those of matrix products with weights (attention's own are not counted): 2 a weight and token in the
    forward pass, as many for the gradient of the input and of a trained weight.

    Args:
        models: main model and, where there is one, proxy, with their image tokens a tile.
        device, num_ranks: what it runs on.
    """

    def __init__(self, models: list[tuple[RewardModel, int]], device: torch.device, num_ranks: int):
        self.text = [pass_flops(model.model.language_model.layers) for model, _ in models]
        model, tokens_per_tile = models[0]
        self.tile = (4 * tokens_per_tile + 1) * pass_flops(model.model.vision_tower.encoder)
        peak = peak_flops(device)
        self.device, self.peak = device, peak and peak * num_ranks

    def __call__(self, row: dict[str, Any], seconds: float) -> dict[str, float]:
        """The figures of a step of `seconds`."""
        tokens = (row["tokens"], row["text_tokens"])
        flops = sum(number * count for number, count in zip(self.text, tokens, strict=False)) + self.tile * row["tiles"]
        utilisation = {"mfu": flops / seconds / self.peak} if self.peak else {}
        return {
            "seconds": seconds,
            "sharing": row["tokens_unshared"] / max(row["tokens"], 1),
            "tokens_per_second": row["tokens"] / seconds,
            "flops_per_second": flops / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            **utilisation,
        }


def pass_flops(part: torch.nn.Module) -> int:
    """Operations a token in all passes of a part."""
    weights = [(p.numel(), p.requires_grad) for p in part.parameters() if p.ndim > 1]
    trained = sum(number for number, is_trained in weights if is_trained)
    total = sum(number for number, _ in weights)
    return 2 * total + (2 * total + 2 * trained if trained else 0)


def best_figure(results: dict[str, dict], name: str | None) -> float | None:
    """What the best weights have most of: SET.FIGURE (of `sfd` the least), or the mean o.o.d. accuracy, else of all."""
    if name is not None:
        test_set, _, figure = name.rpartition(".")
        if figure not in results.get(test_set, {}):
            raise ValueError(f"--best {name}: expected SET.FIGURE, such as {next(iter(results), 'iid')}.accuracy")
        value = results[test_set][figure]
        return None if math.isnan(value) else -value if figure == "sfd" else value
    kinds = [figures for figures in results.values() if figures["kind"] == "ood"] or list(results.values())
    return float(np.mean([judged_accuracy(figures) for figures in kinds])) if kinds else None
