"""Training: JSONL of preferences in, `runs/NAME/` with metrics, evaluation and the reward model out."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmrm_fast import sharding
from mmrm_fast.config import TrainConfig
from mmrm_fast.dataset import PreferenceDataset
from mmrm_fast.evaluate import (
    EvalSet,
    PairRow,
    batch_rows,
    judged_accuracy,
    named_sets,
    print_table,
    results_table,
    summarize,
    write_rows,
)
from mmrm_fast.inputs import InputErrors, open_inputs
from mmrm_fast.loader import load
from mmrm_fast.loss import StepAccumulator, preference_loss
from mmrm_fast.model import RewardModel
from mmrm_fast.packing import Notes, Packed, Packer
from mmrm_fast.records import RecordError, RecordFile
from mmrm_fast.shapes import cached_environments
from mmrm_fast.weights import Checkpoint, load_checkpoint, save_checkpoint

TINY_CHECKPOINT = Path(__file__).parent / "assets" / "shapes-internvl"
TINY = {"lr": 5e-4, "tokens_per_batch": 6_144, "tokens_per_micro_batch": 6_144}
DEFAULTS = {"lr": 1e-5, "tokens_per_batch": 131_072}
EVALUATED_TOGETHER = 16  # micro-batches a rank that are balanced together in evaluation


def train(config: TrainConfig) -> Path:
    """Train, evaluate and save; returns the run folder. Called once on every rank."""
    with sharding.ranks() as device:
        config, eval_sets = with_defaults(config)
        return Trainer(config, eval_sets, device).run()


def with_defaults(config: TrainConfig) -> tuple[TrainConfig, list[EvalSet]]:
    """The config with every default filled in, and the test sets."""
    if not config.data and config.model is not None:
        raise ValueError("--model without --data: give the JSONL to train on")
    eval_sets = [*named_sets(config.eval, "iid"), *named_sets(config.eval_ood, "ood")]
    if not config.data:
        if sharding.rank() == 0:
            cached_environments()
        sharding.barrier()
        folders = cached_environments()
        config = replace(config, data=(str(folders[config.environment] / "train.jsonl"),))
        eval_sets = eval_sets or shapes_sets(folders, config.environment)
    model = config.model or TINY_CHECKPOINT
    filled = TINY if model == TINY_CHECKPOINT else DEFAULTS
    filled = {name: value for name, value in filled.items() if getattr(config, name) is None}
    if model == TINY_CHECKPOINT:
        filled["tokens_per_micro_batch"] = min(config.tokens_per_micro_batch, TINY["tokens_per_micro_batch"])
    output_dir = config.output_dir or Path("runs") / ("robust" if config.robust else "standard")
    return replace(config, model=model, output_dir=output_dir, **filled), eval_sets


def shapes_sets(folders: dict[str, Path], trained: str) -> list[EvalSet]:
    """The trained environment's own test sets, and the i.i.d. tests of the others as o.o.d."""
    own = folders[trained]
    sets = [EvalSet("iid", "iid", own / "iid.jsonl")]
    sets += [EvalSet(name, "ood", folders[name] / "iid.jsonl") for name in folders if name != trained]
    return sets + [EvalSet(name, "probe", own / f"{name}.jsonl") for name in ("neutral", "reversed")]


