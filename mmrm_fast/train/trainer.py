"""The training loop: preference records in, steps over them, a run folder with the reward model out."""

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmrm_fast.config import TrainConfig
from mmrm_fast.data.fingerprint import differences, fingerprints
from mmrm_fast.data.mixture import PreferenceDataset
from mmrm_fast.data.packing import Packed, Step
from mmrm_fast.data.records import RecordError
from mmrm_fast.data.samples import Notes
from mmrm_fast.data.schedule import load
from mmrm_fast.pairs import EvalSet, PairRow, judged_accuracy, reward_stats, summarize
from mmrm_fast.tables import percent, print_results
from mmrm_fast.train import sharding
from mmrm_fast.train.branch import train_mode
from mmrm_fast.train.evaluation import best_figure, evaluate
from mmrm_fast.train.loss import SAVE
from mmrm_fast.train.proxy import make_branches, parse_proxy
from mmrm_fast.train.rates import Rates
from mmrm_fast.train.records import HELD_OUT, MAX_LISTED, InputErrors, open_inputs, training_preparer
from mmrm_fast.train.resume import Checkpoints, RunState, load_tensors, require_space
from mmrm_fast.train.run_folder import BEST, FINAL, PROXY, SKIPPED, RunFolder, config_json
from mmrm_fast.train.step import Outcome, Steps

EVALUATED_TOGETHER = 16  # micro-batches a rank that are balanced together in evaluation

OnEvent = Callable[[str, "Trainer"], None]


