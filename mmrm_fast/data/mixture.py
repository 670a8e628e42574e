"""Files of records as one data set to train on: mixture, order, what is held out, what is in two places."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmrm_fast.data.records import Group, RecordError
from mmrm_fast.data.samples import GroupDataset

HEAD_BYTES = 4096  # of an image file that, with its size, tell it from others


@dataclass(frozen=True)
class Sources:
    """What `--data` names: files and, for a mixture, the share of the records that comes from each."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None  # sum 1


def parse_sources(specs: Sequence[str]) -> Sources:
    """Parse PATH or PATH:WEIGHT, all of one kind.

    Raises:
        ValueError: some with a weight and some without, or a weight that is not a positive number.
    """
    parsed = [split_weight(spec) for spec in specs]
    weights = [weight for _, weight in parsed if weight is not None]
    paths = tuple(path for path, _ in parsed)
    if not weights:
        return Sources(paths)
    if len(weights) < len(parsed):
        raise ValueError(f"--data {' '.join(specs)}: give every file a weight, or none")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"--data {' '.join(specs)}: weights are positive numbers")
    return Sources(paths, tuple(weight / sum(weights) for weight in weights))


def split_weight(spec: str) -> tuple[str, float | None]:
    """(path, weight) of PATH:WEIGHT; a colon that no number follows belongs to the path."""
    path, _, number = spec.rpartition(":")
    if not path or Path(spec).exists():
        return spec, None
    try:
        return path, float(number)
    except ValueError:
        return spec, None


def record_order(sizes: Sequence[int], total: int, *, seed: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """The order of `total` records out of files of `sizes` records, uint32 [total].

    Without weights every epoch is a permutation of all records. With them the share of each file is exact (to one
    record) and its records come in permutations of its own, so that none comes twice before all came once.
    """
    if weights is None:
        return permutations(sum(sizes), total, (seed,))
    edges = np.cumsum([0, *sizes])
    counts = np.diff(np.rint(np.cumsum([0, *weights]) * total).astype(np.int64))
    order = np.concatenate(
        [
            permutations(size, count, (seed, number)) + np.uint32(first)
            for number, (size, count, first) in enumerate(zip(sizes, counts, edges, strict=False))
        ]
    )
    np.random.default_rng((seed, len(sizes))).shuffle(order)
    return order


def permutations(count: int, total: int, seed: tuple[int, ...]) -> np.ndarray:
    """`total` numbers below `count` as one seeded permutation after another, uint32 (half the memory of int64)."""
    if total and not count:
        raise ValueError("a file of the mixture has no records")
    order = np.empty(total, np.uint32)
    for epoch, start in enumerate(range(0, total, count)):
        permutation = np.arange(count, dtype=np.uint32)
        np.random.default_rng((*seed, epoch)).shuffle(permutation)
        order[start : start + count] = permutation[: total - start]
    return order


def record_key(dataset: GroupDataset, index: int) -> int:
    """A 64-bit hash of a record's prompt and images, 0 for a record that cannot be parsed.

    An image counts by its size in bytes and its first `HEAD_BYTES`, so that copies of it in two folders are one.
    """
    try:
        group = dataset.group(index)
    except RecordError:
        return 0
    digest = hashlib.blake2b(repr(group.prompt).encode("utf-8", "surrogatepass"), digest_size=8)
    for image in group.images:
        digest.update(image_head(image))
    return int.from_bytes(digest.digest(), "little")


def image_head(image: str | bytes) -> bytes:
    """What tells an image file from others; its path where it cannot be read."""
    if isinstance(image, bytes):
        return len(image).to_bytes(8, "little") + image[:HEAD_BYTES]
    try:
        with open(image, "rb") as file:
            head = file.read(HEAD_BYTES)
            return file.seek(0, 2).to_bytes(8, "little") + head
    except OSError:
        return image.encode("utf-8", "surrogateescape")


def is_held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which records of these keys (uint64) are held out, bool: all with one prompt and image, or none of them.

    Raises:
        ValueError: the fraction does not lie between 0 and 1, or leaves one side empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--eval-fraction must lie between 0 and 1, got {fraction}")
    held_out = keys < np.uint64(fraction * 2**64)
    if not held_out.any() or held_out.all():
        side = "evaluate" if not held_out.any() else "train"
        raise ValueError(f"--eval-fraction {fraction} of {len(keys)} records leaves none to {side} on")
    return held_out


def duplicates(dataset: GroupDataset, keys: np.ndarray, train_keys: np.ndarray) -> tuple[int, Group | None]:
    """How many records of a test set have the prompt and images of a training record, and the first such."""
    found = np.flatnonzero(np.isin(keys, train_keys[train_keys != 0]))
    return len(found), dataset.group(int(found[0])) if len(found) else None