class Trainer:
    """One training run on one rank."""

    def __init__(self, config: TrainConfig, eval_sets: list[EvalSet], device: torch.device):
        self.config, self.device = config, device
        self.is_main = sharding.rank() == 0
        torch.manual_seed(config.seed)
        self.main = self.load(config.model)
        self.proxy = self.load(config.proxy_model or config.model) if config.robust else None
        self.inputs = open_inputs(config, eval_sets, self.open, self.progress_bar)
        self.skipped: list[RecordError] = []  # the same on every rank
        self.undecoded: list[RecordError] = []  # this rank's
        self.counts = Counter()
        self.models = self.shard_models()
        self.optimizer = make_optimizer(self.models, config)
        self.accumulator = StepAccumulator(device)
        self.step = 0

    def load(self, folder: Path) -> Checkpoint:
        """Load a checkpoint with this run's limits."""
        return load_checkpoint(folder, max_length=self.config.max_length, max_tiles=self.config.max_tiles)

    def open(self, paths: tuple[str | Path, ...], overlong: str) -> PreferenceDataset:
        """The preference records of some files, encoded for both branches."""
        files = [RecordFile(path, self.config.image_root, need_pairs=True) for path in paths]
        encoder, tiling = self.main.prompt_encoder(), self.main.tiling
        return PreferenceDataset(
            files, encoder, tiling, overlong=overlong, with_text=self.config.robust, inputs=self.config.inputs
        )

    def progress_bar(self, description: str):
        """A tqdm wrapper that only the first rank shows."""
        return partial(tqdm, desc=description, leave=False, delay=2, disable=not self.is_main)

    def shard_models(self) -> list[RewardModel]:
        """Freeze, sharding, device: the main model and, when robust, the proxy."""
        config, models = self.config, [self.main.model]
        freeze(self.main.model, llm=config.freeze_llm, backbone=config.freeze_backbone, mlp=config.freeze_mlp)
        if self.proxy:
            models.append(self.proxy.model.drop_vision())
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return [sharding.shard(model, self.device, compute_dtype=dtype) for model in models]

    def run(self) -> Path:
        """The whole run."""
        folder = self.config.output_dir
        if self.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2, default=str) + "\n")
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        self.train_steps()
        results = self.evaluate(save_to=folder)
        self.save(folder, results)
        return folder

    def train_steps(self) -> None:
        """Every optimizer step, with a progress bar over the records."""
        config = self.config
        dataset = self.inputs.dataset
        total = int(config.epochs * len(dataset))
        bar = tqdm(total=total, unit=" records", disable=not self.is_main, desc="training", smoothing=0.1)
        consumed, started = 0, time.perf_counter()
        for packed in self.loader(dataset, self.inputs.order(total, config.seed)):
            if packed.step:
                self.note(packed.step.notes, training=True)
                if not packed.step.records:
                    break
            self.accumulate(packed)
            if not packed.step:
                continue
            share = self.share(consumed, packed.step.consumed, total)
            row = {"step": self.step + 1, **self.optimizer_step(share), "imbalance": packed.step.imbalance}
            row["seconds"] = time.perf_counter() - started
            bar.update(packed.step.consumed - consumed)
            consumed, started = packed.step.consumed, time.perf_counter()
            self.step += 1
            self.log(row, bar)
            if self.step == config.max_steps:
                break
            if config.eval_every and self.step % config.eval_every == 0:
                self.log_evaluation(self.evaluate(), bar)
        bar.close()
        if not self.step:
            raise ValueError(f"{', '.join(map(str, config.data))}: no pair to train on")

    def loader(self, dataset: PreferenceDataset, order: np.ndarray, *, training: bool = True) -> Iterator[Packed]:
        """This rank's packed micro-batches over `order`, prepared by worker processes."""
        config, on_gpu = self.config, self.device.type == "cuda"
        budget = config.tokens_per_micro_batch * sharding.num_ranks() * EVALUATED_TOGETHER
        return load(
            dataset,
            order,
            packer=Packer(dataset, with_text=config.robust),
            tokens_per_batch=config.tokens_per_batch if training else budget,
            pairs_per_step=config.pairs_per_step if training else None,
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            rank=sharding.rank(),
            num_ranks=sharding.num_ranks(),
            gather=sharding.gather_lists,
            num_workers=4 * on_gpu if config.num_workers is None else config.num_workers,
            pin_memory=on_gpu,
        )

    def note(self, notes: Notes, *, training: bool) -> None:
        """Keep account of records that cannot be used, or stop; in training also of what is not trained on."""
        if notes.errors and not self.config.skip_bad:
            raise InputErrors(list(notes.errors), "mend them, or pass --skip-bad to leave such records out")
        self.skipped += notes.errors
        if training:
            self.skipped += notes.dropped
            self.counts["responses without a numeric rating"] += notes.unrated
            self.counts["records without a preference"] += notes.unpaired

    def share(self, before: int, after: int, total: int) -> float:
        """How far the training is, 0 to 1, in the middle of a step."""
        by_records = (before + after) / 2 / total
        return max(by_records, (self.step + 0.5) / self.config.max_steps) if self.config.max_steps else by_records

    def accumulate(self, packed) -> None:
        """Forward and backward of one micro-batch, gradients as sums over pairs."""
        batch = packed.batch.to(self.device)
        rewards = self.models[0](batch.main, batch.tiles)
        proxy_rewards = self.models[1](batch.text) if self.proxy else None
        loss = preference_loss(rewards, proxy_rewards, batch, sfc_mode=self.config.sfc_mode)
        (loss.main + loss.proxy if self.proxy else loss.main).backward()
        self.accumulator.add(loss, packed.batch, len(packed.errors))
        self.undecoded += packed.errors.values()

    def optimizer_step(self, share: float) -> dict[str, float]:
        """Scale, clip and apply the accumulated gradients; the step's metrics."""
        config = self.config
        totals = self.accumulator.totals(sharding.all_sum)
        if totals.sums["errors"]:
            self.refuse_undecoded()
        metrics = totals.metrics()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"step {self.step + 1}: the loss is {metrics['loss']}; lower --lr")
        metrics["lr"] = config.lr * lr_factor(share, config.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["lr"]
        scales = totals.gradient_scales(config.sfc_mode if config.robust else "standard")
        for name, model, scale in zip(("grad_norm", "proxy_grad_norm"), self.models, scales, strict=False):
            metrics[name] = scale_and_clip(model, scale, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics

    def refuse_undecoded(self) -> None:
        """Images that could not be decoded, on any rank: stop on all of them, unless `skip_bad`."""
        if self.config.skip_bad:
            return
        errors = sharding.gather_lists(self.undecoded)
        if errors:
            raise InputErrors(errors, "mend them, or pass --skip-bad to leave them out")

    def log(self, row: dict, bar: tqdm) -> None:
        """One row of metrics.jsonl and the progress bar's figures."""
        if not self.is_main:
            return
        row["sharing"] = row["tokens_unshared"] / max(row["tokens"], 1)
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        append_json(self.config.output_dir / "metrics.jsonl", row)
        shown = {"loss": row["loss"], "acc": row["accuracy"], "sfc": row["sfc_mean"], "sharing": row["sharing"]}
        if not self.config.robust:
            shown.pop("sfc")
        figures = [f"{name} {value:.3f}" for name, value in shown.items()]
        bar.set_postfix_str(", ".join([*figures, f"{row['tokens_per_second']:,.0f} tok/s"]))

    def evaluate(self, save_to: Path | None = None) -> dict[str, dict]:
        """The figures of every test set; with `save_to` also its pairs, in eval-NAME.jsonl."""
        results = {}
        for eval_set, dataset in zip(self.inputs.eval_sets, self.inputs.eval_datasets, strict=True):
            rows = self.evaluate_one(dataset, eval_set.name)
            results[eval_set.name] = {"kind": eval_set.kind, **summarize(rows)}
            if save_to and self.is_main:
                write_rows(save_to / f"eval-{eval_set.name}.jsonl", rows)
        return results

    def evaluate_one(self, dataset: PreferenceDataset, name: str) -> list[PairRow]:
        """Every pair of a test set, on every rank, in the order of the file."""
        for model in self.models:
            model.eval()
        proxy = self.models[1] if self.proxy else None
        batches = self.loader(dataset, np.arange(len(dataset)), training=False)
        rows = []
        for packed in self.progress_bar(f"evaluating {name}")(batches):
            rows += batch_rows(self.models[0], proxy, packed, self.device)
            self.undecoded += packed.errors.values()
            if packed.step:
                self.note(packed.step.notes, training=False)
        for model in self.models:
            model.train()
        self.refuse_undecoded()
        return sorted(sharding.gather_lists(rows), key=lambda row: (row.record, row.chosen, row.rejected))

    def log_evaluation(self, results: dict[str, dict], bar: tqdm) -> None:
        """One row of evaluations.jsonl and a line above the progress bar."""
        if self.is_main:
            append_json(self.config.output_dir / "evaluations.jsonl", {"step": self.step, "sets": results})
            judged = (f"{name} {judged_accuracy(figures):.1%}" for name, figures in results.items())
            bar.write(f"step {self.step}: " + ", ".join(judged))

    def save(self, folder: Path, results: dict[str, dict]) -> None:
        """Write final/ (and proxy/), results.json and skipped.jsonl, and print the table."""
        skipped = self.skipped + sharding.gather_lists(self.undecoded)
        states = [sharding.full_state(model) for model in self.models]
        if not self.is_main:
            return
        for name, checkpoint, state in zip(("final", "proxy"), (self.main, self.proxy), states, strict=False):
            save_checkpoint(folder / name, checkpoint, state)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        with open(folder / "skipped.jsonl", "w") as file:
            file.writelines(
                json.dumps({"source": e.source, "field": e.field, "reason": e.reason}) + "\n" for e in skipped
            )
        if results:
            print_table(results_table(results))
        for what, number in [("records or responses skipped, see skipped.jsonl", len(skipped)), *self.counts.items()]:
            if number:
                print(f"{number} {what}")
        print(f"Score with it:\n  python scripts/score.py --model {folder / 'final'} --data in.jsonl --out out.jsonl")


def freeze(model: RewardModel, *, llm: bool, backbone: bool, mlp: bool) -> None:
    """Take parts out of the training."""
    parts = {"language_model": llm, "vision_tower": backbone, "multi_modal_projector": mlp}
    for name, frozen in parts.items():
        getattr(model.model, name).requires_grad_(not frozen)


def make_optimizer(models: list[RewardModel], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all branches; biases and norms do not decay."""
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))


def lr_factor(share: float, warmup_ratio: float) -> float:
    """Learning rate over its peak: linear warm-up, then half a cosine to zero."""
    if share < warmup_ratio:
        return share / warmup_ratio
    return 0.5 * (1 + math.cos(math.pi * (share - warmup_ratio) / (1 - warmup_ratio)))


def scale_and_clip(model: RewardModel, scale: float, max_norm: float) -> float:
    """Multiply a branch's gradients by `scale`, clip them to `max_norm`; their norm before clipping."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(sharding.full_value(torch.nn.utils.get_total_norm(grads))) * scale
    torch._foreach_mul_(grads, scale * min(1.0, max_norm / (norm + 1e-6)))
    return norm


def append_json(path: Path, row: dict) -> None:
    """Append one JSON line."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
