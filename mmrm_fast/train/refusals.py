"""What a training cannot do, seen from its options alone: told together, before anything is loaded or written."""

from collections.abc import Iterator

from accelerate.tracking import get_available_trackers

from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import options
from mmrm_fast.data.mixture import parse_mixture
from mmrm_fast.data.shapes import ENVIRONMENTS, TEST_SPLITS
from mmrm_fast.pairs import FIGURES, named_sets
from mmrm_fast.train.proxy import parse_proxy
from mmrm_fast.train.records import HELD_OUT

RANGES = {
    "[0, 0.5]": "label_smoothing",
    "(0, 1)": "eval_fraction",
    "[0, 1)": "warmup_ratio beta2 lora_dropout",
    "(0, inf)": "epochs lr max_grad_norm lora_alpha gpu_memory",
    "[0, inf)": "weight_decay center_rewards router_aux_loss save_minutes check_records num_workers seed",
    "[1, inf)": "max_steps max_bad_steps tokens_per_batch tokens_per_micro_batch pairs_per_step max_length min_tiles "
    "max_tiles max_pairs lora_r replicas num_gpus save_every keep eval_every",
}
NEEDS = {
    "robust": ("proxy_model", "proxy_image", "sfc_mode"),
    "dry_run": ("num_gpus", "gpu_memory"),
    "eval_every": ("best",),
}
PROXY_FIGURES = ("proxy_accuracy", "proxy_truth_accuracy", "sfd")
EITHER = (("overwrite", "resume"), ("tokens_per_batch", "pairs_per_step"))


def refuse(config: TrainConfig, *, num_ranks: int) -> None:
    """Raise `ValueError` naming every option that is out of range, does nothing or contradicts another."""
    problems = [*out_of_range(config), *idle(config), *contradictions(config, num_ranks), *wrong_sets(config)]
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} options cannot be:", *problems] if problems[1:] else problems))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def out_of_range(config: TrainConfig) -> Iterator[str]:
    """Numbers outside their interval; NaN is outside of all."""
    given = options(config)
    for interval, names in RANGES.items():
        low, high = map(float, interval[1:-1].split(","))
        ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")
        for name in names.split():
            value = given[name]
            if value is not None and not low < value < high and value not in ends:
                yield f"{flag(name)} {value}: expected a number in {interval}"


def idle(config: TrainConfig) -> Iterator[str]:
    """Options that do nothing, for want of another or because of it."""
    given, defaults = options(config), options(TrainConfig())
    chosen = {name for name in given if given[name] != defaults[name]}
    for needed, names in NEEDS.items():
        if not given[needed]:
            yield from (f"{flag(name)} does nothing without {flag(needed)}" for name in names if name in chosen)
    yield from (f"{flag(one)} and {flag(other)}: give one of them" for one, other in EITHER if {one, other} <= chosen)


def contradictions(config: TrainConfig, num_ranks: int) -> Iterator[str]:
    """What no training can be."""
    records, batch, replicas = config.records, config.batch, config.memory.replicas or 1
    wrong = {
        "--model without --data: give the JSONL to train on": (
            config.weights.model and not records.data and not config.memory.dry_run
        ),
        f"--pairs {records.pairs}: expected all, expand or a number of at least 1": (
            records.pairs not in ("all", "expand") and not (records.pairs.isdecimal() and int(records.pairs))
        ),
        f"--min-tiles {batch.min_tiles} is over --max-tiles {batch.max_tiles}": (
            batch.min_tiles and batch.max_tiles and batch.min_tiles > batch.max_tiles
        ),
        "--center-rewards with --sfc-mode balanced, whose mean weight would rescale it": (
            config.loss.sfc_mode == "balanced" and config.loss.center_rewards
        ),
        "--router-aux-loss with --compile, which does not let what routers decide be heard": (
            config.loss.router_aux_loss and config.memory.compile
        ),
        f"--replicas {replicas} does not divide {num_ranks} ranks": num_ranks % replicas,
    }
    yield from (message for message, is_so in wrong.items() if is_so)
    trackers = set(map(str, get_available_trackers()))
    missing = [name for name in config.run.report_to if name not in trackers]
    yield from (f"--report-to {name}: pip install {name}, or --report-to without it" for name in missing)
    try:
        proxy = parse_proxy(config)
    except ValueError as error:
        yield str(error)
        return
    if (config.run.best or "").rpartition(".")[2] in PROXY_FIGURES and not proxy.scores_tests:
        yield f"--best {config.run.best}: no proxy scores the test sets"


def wrong_sets(config: TrainConfig) -> Iterator[str]:
    """Files and test sets that are not written as they should be, and a `--best` that no evaluation can give."""
    records, best = config.records, config.run.best
    try:
        parse_mixture(records.data)
        names = [own.name for own in named_sets((*records.eval, *records.eval_ood), "iid")]
    except ValueError as error:
        yield str(error)
        return
    if not records.data and not names:
        names = [*TEST_SPLITS, *(name for name in ENVIRONMENTS if name != records.environment)]
    names += [HELD_OUT] * (records.eval_fraction is not None)
    for name in sorted({name for name in names if names.count(name) > 1 or "/" in name}):
        yield f"test set {name!r}: every set has a name of its own, without a slash"
    test_set, _, figure = (best or "").rpartition(".")
    if best and (figure not in FIGURES or test_set not in names):
        yield f"--best {best}: expected SET.FIGURE, of {' or '.join(names)}, and one of {', '.join(FIGURES)}"
