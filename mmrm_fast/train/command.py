"""`mmrm-fast train`: options are refused or completed, then it is trained, or said what that would need."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import with_options
from mmrm_fast.data.shapes import ENVIRONMENTS, cached_environments
from mmrm_fast.pairs import EvalSet, named_sets
from mmrm_fast.train import sharding
from mmrm_fast.train.dry_run import dry_run, fitted
from mmrm_fast.train.refusals import refuse
from mmrm_fast.train.run_folder import alone_in, open_run
from mmrm_fast.train.trainer import OnEvent, Trainer

TINY_CHECKPOINT = Path(__file__).parents[1] / "assets" / "shapes-internvl"
TINY_TOKENS, TOKENS = 6_144, 131_072  # a step
TINY_LR, LR = 5e-4, 1e-5


def run(config: TrainConfig) -> None:
    """Train, or with `--dry-run` say what it takes."""
    if not config.memory.dry_run:
        train(config)
        return
    num_gpus = config.memory.num_gpus or int(os.environ.get("WORLD_SIZE", "1"))
    refuse(config, num_ranks=num_gpus)
    dry_run(completed(config), num_gpus=num_gpus)


def train(config: TrainConfig, on_event: OnEvent = lambda event, trainer: None) -> Path:
    """Train, evaluate and save; returns the run folder. Called once on every rank.

    Args:
        config: options that are None get their defaults.
        on_event: told what happens next on this rank: a `micro-batch`, what follows a `step` that is applied and
            logged, a batch of an `evaluation`, a `save`, and in the background the `seal` of what was saved.

    Raises:
        ValueError: options that cannot be, all of them, before anything is loaded or written.
    """
    with sharding.deterministic(config.run.deterministic), sharding.ranks() as device:
        refuse(config, num_ranks=sharding.num_ranks())
        config, eval_sets = with_data(completed(config))
        config = sharding.on_first_rank(partial(fitted, config, num_gpus=sharding.num_ranks()))
        with alone_in(config.run.output_dir):
            return Trainer(config, eval_sets, device, open_run(config), on_event).run()


def completed(config: TrainConfig) -> TrainConfig:
    """The config with model, run folder and sizes where it leaves them open."""
    model, lr, batch = config.weights.model or TINY_CHECKPOINT, config.optimizer.lr, config.batch
    is_tiny = model == TINY_CHECKPOINT
    if batch.tokens_per_batch is None and batch.pairs_per_step is None:
        batch = replace(batch, tokens_per_batch=TINY_TOKENS if is_tiny else TOKENS)
    if is_tiny:
        batch = replace(batch, tokens_per_micro_batch=min(batch.tokens_per_micro_batch, TINY_TOKENS))
    lr = lr if lr is not None else TINY_LR if is_tiny else LR
    return with_options(replace(config, batch=batch), model=model, lr=lr, output_dir=run_folder(config))


def run_folder(config: TrainConfig) -> Path:
    """Where the run is: of a checkpoint that is resumed, in its own folder."""
    folder, resume = config.run.output_dir, config.run.resume
    if folder is not None:
        return folder
    if resume not in (None, "auto"):
        return Path(resume).resolve().parents[1]
    return Path("runs") / ("robust" if config.proxy.robust else "standard")


def with_data(config: TrainConfig) -> tuple[TrainConfig, list[EvalSet]]:
    """The config with its training files, and the test sets: of a shapes environment where there are none."""
    eval_sets = [*named_sets(config.records.eval, "iid"), *named_sets(config.records.eval_ood, "ood")]
    if config.records.data:
        return config, eval_sets
    trained = config.records.environment
    folders = sharding.on_first_rank(lambda: cached_environments(environments=(*ENVIRONMENTS, trained)))
    own = folders[trained]
    shapes = [EvalSet("iid", "iid", own / "iid.jsonl")]
    shapes += [EvalSet(name, "ood", folder / "iid.jsonl") for name, folder in folders.items() if name != trained]
    shapes += [EvalSet(name, "probe", own / f"{name}.jsonl") for name in ("neutral", "reversed")]
    return with_options(config, data=(str(own / "train.jsonl"),)), eval_sets or shapes
