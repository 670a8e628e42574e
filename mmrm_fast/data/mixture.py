"""Files of preferences as one data set: its samples and what is known of them, a mixture's order, what is held out."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmrm_fast.data.census import Kind
from mmrm_fast.data.images import Source, opened
from mmrm_fast.data.records import Group, RecordError, Records
from mmrm_fast.data.samples import Preparer, Sample, Size
from mmrm_fast.data.types import hash64

HEAD_BYTES = 4096  # of an image file that, with its size, tell it from others
UNKNOWN = -1  # cost of a sample that nobody looked at
SAMPLE = np.dtype([
    ("record", np.uint32),
    ("part", np.uint32),  # which of its record's samples it is
    ("key", np.uint64),  # see `record_key`; 0 where the record cannot be parsed
    ("answers", np.uint64),  # see `answers_key`; 0 where it has no pairs
    ("cost", np.int32), ("pairs", np.int32), ("notes", object),  # its `Size`
])  # fmt: skip


def unknown_samples(records: range) -> np.ndarray:
    """A row a record, each of them one sample of which nothing is known."""
    table = np.zeros(len(records), SAMPLE)
    table["record"], table["cost"], table["notes"] = records, UNKNOWN, None
    return table


@dataclass(frozen=True)
class PreferenceDataset:
    """The preferences of records as samples, by index, and what is known of their sizes."""

    records: Records
    preparer: Preparer
    table: np.ndarray  # `SAMPLE` [N], records in order

    def __len__(self) -> int:
        return len(self.table)

    def group(self, index: int) -> Group:
        """Parse the record of a sample, with the pairs that are used in it. Raises `RecordError`."""
        row = self.table[index]
        return self.preparer.part(self.records.group(int(row["record"])), int(row["part"]))

    def prepared(self, index: int) -> tuple[Sample, list[np.ndarray]]:
        """A sample and its pictures' tiles. Raises `RecordError`."""
        return self.preparer.whole(self.group(index))

    def look(self, index: int) -> tuple:
        """The row of a sample that nobody looked at, the only one of its record."""
        (row,) = Look(self.records, self.preparer)(int(self.table[index]["record"])).rows
        return row

    def left_out(self) -> dict[str, int]:
        """How many pairs of the samples looked at are not used, by why; only what there is."""
        notes = [own for own in self.table["notes"] if own]
        counts = {name: sum(getattr(own, name) for own in notes) for name in ("identical", "undrawn")}
        return {f"{name}_pairs": count for name, count in counts.items() if count}

    def size(self, index: int) -> Size:
        """The size of a sample that was looked at."""
        return Size(*self.table[index].item()[-3:])

    def samples_per_file(self) -> list[int]:
        """How many of the samples come from each of the records' specs, which follow each other."""
        return np.diff(np.searchsorted(self.table["record"], self.records.spec_edges)).tolist()


@dataclass(frozen=True)
class Look:
    """One look at a record gives its rows of the table: it is parsed once, and each of its pictures is opened once."""

    records: Records
    preparer: Preparer
    testing: Preparer | None = None  # of what is held out
    eval_fraction: float = 0.0  # that is
    decode: bool = False  # the pictures too

    def __call__(self, record: int) -> "Looked":
        try:
            group = self.records.group(record, compare=True)
        except RecordError as error:
            return Looked(Kind.of(error), [(record, 0, 0, 0, *Size.of_error(error))])
        with opened(group.images) as images:
            seen = replace(group, images=images)
            key = record_key(seen)
            answers = answers_key(seen, key)
            chosen = self.testing if is_held_out(np.uint64(key), self.eval_fraction) else self.preparer
            sizes = chosen.sizes(seen, decode=self.decode)
        return Looked(Kind.of(group), [(record, part, key, answers, *size) for part, size in enumerate(sizes)])


class Looked(NamedTuple):
    """What a record is, and its rows of the table."""

    kind: Kind
    rows: list[tuple]


