"""Training: JSONL of preferences in, `runs/NAME/` with metrics, evaluation and the reward model out."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.config import TrainConfig
from mmrm_fast.data.mixture import PreferenceDataset
from mmrm_fast.data.packing import Packed
from mmrm_fast.data.records import RecordError
from mmrm_fast.data.samples import Notes
from mmrm_fast.data.schedule import load
from mmrm_fast.files import remove_unfinished, whole_folder, write_json, write_text
from mmrm_fast.machine import this_machine
from mmrm_fast.model.lora import MAIN, PROXY
from mmrm_fast.pairs import EvalSet, PairRow, judged_accuracy, reward_stats, summarize, write_rows
from mmrm_fast.tables import print_table, results_table
from mmrm_fast.train import sharding
from mmrm_fast.train.defaults import with_defaults
from mmrm_fast.train.evaluation import batch_rows
from mmrm_fast.train.proxy import check_proxy, make_branches, train_mode
from mmrm_fast.train.records import MAX_LISTED, InputErrors, open_inputs, training_preparer
from mmrm_fast.train.resume import Checkpoints, load_tensors, read_progress, require_space
from mmrm_fast.train.run_folder import (
    CHECKPOINTS,
    CONFIG,
    Progress,
    Stopped,
    config_json,
    open_run,
    remove_run,
    terminations,
)
from mmrm_fast.train.step import Steps
from mmrm_fast.train.tracking import MetricsLog, Rates, best_figure

EVALUATED_TOGETHER = 16  # micro-batches a rank that are balanced together in evaluation


def train(config: TrainConfig) -> Path:
    """Train, evaluate and save; returns the run folder. Called once on every rank."""
    with sharding.ranks() as device:
        config, eval_sets = with_defaults(config)
        check_proxy(config)
        start, problems = open_run(config)
        if problems and sharding.rank() == 0:
            print("\n".join([*problems, f"resuming from {start}"]), file=sys.stderr)
        return Trainer(config, eval_sets, device, start).run()


class Trainer:
    """One training run on one rank."""

    def __init__(self, config: TrainConfig, eval_sets: list[EvalSet], device: torch.device, start: Path | None):
        self.config, self.device, self.start = config, device, start
        self.is_main = sharding.rank() == 0
        torch.manual_seed(config.run.seed)
        self.branches = make_branches(config, device)
        self.main, self.proxy = self.branches[0], self.branches[1] if len(self.branches) > 1 else None
        unchecked = {"check_records": 0} if start else {}  # they were checked when the run began
        preparer = training_preparer(config, self.main.checkpoint, with_text=self.proxy is not None)
        records = replace(config.records, **unchecked)
        self.inputs = open_inputs(records, eval_sets, preparer, self.progress_bar)
        self.undecoded: list[RecordError] = []  # this rank's
        self.progress = Progress(config_json(config))
        self.steps = Steps(self.branches, config, device)
        models = [(branch.root, branch.checkpoint.tokens_per_tile) for branch in self.branches]
        self.rates = Rates(models, device, sharding.num_ranks())
        self.received: list[int] = []  # signals

    def progress_bar(self, description: str):
        """A tqdm wrapper that only the first rank shows."""
        return partial(tqdm, desc=description, leave=False, delay=2, disable=not self.is_main)

    def run(self) -> Path:
        """The whole run, from where it starts to its end or to a SIGTERM."""
        folder = self.config.run.output_dir
        if self.start is not None:
            self.restore(self.start)
        sharding.on_first_rank(self.open_folder)
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, keep=self.config.run.keep)
        try:
            with terminations() as self.received:
                self.train_steps()
                self.finish()
        except Stopped:
            self.stop()
        finally:
            self.warn(self.checkpoints.wait())
        self.checkpoints.close()
        if self.is_main:
            self.log.close()
        return folder

    def open_folder(self) -> None:
        """The run folder, its config and its metrics; on the first rank."""
        folder = self.config.run.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.run.overwrite and self.config.run.resume is None:
            remove_run(folder)
        remove_unfinished(folder)
        require_space(folder, self.steps.tensors())
        record = this_machine().record() | {"ranks": str(sharding.num_ranks())}
        write_text(folder / "environment.json", json.dumps(record, indent=2) + "\n")
        write_text(folder / CONFIG, json.dumps(config_json(self.config), indent=2) + "\n")
        self.log = MetricsLog(folder, self.config, step=self.progress.step)

    def restore(self, checkpoint: Path) -> None:
        """Go on where a checkpoint was written."""
        load_tensors(checkpoint, self.steps.tensors())
        self.progress = Progress.of(read_progress(checkpoint))
        if self.is_main:
            print(f"resuming after step {self.progress.step}, {checkpoint}", file=sys.stderr)

    def train_steps(self) -> None:
        """Every optimizer step that is left, with a progress bar over the records."""
        progress, total = self.progress, int(self.config.optimizer.epochs * len(self.inputs.dataset))
        self.saved_at = started = time.perf_counter()
        waited = 0.0
        self.train_mode()
        with tqdm(total=total, unit=" records", disable=not self.is_main, desc="training", smoothing=0.1) as bar:
            bar.update(progress.consumed)
            self.evaluate_when_due(bar)
            for packed, seconds in timed(self.batches_left(total)):
                self.end_when_told()
                waited += seconds
                if packed.step:
                    self.note(packed.step.notes, training=True)
                    if not packed.step.records:
                        break
                self.accumulate(packed)
                if not packed.step:
                    continue
                row = self.optimizer_step(self.share(progress.consumed, packed.step.consumed, total))
                row |= {"imbalance": packed.step.imbalance, "data_wait_seconds": waited}
                bar.update(packed.step.consumed - progress.consumed)
                progress.consumed, progress.step = packed.step.consumed, progress.step + 1
                self.report({"step": progress.step, **row}, bar, time.perf_counter() - started)
                self.evaluate_when_due(bar)
                self.save_when_due()
                started, waited = time.perf_counter(), 0.0
                if progress.step == self.config.optimizer.max_steps:
                    break
        if not progress.step:
            raise ValueError(f"{', '.join(map(str, self.config.records.data))}: no pair to train on")

    def batches_left(self, total: int) -> Iterator[Packed]:
        """The micro-batches from where the run is to its end."""
        if self.progress.step == self.config.optimizer.max_steps:
            return iter(())
        order = self.inputs.order(total, self.config.run.seed)
        return self.loader(self.inputs.dataset, order, start=self.progress.consumed)

    def end_when_told(self) -> None:
        """Raise `Stopped` on all ranks when one received a SIGTERM; called before every micro-batch."""
        if sharding.any_rank(bool(self.received)):
            raise Stopped

    def stop(self) -> None:
        """Save what is done, without the step that is under way, and say how to go on."""
        self.save_progress()
        problem = self.checkpoints.wait()
        if problem:
            raise OSError(problem)
        if self.is_main:
            print(f"stopped by SIGTERM after step {self.progress.step}; --resume auto goes on", file=sys.stderr)

    def evaluate_when_due(self, bar: tqdm) -> None:
        """Evaluate every `eval_every` steps, and after resuming where that did not happen any more."""
        step, every = self.progress.step, self.config.run.eval_every
        if every and step and step % every == 0 and self.progress.evaluated != step:
            self.log_evaluation(self.figures(self.evaluate()), bar)
            self.progress.evaluated = step

    def save_when_due(self) -> None:
        """Write a checkpoint every `save_every` steps and `save_minutes` minutes."""
        every = self.config.run.save_every
        if self.save_asked or (every and self.progress.step % every == 0):
            self.save_progress()

    def save_progress(self) -> None:
        """Write a checkpoint in the background; a failure is told, and tried again the next time."""
        self.progress.skip(sharding.gather_lists(self.undecoded))
        self.undecoded.clear()
        self.warn(self.checkpoints.save(self.progress.step, self.steps.tensors(), self.progress.saved()))
        self.saved_at = time.perf_counter()

    def warn(self, problem: str | None) -> None:
        """Say what did not work, once."""
        if problem and self.is_main:
            print(f"warning: {problem}; the checkpoint before it is kept", file=sys.stderr)

    def loader(
        self, dataset: PreferenceDataset, order: np.ndarray, *, training: bool = True, start: int = 0
    ) -> Iterator[Packed]:
        """This rank's packed micro-batches over `order`, prepared by worker processes."""
        config, on_gpu, num_workers = self.config.batch, self.device.type == "cuda", self.config.run.num_workers
        budget = config.tokens_per_micro_batch * sharding.num_ranks() * EVALUATED_TOGETHER
        return load(
            dataset,
            order,
            tokens_per_batch=config.tokens_per_batch if training else budget,
            pairs_per_step=config.pairs_per_step if training else None,
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            start=start,
            rank=sharding.rank(),
            num_ranks=sharding.num_ranks(),
            gather=sharding.gather_lists,
            num_workers=4 * on_gpu if num_workers is None else num_workers,
            pin_memory=on_gpu,
        )

    def note(self, notes: Notes, *, training: bool) -> None:
        """Keep account of records that cannot be used, or stop; in training also of what is not trained on."""
        if notes.errors and not self.config.records.skip_bad:
            raise InputErrors(list(notes.errors), "mend them, or pass --skip-bad to leave such records out")
        self.progress.skip([*notes.errors, *(notes.dropped if training else ())])
        if training:
            self.progress.counts["responses without a numeric rating"] += notes.unrated
            self.progress.counts["records without a preference"] += notes.unpaired

    def share(self, before: int, after: int, total: int) -> float:
        """How far the training is, 0 to 1, in the middle of a step."""
        by_records = (before + after) / 2 / total
        max_steps = self.config.optimizer.max_steps
        return max(by_records, (self.progress.step + 0.5) / max_steps) if max_steps else by_records

    def train_mode(self) -> None:
        """Training mode for what is trained."""
        for branch in self.branches:
            train_mode(branch.root)

    def accumulate(self, packed: Packed) -> None:
        """Add a micro-batch to the step."""
        self.steps.add(packed, self.progress.step)
        self.undecoded += packed.errors.values()

    def optimizer_step(self, share: float) -> dict:
        """Apply the step's gradients; its metrics."""
        minutes = (time.perf_counter() - self.saved_at) / 60
        if self.is_main and self.config.run.save_minutes and minutes >= self.config.run.save_minutes:
            self.steps.accumulator.request("save")  # in the sums, as only one rank's clock counts
        outcome = self.steps.apply(share)
        self.save_asked = outcome.save_asked
        if outcome.num_errors:
            self.refuse_undecoded()
        self.count_bad(outcome.is_finite, self.steps.forget_sources())
        return outcome.metrics | {"bad_steps": self.progress.bad_steps}

    def count_bad(self, is_finite: bool, sources: list[str]) -> None:
        """Count steps in a row that were not finite; too many stop the run and name the last one's records."""
        progress = self.progress
        progress.bad_steps = 0 if is_finite else progress.bad_steps + 1
        progress.counts["steps skipped: loss or gradient not finite"] += not is_finite
        if progress.bad_steps and progress.bad_steps >= self.config.optimizer.max_bad_steps:
            sources = sharding.gather_lists(sources)
            listed = ", ".join(sources[:MAX_LISTED]) + (" ..." if len(sources) > MAX_LISTED else "")
            raise FloatingPointError(
                f"{progress.bad_steps} steps in a row with a loss or gradient that is not finite, the last one, "
                f"{progress.step + 1}, over {listed}; look at these records, or lower --lr"
            )

    def refuse_undecoded(self) -> None:
        """Images that could not be decoded, on any rank: stop on all of them, unless `skip_bad`."""
        if self.config.records.skip_bad:
            return
        errors = sharding.gather_lists(self.undecoded)
        if errors:
            raise InputErrors(errors, "mend them, or pass --skip-bad to leave them out")

    def report(self, row: dict, bar: tqdm, seconds: float) -> None:
        """One row of metrics.jsonl and the progress bar's figures."""
        if not self.is_main:
            return
        row |= self.rates(row, seconds)
        self.log.step(row)
        shown = {"loss": row["loss"], "acc": row["accuracy"], "sharing": row["sharing"]}
        shown |= {"sfc": row["sfc_mean"]} if self.config.proxy.robust else {}
        figures = [f"{name} {value:.3f}" for name, value in shown.items()]
        bar.set_postfix_str(", ".join([*figures, f"{row['tokens_per_second']:,.0f} tok/s"]))

    def evaluate(self) -> dict[str, list[PairRow]]:
        """Every pair of every test set, by its name."""
        inputs = self.inputs
        sets = zip(inputs.eval_sets, inputs.eval_datasets, strict=True)
        return {eval_set.name: self.evaluate_one(dataset, eval_set.name) for eval_set, dataset in sets}

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of every test set, by its name."""
        return {eval_set.name: eval_set.kind for eval_set in self.inputs.eval_sets}

    def figures(self, rows: dict[str, list[PairRow]]) -> dict[str, dict]:
        """The figures of every test set, by its name."""
        return {name: {"kind": self.kinds[name], **summarize(own)} for name, own in rows.items()}

    def evaluate_one(self, dataset: PreferenceDataset, name: str) -> list[PairRow]:
        """Every pair of a test set, on every rank, in the order of the file."""
        for branch in self.branches:
            branch.root.eval()
        batches = self.loader(dataset, np.arange(len(dataset)), training=False)
        rows = []
        for packed in self.progress_bar(f"evaluating {name}")(batches):
            self.end_when_told()
            rows += batch_rows(self.main, self.proxy, packed, self.device)
            self.undecoded += packed.errors.values()
            if packed.step:
                self.note(packed.step.notes, training=False)
        self.train_mode()
        self.refuse_undecoded()
        return sorted(sharding.gather_lists(rows), key=lambda row: (row.record, row.chosen, row.rejected))

    def log_evaluation(self, results: dict[str, dict], bar: tqdm) -> None:
        """One row of evaluations.jsonl, a line above the progress bar, and best/ where these weights are the best."""
        if self.is_main:
            self.log.evaluation(self.progress.step, results)
            judged = (f"{name} {judged_accuracy(figures):.1%}" for name, figures in results.items())
            bar.write(f"step {self.progress.step}: " + ", ".join(judged))
        value = best_figure(results, self.config.run.best)
        if value is not None and (self.progress.best is None or value > self.progress.best):
            self.progress.best = value
            self.save_weights({MAIN: "best"})

    def save_weights(self, names: dict[str, str]) -> None:
        """Write the branches' weights as plain checkpoints, into folders of these names."""
        for branch in self.branches:
            if branch.name not in names:
                continue
            state = branch.state()
            if self.is_main:
                with whole_folder(self.config.run.output_dir / names[branch.name], replace=True) as folder:
                    save_checkpoint(folder, branch.checkpoint, state)

    def finish(self) -> None:
        """The last evaluation, final/ (and proxy/), results.json and skipped.jsonl, and the table."""
        folder = self.config.run.output_dir
        if (self.start or self.config.run.save_every) and self.checkpoints.saving_step != self.progress.step:
            self.save_progress()
        rows = self.evaluate()
        self.save_weights({MAIN: "final", PROXY: "proxy"})
        self.progress.skip(sharding.gather_lists(self.undecoded))
        if not self.is_main:
            return
        results = self.figures(rows)
        for name, own in rows.items():
            write_rows(folder / f"eval-{name}.jsonl", own)
        write_text(folder / "final" / "reward_stats.json", json.dumps(reward_stats(rows, self.kinds), indent=2) + "\n")
        write_json(folder / "results.json", results)
        write_text(folder / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in self.progress.skipped))
        if results:
            print_table(results_table(results))
        notes = [("records or responses skipped, see skipped.jsonl", len(self.progress.skipped))]
        for what, number in [*notes, *self.progress.counts.items()]:
            if number:
                print(f"{number} {what}")
        print(f"Score with it:\n  python scripts/score.py --model {folder / 'final'} --data in.jsonl --out out.jsonl")


def timed(items: Iterator[Packed]) -> Iterator[tuple[Packed, float]]:
    """Items with the seconds waited for each."""
    items, started = iter(items), time.perf_counter()
    for item in items:
        yield item, time.perf_counter() - started
        started = time.perf_counter()
