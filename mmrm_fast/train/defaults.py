"""What a training run does where its config leaves it open: the shapes environments, the tiny checkpoint, the sizes."""

from pathlib import Path

from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import options, with_options
from mmrm_fast.data.shapes import cached_environments
from mmrm_fast.pairs import FIGURES, EvalSet, named_sets
from mmrm_fast.train import sharding
from mmrm_fast.train.records import HELD_OUT

TINY_CHECKPOINT = Path(__file__).parents[1] / "assets" / "shapes-internvl"
TINY = {"lr": 5e-4, "tokens_per_batch": 6_144, "tokens_per_micro_batch": 6_144}
DEFAULTS = {"lr": 1e-5, "tokens_per_batch": 131_072}


def with_defaults(config: TrainConfig) -> tuple[TrainConfig, list[EvalSet]]:
    """The config with every default filled in, and the test sets."""
    if not config.records.data and config.weights.model is not None:
        raise ValueError("--model without --data: give the JSONL to train on")
    eval_sets = [*named_sets(config.records.eval, "iid"), *named_sets(config.records.eval_ood, "ood")]
    if not config.records.data:
        folders = sharding.on_first_rank(cached_environments)
        config = with_options(config, data=(str(folders[config.records.environment] / "train.jsonl"),))
        eval_sets = eval_sets or shapes_sets(folders, config.records.environment)
    check_sets(config, [eval_set.name for eval_set in eval_sets])
    model = config.weights.model or TINY_CHECKPOINT
    filled = TINY if model == TINY_CHECKPOINT else DEFAULTS
    given = options(config)
    filled = {name: value for name, value in filled.items() if given[name] is None}
    if model == TINY_CHECKPOINT:
        filled["tokens_per_micro_batch"] = min(config.batch.tokens_per_micro_batch, TINY["tokens_per_micro_batch"])
    output_dir = config.run.output_dir or Path("runs") / ("robust" if config.proxy.robust else "standard")
    if config.run.resume not in (None, "auto") and not config.run.output_dir:
        output_dir = Path(config.run.resume).resolve().parent.parent
    return with_options(config, model=model, output_dir=output_dir, **filled), eval_sets


def check_sets(config: TrainConfig, names: list[str]) -> None:
    """Raise `ValueError` for test sets of one name, and for a `--best` that no evaluation can give."""
    names = [*names, *[HELD_OUT] * (config.records.eval_fraction is not None)]
    for name in names:
        if names.count(name) > 1 or "/" in name:
            raise ValueError(f"test set {name!r}: every set has a name of its own, without a slash")
    if config.run.best is None:
        return
    if not config.run.eval_every:
        raise ValueError(f"--best {config.run.best}: nothing is evaluated on the way, add --eval-every")
    test_set, _, figure = config.run.best.rpartition(".")
    if figure not in FIGURES or test_set not in names:
        sets, figures = " or ".join(names), ", ".join(FIGURES)
        raise ValueError(f"--best {config.run.best}: expected SET.FIGURE, of {sets}, and one of {figures}")


def shapes_sets(folders: dict[str, Path], trained: str) -> list[EvalSet]:
    """The trained environment's own test sets, and the i.i.d. tests of the others as o.o.d."""
    own = folders[trained]
    sets = [EvalSet("iid", "iid", own / "iid.jsonl")]
    sets += [EvalSet(name, "ood", folders[name] / "iid.jsonl") for name in folders if name != trained]
    return sets + [EvalSet(name, "probe", own / f"{name}.jsonl") for name in ("neutral", "reversed")]
