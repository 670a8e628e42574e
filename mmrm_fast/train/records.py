"""The records of a run, the same on every rank: opened, surveyed in one pass, held out from each other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmrm_fast.checkpoint.folder import Checkpoint
from mmrm_fast.config import RecordsConfig, TrainConfig
from mmrm_fast.data import mixture
from mmrm_fast.data.census import Census, counted, told
from mmrm_fast.data.mixture import Look, PreferenceDataset, parse_mixture, record_order
from mmrm_fast.data.pictures import ImageRoots
from mmrm_fast.data.records import RecordError, Records
from mmrm_fast.data.samples import Preparer
from mmrm_fast.data.splits import Split
from mmrm_fast.data.workers import idle_workers, in_order
from mmrm_fast.pairs import EvalSet
from mmrm_fast.tables import print_lines
from mmrm_fast.train import sharding

MAX_DECODED = 10_000  # images are opened when checking sets of fewer records
MAX_LISTED = 50
WORTH_WORKERS = 2_000  # records; fewer are done before worker processes have started
HELD_OUT = "held-out"


class InputErrors(ValueError):
    """Records that cannot be used, listed with file, line, field and reason."""

    def __init__(self, errors: list[RecordError]):
        listed = [*map(str, errors[:MAX_LISTED])]
        listed += [f"... and {len(errors) - MAX_LISTED} more"] * (len(errors) > MAX_LISTED)
        remedy = "mend them, or pass --skip-bad to leave them out"
        super().__init__("\n".join([f"{len(errors)} records cannot be used:", *listed, remedy]))


@dataclass(frozen=True)
class Inputs:
    """What a run trains on and what it is tested on."""

    dataset: PreferenceDataset
    weights: tuple[float, ...] | None  # share of each file, in a mixture
    eval_sets: list[EvalSet]
    eval_datasets: list[PreferenceDataset]  # one each
    copies: list[list[int]]  # records left out, each with the one that it is a copy of

    def order(self, total: int, seed: int) -> np.ndarray:
        """The order of the training samples over all epochs, uint32 [total]."""
        return record_order(self.dataset.samples_per_file(), total, seed=seed, weights=self.weights)


def training_preparer(config: TrainConfig, checkpoint: Checkpoint, *, with_text: bool) -> Preparer:
    """How the training records become samples."""
    pairs = config.records.pairs
    pairs = pairs if pairs in ("all", "expand") else int(pairs)
    return Preparer(
        checkpoint.prompt_encoder(), checkpoint.tiling, overlong=config.records.overlong, with_text=with_text,
        proxy_image=config.proxy.proxy_image, inputs=config.batch.inputs, pairs=pairs, seed=config.run.seed,
    )  # fmt: skip


def open_inputs(
    config: RecordsConfig,
    eval_sets: list[EvalSet],
    preparer: Preparer,
    progress: Callable,
    copies: list[list[int]] | None = None,
) -> Inputs:
    """Open every file, survey the records, leave out copies, hold out `config.eval_fraction` of the training set.

    Args:
        preparer: of the training samples; the test sets have all pairs, and what is too long is cut.
        progress: (description) to a wrapper of an iteration, such as a progress bar.
        copies: those that were found when the run began; None at its beginning.

    Raises:
        InputErrors: every checked record that cannot be used, unless `config.skip_bad`.
        ValueError: a file without records, or a wrong option.
    """
    fraction = config.eval_fraction or 0.0
    mixed, testing = parse_mixture(config.data), replace(preparer, pairs="all", overlong="truncate")
    roots = ImageRoots.parse(config.image_root)
    train = open_records(config, "train", roots, *mixed.paths)
    tests = [open_records(config, "test", roots, own.path, name=own.name) for own in eval_sets]
    roots.refuse_unused(names for records in (train, *tests) for names in records.names)
    first = config.check_records
    sought = copies is None and config.duplicates == "drop"
    all_or_first = len(train) if fraction or config.pairs == "expand" or sought else first  # samples depend on all
    table = survey(Look(train, preparer, testing, fraction, is_decoded(train, config)), all_or_first, progress)
    tested = [survey(Look(own, testing, decode=is_decoded(own, config)), first, progress) for own in tests]
    errors = [error for own in (table, *tested) for notes in own["notes"] if notes for error in notes.errors]
    if first and errors and not config.skip_bad:
        raise InputErrors(errors)
    if copies is None:
        copies = find_copies(train, table, config.duplicates, by_file=mixed.weights is not None)
    table = table[~np.isin(table["record"], [copy for copy, _ in copies])]
    held_out = mixture.is_held_out(table["key"], fraction)
    dataset = PreferenceDataset(train, preparer, table[~held_out])
    datasets = [PreferenceDataset(own, testing, rows) for own, rows in zip(tests, tested, strict=True)]
    report_tested(dataset, eval_sets, datasets)
    if fraction:
        if held_out.all() or not held_out.any():
            side = "train" if held_out.all() else "evaluate"
            raise ValueError(f"--eval-fraction {fraction} of {len(train)} records leaves none to {side} on")
        eval_sets = [EvalSet(HELD_OUT, "iid", Path(mixed.paths[0])), *eval_sets]
        datasets = [PreferenceDataset(train, testing, table[held_out]), *datasets]
    return Inputs(dataset, mixed.weights, eval_sets, datasets, copies)


def open_records(
    config: RecordsConfig, split: Split, roots: ImageRoots, *paths: str | Path, name: str | None = None
) -> Records:
    """The preferences of some files, of folders those of a split, of which there must be some.

    Args:
        roots, name: of their pictures, and the test set that they are.
    """
    options = {"image_root": roots, "name": name, "ignored": config.ignore_fields, "max_pairs": config.max_pairs}
    records = Records(*paths, split=split, need_pairs=True, **options)
    if not len(records):
        raise ValueError(f"{', '.join(map(str, paths))}: no records")
    return records


def is_decoded(records: Records, config: RecordsConfig) -> bool:
    """Whether looking at records decodes their pictures."""
    return bool(config.check_records) and len(records) < MAX_DECODED


def survey(look: Look, count: int, progress: Callable) -> np.ndarray:
    """The table of a data set, known of its first `count` records: each rank looks at a share, in worker processes."""
    count, rank, num_ranks = min(count, len(look.records)), sharding.rank(), sharding.num_ranks()
    mine = range(rank, count, num_ranks)
    looks = in_order(look, [mine], num_workers=idle_workers() if len(mine) > WORTH_WORKERS else 0)
    census = Census()

    def rows() -> Iterator[tuple]:
        for looked in progress("surveying records")(looks, total=len(mine)):
            counted([looked.kind], census)
            yield from looked.rows

    tables, censuses = zip(*sharding.gather_lists([(np.fromiter(rows(), mixture.SAMPLE), census)]), strict=True)
    if sharding.rank() == 0:
        print_lines(told(look.records, sum(censuses, Census())))
    found = np.concatenate(tables)
    found = found[np.argsort(found["record"], kind="stable")]
    return np.concatenate([found, mixture.unknown_samples(range(count, len(look.records)))])


def find_copies(records: Records, table: np.ndarray, duplicates: str, *, by_file: bool) -> list[list[int]]:
    """The records to leave out, each with the one that it is a copy of; copies and contradictions are told.

    Args:
        by_file: copies in two files of a mixture are meant, its weights say how often they come.
    """
    found = mixture.copies(table, records.spec_edges if by_file else (0, len(records)))
    opposed = mixture.contradictions(table[~np.isin(table["record"], found[:, 0])])
    fate = "left out, --duplicates keep trains on them" if duplicates == "drop" else "kept"
    findings = {f"the same prompt, images and pairs as others ({fate})": found}
    findings["the pairs of others the other way round (kept)"] = opposed
    if sharding.rank() == 0:
        for what, both in ((what, both) for what, both in findings.items() if len(both)):
            print_lines([f"{len(both)} records have {what}, such as {' and '.join(map(records.source, both[0]))}"])
    return found.tolist() if duplicates == "drop" else []


def report_tested(dataset: PreferenceDataset, eval_sets: list[EvalSet], tests: list[PreferenceDataset]) -> None:
    """Say which test sets have records of the training set in them, as far as both were surveyed."""
    keys = dataset.table["key"]
    for eval_set, tested in zip(eval_sets, tests, strict=True):
        found = np.flatnonzero(np.isin(tested.table["key"], keys[keys > 0]))
        if len(found) and sharding.rank() == 0:
            surveyed = (tested.table["cost"] != mixture.UNKNOWN).sum()
            print(
                f"{eval_set.name}: {len(found)} of {surveyed} test records are in the training data with the same "
                f"prompt and image, such as {tested.records.source(int(tested.table['record'][found[0]]))}"
            )
