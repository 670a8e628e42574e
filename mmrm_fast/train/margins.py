"""Margins of a text-only proxy as a file, a row a pair, and the ones that a run computes before its first step."""

import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from operator import index
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmrm_fast.data.mixture import PreferenceDataset
from mmrm_fast.data.samples import Sample
from mmrm_fast.files import json_lines, whole_folder, write_json, write_json_lines
from mmrm_fast.shortcuts import crossfit
from mmrm_fast.shortcuts.crossfit import Features, Ranks
from mmrm_fast.train import sharding

SHORTCUT, TRAIN, FITTED = "shortcut", "train", "fitted.json"  # a folder of a run and what is in it
DISTANCE = 0.02  # nats of log-loss a pair for which a cheaper proxy is taken


class ProxyMargins:
    """Text-only margins r(chosen) - r(rejected) from a JSONL file, one row a pair: what a proxy would compute.

    Rows hold `record` (position in the training file, or files in the order of `--data`), `chosen` and `rejected`
    (positions in the record) and `proxy_margin`, as `eval-NAME.jsonl` of a robust run that had the training file as a
    test set.
    """

    def __init__(self, path: Path):
        self.path = path
        keys, margins = array("Q"), array("f")
        for source, row in json_lines(path):
            try:
                keys.append(pair_key(*(index(row[name]) for name in ("record", "chosen", "rejected"))))
                margins.append(row["proxy_margin"])
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise ValueError(f"{source}: not a row of record, chosen, rejected, proxy_margin: {error}") from None
            if not math.isfinite(margins[-1]):
                raise ValueError(f"{source}: proxy_margin {row['proxy_margin']}: expected a finite number")
        order = np.argsort(np.array(keys, np.uint64), kind="stable")
        self.keys, self.margins = np.array(keys, np.uint64)[order], np.array(margins, np.float32)[order]

    def of(self, samples: Iterable[Sample]) -> Tensor:
        """The margins [P] of a batch's pairs, float32."""
        pairs = [pair for sample in samples for pair in pairs_of(sample)]
        wanted = np.array([pair_key(*pair) for pair in pairs], np.uint64)
        places = np.searchsorted(self.keys, wanted)
        for pair, place, key in zip(pairs, places, wanted, strict=True):
            if place == len(self.keys) or self.keys[place] != key:
                raise ValueError(f"{self.path}: no margin for record {pair[0]}, responses {pair[1:]}")
        return torch.from_numpy(self.margins[places])


def pair_key(record: int, chosen: int, rejected: int) -> int:
    if not (0 <= record < 2**32 and 0 <= chosen < 2**16 and 0 <= rejected < 2**16):
        raise ValueError(f"record {record}, responses {chosen} and {rejected}: under 2^32 and 2^16")
    return record << 32 | chosen << 16 | rejected


def pairs_of(sample: Sample) -> Iterator[tuple[int, int, int]]:
    """(record, chosen, rejected) of a sample's pairs, by the responses' places in the record."""
    places = sample.group.places
    for pair in sample.group.pairs:
        yield sample.group.record, places[pair.chosen], places[pair.rejected]


def write_margins(
    folder: Path, candidates: Mapping[str, Callable[[PreferenceDataset], Features]], train: PreferenceDataset,
    tests: Mapping[str, PreferenceDataset], *, seed: int, progress: Callable,
) -> None:  # fmt: skip
    """Fit proxies on the features of the training set, take one, and write its margins, a file a set.

    Those of the training set are cross-fitted, those of the tests by all of it. Of several candidates, the cheapest
    first, the first is taken whose log-loss is within `DISTANCE` of the last one's. Called on every rank, each of which
    reads a share; the folder appears complete or not at all.
    """
    ranks = Ranks(sharding.rank(), sharding.num_ranks(), sharding.gather_lists, sharding.on_first_rank)
    started, records, fits = time.perf_counter(), np.unique(train.table["record"]), {}
    for name, features in candidates.items():
        bar = progress(f"fitting {name}")
        fits[name] = crossfit.fit(features(train), records, seed=seed, ranks=ranks, progress=bar)
    losses = {name: own.fitted.log_loss for name, own in fits.items()}
    *_, last = losses.values()
    taken = next(name for name, loss in losses.items() if not loss > last + DISTANCE)
    with whole_folder(folder, replace=True) if ranks.rank == 0 else nullcontext() as aside:
        for name, dataset in {TRAIN: train, **{file_of(name): own for name, own in tests.items()}}.items():
            parts = [known] if name == TRAIN and (known := fits[taken].margins) else crossfit.margins(
                candidates[taken](dataset), fits[taken].fitted, np.unique(dataset.table["record"]),
                seed=seed if name == TRAIN else None, ranks=ranks, progress=progress(f"margins of {name}"),
            )  # fmt: skip
            rows = margin_rows(parts)
            write_json_lines(aside / f"{name}.jsonl", rows) if aside else all(map(bool, rows))
            if name == TRAIN:  # what follows is evaluation
                seconds = time.perf_counter() - started
        if aside:
            write_json(aside / FITTED, {"log_loss": losses, "taken": taken, "seconds": seconds})
    sharding.on_first_rank(lambda: None)  # the folder is there


def file_of(test_set: str) -> str:
    """The file, without its ending, of a test set's margins."""
    return f"eval-{test_set}"


def margin_rows(parts: Iterable[crossfit.Margins]) -> Iterator[dict]:
    for part in parts:
        for (record, chosen, rejected), margin in zip(*(column.tolist() for column in part), strict=True):
            yield {"record": record, "chosen": chosen, "rejected": rejected, "proxy_margin": margin}