class Trainer:
    """One training run on one rank, from a checkpoint or from the start."""

    def __init__(
        self, config: TrainConfig, eval_sets: list[EvalSet], device: torch.device, start: Path | None, on_event: OnEvent
    ):
        self.config, self.device, self.start, self.on_event = config, device, start, on_event
        self.is_main = sharding.rank() == 0
        torch.manual_seed(config.run.seed)
        proxy = parse_proxy(config)
        self.branches = make_branches(proxy, device)
        self.open_data(eval_sets, start and RunState.read(start).copies)
        self.steps = Steps(self.branches, proxy, config, device)
        self.state = self.begun()
        self.folder = RunFolder(config.run.output_dir)
        tokens_per_tile = self.branches[0].checkpoint.tokens_per_tile
        self.rates = Rates([branch.root for branch in self.branches], tokens_per_tile, device)
        self.undecoded: list[RecordError] = []  # on this rank, since all ranks noted them
        self.waited = 0.0  # seconds of a step without data
        self.received: list[int] = []  # signals

    def open_data(self, eval_sets: list[EvalSet], copies: list[list[int]] | None) -> None:
        """Open what is trained and tested on, without the copies that were found when the run began."""
        config, checkpoint = self.config, self.branches[0].checkpoint
        unchecked = {"check_records": 0} if self.start else {}  # they were checked when the run began
        preparer = training_preparer(config, checkpoint, with_text=len(self.branches) > 1)
        records = replace(config.records, **unchecked)
        self.inputs = open_inputs(records, eval_sets, preparer, self.progress_bar, copies)
        self.kinds = {eval_set.name: eval_set.kind for eval_set in self.inputs.eval_sets}
        self.total = int(config.optimizer.epochs * len(self.inputs.dataset))  # records to train on

    def begun(self) -> RunState:
        """The state that the run starts from. Raises `ValueError` where its data are not what they were."""
        files = [*self.inputs.dataset.records.files, *self.steps.proxy.files()]
        if self.start is None:
            data = sharding.on_first_rank(lambda: fingerprints(files))
            return RunState(config_json(self.config), data, self.inputs.copies)
        state = RunState.read(self.start)
        changes = sharding.on_first_rank(lambda: differences(state.data, files))
        if changes and not self.config.run.accept_changed_data:
            remedy = "restore what the run began with, or pass --accept-changed-data to go on with what is there"
            raise ValueError("\n".join(["the data have changed since the checkpoint:", *changes, remedy]))
        data = sharding.on_first_rank(lambda: fingerprints(files)) if changes else state.data
        for change in changes:
            self.say(f"going on with changed data: {change}")
        if changes:
            self.open_data([own for own in self.inputs.eval_sets if own.name != HELD_OUT], None)
        if state.consumed > self.total:
            raise ValueError(f"{state.consumed} records were trained on, the data have {self.total}: nothing is left")
        return replace(state, config=config_json(self.config), data=data, copies=self.inputs.copies)

    def run(self) -> Path:
        """The whole run, from where it starts to its end; raises `SystemExit` where a signal stopped it before."""
        if self.start is not None:
            load_tensors(self.start, self.steps.tensors())
            self.say(f"resuming after step {self.state.step} from {self.start}")
        sharding.on_first_rank(self.begin_folder)
        options = {"device": self.device, "resumed": self.start is not None, "progress": self.progress_bar}
        self.steps.proxy.prepare(self.branches, self.inputs, self.folder.path, **options)
        self.checkpoints = Checkpoints(self.folder.checkpoints, keep=self.config.run.keep)
        status = None
        with terminations() as self.received:
            try:
                self.train_steps()
                self.finish()
            except Stopped as stopped:
                status = self.stop(*stopped.args)
            finally:
                self.warn(self.checkpoints.wait())
                self.folder.close()
        self.checkpoints.close()
        if status is not None:
            sys.exit(status)
        return self.folder.path

    def begin_folder(self) -> None:
        """A folder that holds this run alone, and room for its checkpoints."""
        self.folder.clear(replace=self.config.run.overwrite and self.config.run.resume is None)
        require_space(self.folder.checkpoints, self.steps.tensors(), keep=self.config.run.keep)
        self.folder.begin(self.state, self.config.run.report_to)

    def train_steps(self) -> None:
        """Every optimizer step that is left, with a progress bar over the records."""
        run, batch, order = self.config.run, self.config.batch, self.inputs.order(self.total, self.config.run.seed)
        sizes = {"tokens_per_batch": batch.tokens_per_batch, "pairs_per_step": batch.pairs_per_step}
        left = self.load(self.inputs.dataset, order, start=self.state.consumed, **sizes)
        batches = self.watched(left, "micro-batch", training=True)
        for branch in self.branches:
            train_mode(branch.root)
        self.saved_at = time.perf_counter()
        options = {"desc": "training", "unit": " records", "smoothing": 0.1, "disable": not self.is_main}
        with tqdm(total=self.total, initial=self.state.consumed, **options) as self.bar:
            self.evaluate_when_due()
            started, self.waited = time.perf_counter(), 0.0
            while step := self.add_up(batches):
                outcome = self.apply(step)
                self.log(outcome, step, time.perf_counter() - started)
                self.on_event("step", self)
                self.evaluate_when_due()
                if outcome.save_asked or (run.save_every and self.state.step % run.save_every == 0):
                    self.save()
                started, self.waited = time.perf_counter(), 0.0
        self.require_whole()

    def require_whole(self) -> None:
        """Raise `ValueError` where less was trained than the run was to."""
        state, data = self.state, ", ".join(map(str, self.config.records.data))
        if not state.step:
            raise ValueError(f"{data}: no pair to train on")
        if not state.trained:
            raise ValueError(f"{data}: no record was trained on in {state.step} steps; see skipped and not finite ones")
        if state.consumed != self.total and state.step != self.config.optimizer.max_steps:
            raise ValueError(f"{data}: ended after {state.consumed} records, {self.total} were planned")

    def add_up(self, batches: Iterable[Packed]) -> Step | None:
        """Add up the gradients of the next step; what the schedule says of it, None where no step is left."""
        if self.state.step == self.config.optimizer.max_steps:
            return None
        for packed in batches:
            if packed.step and not packed.step.records:
                return None
            self.steps.add(packed, self.state.step)
            if packed.step:
                return packed.step
        return None

    def apply(self, step: Step) -> Outcome:
        """Apply the step's gradients and count it."""
        minutes = (time.perf_counter() - self.saved_at) / 60
        if self.is_main and self.config.run.save_minutes and minutes >= self.config.run.save_minutes:
            self.steps.accumulator.counts[SAVE] += 1  # in the sums, as only one rank's clock counts
        outcome = self.steps.apply(self.share(step))
        if outcome.num_errors:
            self.note_undecoded()
        self.count_bad(outcome)
        self.bar.update(step.consumed - self.state.consumed)
        self.state.consumed, self.state.step = step.consumed, self.state.step + 1
        self.state.trained += outcome.is_finite * int(outcome.metrics["records"])
        return outcome

    def share(self, step: Step) -> float:
        """How far the training is, 0 to 1, in the middle of a step."""
        by_records = (self.state.consumed + step.consumed) / 2 / self.total
        max_steps = self.config.optimizer.max_steps
        return max(by_records, (self.state.step + 0.5) / max_steps) if max_steps else by_records

    def count_bad(self, outcome: Outcome) -> None:
        """Count steps in a row that were not finite; too many stop the run and name the last one's records."""
        state = self.state
        state.bad_steps = 0 if outcome.is_finite else state.bad_steps + 1
        state.count("steps skipped: loss or gradient not finite", not outcome.is_finite)
        if state.bad_steps and state.bad_steps >= self.config.optimizer.max_bad_steps:
            sources = sharding.gather_lists(outcome.sources)
            listed = ", ".join(sources[:MAX_LISTED]) + (" ..." if len(sources) > MAX_LISTED else "")
            raise FloatingPointError(
                f"{state.bad_steps} steps in a row with a loss or gradient that is not finite, the last one, "
                f"{state.step + 1}, over {listed}; look at these records, or lower --lr"
            )

    def log(self, outcome: Outcome, step: Step, seconds: float) -> None:
        """One row of metrics.jsonl and the progress bar's figures."""
        if not self.is_main:
            return
        row = {"step": self.state.step, **outcome.metrics, "bad_steps": self.state.bad_steps}
        row |= {"imbalance": step.imbalance, "data_wait_seconds": self.waited, **self.rates(row, seconds)}
        self.folder.log_step(row)
        shown = {"loss": "loss", "acc": "accuracy", "sharing": "sharing", "sfc": "sfc_mean"}
        parts = [f"{name} {row[key]:.3f}" for name, key in shown.items() if name != "sfc" or self.config.proxy.robust]
        self.bar.set_postfix_str(", ".join([*parts, f"{row['tokens_per_second']:,.0f} tok/s"]))

    def evaluate_when_due(self) -> None:
        """Evaluate every `eval_every` steps, and after resuming where that did not happen any more."""
        state, every = self.state, self.config.run.eval_every
        if not every or not state.step or state.step % every or state.evaluated == state.step:
            return
        results = self.figures(self.evaluate())
        if self.is_main:
            self.folder.log_evaluation(state.step, results)
            judged = (f"{name} {percent(judged_accuracy(own))}" for name, own in results.items())
            self.bar.write(f"step {state.step}, accuracy (%): " + ", ".join(judged))
        value = best_figure(results, self.config.run.best)
        if value is not None and (state.best is None or value > state.best):
            state.best = value
            self.write_weights(BEST, 0)
        state.evaluated = state.step

    def evaluate(self) -> dict[str, list[PairRow]]:
        """Every pair of every test set, by its name."""
        together = self.config.batch.tokens_per_micro_batch * sharding.num_ranks() * EVALUATED_TOGETHER
        batches = {}
        for name, dataset in zip(self.kinds, self.inputs.eval_datasets, strict=True):
            packed = self.load(dataset, np.arange(len(dataset)), tokens_per_batch=together)
            shown = self.progress_bar(f"evaluating {name}")(packed)
            batches[name] = self.watched(shown, "evaluation", training=False)
        rows, errors = evaluate(self.branches, self.steps.proxy, batches, self.device)
        self.note_undecoded()
        self.state.skip(errors)
        if errors:
            self.say(f"warning: {len(errors)} pairs are not in the figures, see {SKIPPED}; the first: {errors[0]}")
        return rows

    def figures(self, rows: dict[str, list[PairRow]]) -> dict[str, dict]:
        """The kind and the figures of every evaluated test set, and how many of its pairs are in none, by its name."""
        sets = zip(rows.items(), self.inputs.eval_datasets, strict=True)
        return {name: {"kind": self.kinds[name], **summarize(own), **data.left_out()} for (name, own), data in sets}

    def save(self) -> None:
        """Write a checkpoint in the background; a failure is told, and tried again the next time."""
        self.on_event("save", self)
        on_seal = partial(self.on_event, "seal", self)
        self.warn(self.checkpoints.save(self.state, self.steps.tensors(), on_seal=on_seal))
        self.saved_at = time.perf_counter()

    def stop(self, number: int) -> int:
        """Save what is done, without the step that is under way, and say how to go on; the exit status of a signal."""
        self.save()
        problem = self.checkpoints.wait()
        if problem:
            raise OSError(problem)
        name = signal.Signals(number).name
        self.say(
            f"stopped by {name} after step {self.state.step}, {self.state.consumed} of {self.total} records; "
            "--resume auto goes on"
        )
        return 128 + number

    def finish(self) -> None:
        """The last checkpoint, the last evaluation, the weights, the results and what is to be said of them."""
        if (self.start or self.config.run.save_every) and self.checkpoints.saving_step != self.state.step:
            self.save()
        rows = self.evaluate()
        self.write_weights(FINAL, 0, reward_stats=reward_stats(rows, self.kinds))
        if len(self.branches) > 1:
            self.write_weights(PROXY, 1)
        if self.is_main:
            results = self.figures(rows)
            source, state = self.inputs.dataset.records.source, self.state
            copies = ({"source": source(i), "field": "", "reason": f"a copy of {source(j)}"} for i, j in state.copies)
            self.folder.write_results(rows, results, [*state.skipped, *copies])
            print_summary(self.folder.path, results, self.state)

    def write_weights(self, name: str, branch: int, **notes: dict) -> None:
        """Write a branch's weights as a plain checkpoint, into a folder of this name."""
        state = self.branches[branch].state()
        if self.is_main:
            self.folder.write_weights(name, self.branches[branch].checkpoint, state, **notes)
        sharding.wait_for_all()

    def load(self, dataset: PreferenceDataset, order: np.ndarray, **options) -> Iterator[Packed]:
        """This rank's packed micro-batches over `order`, prepared by worker processes from the first one on."""
        on_gpu, num_workers = self.device.type == "cuda", self.config.run.num_workers
        yield from load(
            dataset, order, tokens_per_micro_batch=self.config.batch.tokens_per_micro_batch, rank=sharding.rank(),
            num_ranks=sharding.num_ranks(), gather=sharding.gather_lists,
            num_workers=4 * on_gpu if num_workers is None else num_workers, pin_memory=on_gpu, **options,
        )  # fmt: skip

    def watched(self, batches: Iterable[Packed], event: str, *, training: bool) -> Iterator[Packed]:
        """The batches, with account kept of what cannot be used; raises `Stopped` on all ranks when one is told to."""
        started = time.perf_counter()
        for packed in batches:
            self.waited += time.perf_counter() - started
            self.on_event(event, self)
            if number := sharding.most(max(self.received, default=0)):
                raise Stopped(number)
            if packed.step:
                self.note(packed.step.notes, training=training)
            self.undecoded += packed.errors.values()
            yield packed
            started = time.perf_counter()

    def note(self, notes: Notes, *, training: bool) -> None:
        """Keep account of what the schedule says of records; in training also of what is not trained on."""
        self.leave_out(notes.errors)
        if training:
            self.state.skip(notes.dropped)
            self.state.count("responses without a numeric rating", notes.unrated)
            self.state.count("records without a preference", notes.unpaired)
            self.state.count("pairs over --max-pairs", notes.undrawn)
            self.state.count("pairs whose two sides are the same", notes.identical)

    def note_undecoded(self) -> None:
        """Keep account of images that could not be decoded, on any rank."""
        errors, self.undecoded = sharding.gather_lists(self.undecoded), []
        self.leave_out(errors)

    def leave_out(self, errors: Iterable[RecordError]) -> None:
        """Leave records out, which `--skip-bad` allows; raises `InputErrors` where it does not."""
        if errors and not self.config.records.skip_bad:
            raise InputErrors(list(errors))
        self.state.skip(errors)

    def progress_bar(self, description: str) -> Callable:
        """A tqdm wrapper that only the first rank shows."""
        return partial(tqdm, desc=description, leave=False, delay=2, disable=not self.is_main)

    def warn(self, problem: str | None) -> None:
        """Say what did not work, once."""
        if problem:
            self.say(f"warning: {problem}; the checkpoint before it is kept")

    def say(self, text: str) -> None:
        """A line on the first rank's standard error."""
        if self.is_main:
            print(text, file=sys.stderr)


def print_summary(folder: Path, results: dict[str, dict], state: RunState) -> None:
    """The table of figures, what was not trained on, and what to do next."""
    if results:
        print_results(results)
    skipped = {"records or responses skipped": len(state.skipped), "copies of other records": len(state.copies)}
    counts = {f"{what}, see {SKIPPED}": number for what, number in skipped.items()} | state.counts
    for what, number in counts.items():
        if number:
            print(f"{number} {what}")
    print(f"Score with it:\n  python scripts/score.py --model {folder / FINAL} --data in.jsonl --out out.jsonl")


class Stopped(Exception):
    """A rank was told to end by the signal of this number, and all know it."""


@contextmanager
def terminations() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT add instead of ending the process, which a SIGINT after them does at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
