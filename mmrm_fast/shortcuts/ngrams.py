"""Chunks of records with the features of `features`, read by worker processes where they are many."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mmrm_fast.data.images import opened
from mmrm_fast.data.mixture import record_key
from mmrm_fast.data.records import Records
from mmrm_fast.data.samples import only_paired
from mmrm_fast.data.types import Group, RecordError
from mmrm_fast.data.workers import idle_workers, in_order
from mmrm_fast.shortcuts.crossfit import CHUNK, Chunk
from mmrm_fast.shortcuts.features import response_features

WORTH_WORKERS = 2_000 // CHUNK  # chunks; fewer are done before worker processes have started


@dataclass(frozen=True)
class NgramFeatures:
    """Words, two words in a row, lengths, form, and how they go with the prompt."""

    records: Records
    limit: int = 200_000_000

    def read(self, chunks: Sequence[np.ndarray]) -> Iterator[Chunk]:
        """A chunk for each lot of record numbers, in order."""
        num_workers = idle_workers() if len(chunks) > WORTH_WORKERS else 0
        return in_order(lambda place: self.chunk(chunks[place]), [range(len(chunks))], num_workers=num_workers, ahead=0)

    def chunk(self, numbers: np.ndarray) -> Chunk:
        """One lot of records."""
        found = usable(self.records, numbers)
        return Chunk(found.groups, found.key_N, found.image_N, response_features(found.groups), found.errors)


class Usable(NamedTuple):
    """Groups with what their pairs name, without pictures, and the errors of what cannot be read."""

    groups: tuple[Group, ...]
    num_images: tuple[int, ...]
    key_N: np.ndarray  # uint64, as `Chunk` has them
    image_N: np.ndarray
    errors: tuple[RecordError, ...]


def usable(records: Records, numbers: np.ndarray) -> Usable:
    """What can be read of some records."""
    groups, counts, keys, pictured, errors = [], [], [], [], []
    for number in numbers:
        try:
            group = records.group(int(number))
        except RecordError as error:
            errors.append(error)
            continue
        with opened(group.images) as images:
            seen = replace(group, images=images)
            keys.append(record_key(seen))
            pictured.append(record_key(replace(seen, prompt="")) if images else 0)
            counts.append(len(images))
        groups.append(replace(only_paired(group), images=()))
    hashes = (np.array(own, np.uint64) for own in (keys, pictured))
    return Usable(tuple(groups), tuple(counts), *hashes, tuple(errors))