@dataclass(frozen=True)
class Mixture:
    """What `--data` names: files and, for a mixture, the share of the samples that comes from each."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None  # sum 1


def parse_mixture(specs: Sequence[str]) -> Mixture:
    """Parse PATH or PATH:WEIGHT, all of one kind.

    Raises:
        ValueError: some with a weight and some without, or a weight that is not a positive number.
    """
    paths, weights = zip(*map(split_weight, specs), strict=True) if specs else ((), ())
    if set(weights) <= {None}:
        return Mixture(paths)
    if None in weights:
        raise ValueError(f"--data {' '.join(specs)}: give every file a weight, or none")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"--data {' '.join(specs)}: weights are positive numbers")
    return Mixture(paths, tuple(weight / sum(weights) for weight in weights))


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
    own = enumerate(zip(sizes, counts, edges, strict=False))
    parts = [permutations(size, count, (seed, file)) + np.uint32(first) for file, (size, count, first) in own]
    order = np.concatenate(parts)
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


def record_key(group: Group) -> int:
    """A 64-bit hash of a record's prompt and images.

    An image counts by its size in bytes and its first `HEAD_BYTES`, so that copies of it in two folders are one.
    """
    extras = [message.extra for message in group.prompt if message.extra] if isinstance(group.prompt, tuple) else []
    said = repr(group.prompt) + "".join([*extras, *group.tools])
    return hash64(said.encode("utf-8", "surrogatepass"), *map(image_head, group.images))


def image_head(image: Source) -> bytes:
    """What tells an open image file from others; its path where it could not be opened."""
    if isinstance(image, str):
        return image.encode("utf-8", "surrogateescape")
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    num_bytes = file.seek(0, 2)
    file.seek(0)
    return num_bytes.to_bytes(8, "little") + file.read(HEAD_BYTES)


def answers_key(group: Group, key: int) -> int:
    """A 64-bit hash of a record's pairs, whatever their order and margins, with the key of their prompt and images.

    Of the same pairs the other way round it differs in the last bit alone. 0 where there are none.
    """
    if not len(group.pairs):
        return 0
    seen = [group.seen and group.seen[place] for place in group.places]
    sides = ((reply.content, reply.extra, images) for reply, images in zip(group.replies, seen, strict=True))
    hashes = [blake2b(repr(side).encode(), digest_size=8).digest() for side in sides]
    ends = [(hashes[chosen], hashes[rejected]) for chosen, rejected in group.pairs.ends.tolist()]
    ways = (sorted(a + b for a, b in ends), sorted(b + a for a, b in ends))
    there, back = (hash64(*way, key=key.to_bytes(8, "little")) for way in ways)
    return min(there, back) & ~1 | (there < back)


def copies(table: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Records with the same pairs as one before them, and that one: int64 [C, 2], both between two of `edges`."""
    rows = paired_records(table)
    parts = [rows[(rows["record"] >= start) & (rows["record"] < stop)] for start, stop in pairwise(edges)]
    both = np.concatenate([np.stack([own["record"], with_answers(own, own["answers"])], axis=1) for own in parts])
    return both[both[:, 0] != both[:, 1]]


def contradictions(table: np.ndarray) -> np.ndarray:
    """Records whose pairs stand the other way round in another one, and that one: int64 [C, 2]."""
    rows = paired_records(table)
    others = with_answers(rows, rows["answers"] ^ np.uint64(1))
    return np.stack([rows["record"], others], axis=1)[others >= 0]


def paired_records(table: np.ndarray) -> np.ndarray:
    """A row of each record that has pairs."""
    rows = table[table["answers"] > 0]
    return rows[np.unique(rows["record"], return_index=True)[1]]


def with_answers(rows: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The first record with each of these pairs, -1 where there is none, int64."""
    if not len(rows):
        return np.full(len(answers), -1)
    known, first = np.unique(rows["answers"], return_index=True)
    place = np.minimum(np.searchsorted(known, answers), len(known) - 1)
    return np.where(known[place] == answers, rows["record"][first][place].astype(np.int64), -1)


def is_held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which records of these keys (uint64) are held out, bool: all with one prompt and image, or none of them."""
    return (keys > 0) & (keys < np.uint64(fraction * 2**64))
