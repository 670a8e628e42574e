"""The data sets of a run, the same on every rank: opened, held out from each other and checked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mmrm_fast.config import RecordsConfig
from mmrm_fast.data.mixture import duplicates, is_held_out, parse_sources, record_key, record_order
from mmrm_fast.data.records import RecordError
from mmrm_fast.data.samples import PreferenceDataset, fault
from mmrm_fast.data.workers import idle_workers, in_order
from mmrm_fast.pairs import EvalSet
from mmrm_fast.train import sharding

MAX_DECODED = 10_000  # images are opened when checking sets of fewer records
MAX_LISTED = 50
WORTH_WORKERS = 2_000  # records; fewer are done before worker processes have started
HELD_OUT = "held-out"


class InputErrors(ValueError):
    """Records that cannot be used, listed with file, line, field and reason."""

    def __init__(self, errors: list[RecordError], remedy: str):
        listed = [str(error) for error in errors[:MAX_LISTED]]
        if len(errors) > MAX_LISTED:
            listed.append(f"... and {len(errors) - MAX_LISTED} more")
        super().__init__("\n".join([f"{len(errors)} records cannot be used:", *listed, remedy]))


@dataclass(frozen=True)
class Inputs:
    """What a run trains on and what it is tested on."""

    dataset: PreferenceDataset
    weights: tuple[float, ...] | None  # share of each file, in a mixture
    eval_sets: list[EvalSet]
    eval_datasets: list[PreferenceDataset]  # one each

    def order(self, total: int, seed: int) -> np.ndarray:
        """The order of the training records over all epochs, uint32 [total]."""
        return record_order(self.dataset.records_per_file(), total, seed=seed, weights=self.weights)


def open_inputs(
    config: RecordsConfig,
    eval_sets: list[EvalSet],
    open_files: Callable[..., PreferenceDataset],
    progress: Callable,
    *,
    seed: int,
) -> Inputs:
    """Open every file, hold out `config.eval_fraction` of the training records, check what is to be checked.

    Args:
        open_files: the data set of some paths and an `overlong` policy.
        progress: (description, total) to a wrapper of an iteration, such as a progress bar.
        seed: of the pairs that are taken at random.

    Raises:
        InputErrors: every checked record that cannot be used, unless `config.skip_bad`.
        ValueError: a file without records, or a wrong option.
    """
    sources = parse_sources(config.data)
    dataset = open_files(sources.paths, config.overlong)
    eval_datasets = [open_files((eval_set.path,), "truncate") for eval_set in eval_sets]
    for opened in [dataset, *eval_datasets]:
        if not len(opened):
            raise ValueError(f"{opened.files[0].path}: no records")
    if config.eval_fraction is not None:
        dataset, held_out = hold_out(dataset, config.eval_fraction, progress)
        eval_sets = [EvalSet(HELD_OUT, "iid", Path(sources.paths[0])), *eval_sets]
        eval_datasets = [held_out, *eval_datasets]
    count = partial(on_all_ranks, dtype=np.int64, progress=progress("counting pairs"))
    inputs = Inputs(with_pairs(dataset, config.pairs, count, seed), sources.weights, eval_sets, eval_datasets)
    check(inputs, config, progress)
    report_duplicates(inputs, config.check_records, progress)
    return inputs


def hold_out(
    dataset: PreferenceDataset, fraction: float, progress: Callable
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Divide a data set by the hash of prompt and images: (what is left to train on, what is held out)."""
    keys = on_all_ranks(partial(record_key, dataset), len(dataset), np.uint64, progress("hashing records"))
    chosen = is_held_out(keys, fraction)
    held_out = dataset.select(np.flatnonzero(chosen))
    held_out.overlong = "truncate"
    return dataset.select(np.flatnonzero(~chosen)), held_out


def with_pairs(dataset: PreferenceDataset, pairs: str, count: Callable, seed: int) -> PreferenceDataset:
    """The training set with the pairs that `--pairs` asks for; `count(function, n)` is its values for 0 to n-1."""
    if pairs == "all":
        return dataset
    if pairs == "expand":
        return dataset.expanded(count(dataset.num_pairs, len(dataset)))
    if not pairs.isdecimal() or not int(pairs):
        raise ValueError(f"--pairs must be all, expand or a number of at least 1, got {pairs!r}")
    return dataset.sampled(int(pairs), seed)


def on_all_ranks(function: Callable[[int], int], count: int, dtype: type, progress: Callable) -> np.ndarray:
    """[function(index) for index in range(count)], each rank computing its share in worker processes."""
    rank, num_ranks = sharding.rank(), sharding.num_ranks()
    mine = range(rank, count, num_ranks)
    results = in_order(function, [mine], num_workers=helpers(len(mine)))
    share = np.fromiter(progress(results, total=len(mine)), dtype, len(mine))
    values = np.empty(count, dtype)
    for other, part in enumerate(sharding.gather_lists([share])):
        values[other::num_ranks] = part
    return values


def helpers(count: int) -> int:
    """Worker processes for `count` records before the training."""
    return idle_workers() if count > WORTH_WORKERS else 0


def check(inputs: Inputs, config: RecordsConfig, progress: Callable) -> None:
    """Check the first records of every data set, divided over the ranks; raise all errors at once."""
    errors = []
    for dataset in [inputs.dataset, *inputs.eval_datasets]:
        count = min(len(dataset), config.check_records)
        decode = len(dataset) < MAX_DECODED
        mine = range(sharding.rank(), count, sharding.num_ranks())
        faults = in_order(partial(fault, dataset, decode=decode), [mine], num_workers=helpers(len(mine)))
        errors += filter(None, progress("checking records")(faults, total=len(mine)))
    errors = sharding.gather_lists(errors)
    if errors and not config.skip_bad:
        raise InputErrors(errors, "mend them, or pass --skip-bad to leave them out")


def report_duplicates(inputs: Inputs, count: int, progress: Callable) -> None:
    """Say which test sets have records of the training set in them, as far as both are checked."""
    if not count or not inputs.eval_datasets:
        return
    hashing = progress("looking for test records in the training data")
    train_keys, *keys = [
        on_all_ranks(partial(record_key, dataset), min(len(dataset), count), np.uint64, hashing)
        for dataset in [inputs.dataset, *inputs.eval_datasets]
    ]
    for eval_set, dataset, own in zip(inputs.eval_sets, inputs.eval_datasets, keys, strict=True):
        number, first = duplicates(dataset, own, train_keys)
        if number and sharding.rank() == 0:
            print(
                f"{eval_set.name}: {number} of {len(own)} test records are in the training data with the same prompt "
                f"and image, such as {first.source}"
            )
