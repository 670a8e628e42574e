"""Records to margins of text alone, over any number of ranks, in memory that does not grow with the records.

The records are read twice. First their features, of which a sample is kept that fits into `limit` bytes: the records
whose hashed key begins with enough zeros, so that the same ones are kept in whatever order they come and on whatever
rank; `fit.cross_fit` fits on it. Then every response's score, by the regression that did not see its fold. Folds and
sample go by the key of image and prompt: all records of one prompt and image are in one fold.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from scipy.sparse import issparse, vstack

from mmrm_fast.data.types import Group, RecordError
from mmrm_fast.shortcuts.features import mixed
from mmrm_fast.shortcuts.fit import FOLDS, Fitted, Matrix, cross_fit

CHUNK = 64  # records that are read at a time, and of a language model's forwards
WINDOW = 16  # chunks of a rank between two exchanges
LEVELS = 64


class Ranks(NamedTuple):
    """Who reads which records; alone by default."""

    rank: int = 0
    number: int = 1
    gather: Callable[[list], list] = list  # everyone's items on every rank
    first: Callable = lambda function: function()  # the first rank's result on every rank


@dataclass(frozen=True)
class Chunk:
    """Records that can be used, with the features of all their responses, and what is wrong with others."""

    groups: tuple[Group, ...]  # with the responses that pairs name, without pictures
    key_N: np.ndarray  # uint64, of image and prompt
    image_N: np.ndarray  # uint64, of the images alone, 0 without any
    features_RF: Matrix
    errors: tuple[RecordError, ...] = ()

    def only(self, kept_N: np.ndarray) -> "Chunk":
        """Some of the records."""
        kept_R = np.repeat(kept_N, [len(group.responses) for group in self.groups])
        groups = tuple(group for group, is_kept in zip(self.groups, kept_N, strict=True) if is_kept)
        return Chunk(groups, self.key_N[kept_N], self.image_N[kept_N], self.features_RF[kept_R])

    @cached_property
    def ends_P2(self) -> np.ndarray:
        """Chosen and rejected response of every pair, int64."""
        first_N = np.cumsum([0, *(len(group.responses) for group in self.groups)])
        ends = [group.pairs.ends + first for group, first in zip(self.groups, first_N, strict=False)]
        return np.concatenate([np.zeros((0, 2), np.int64), *ends])

    @cached_property
    def place_P(self) -> np.ndarray:
        """Every pair's record among the chunk's."""
        return np.repeat(np.arange(len(self.groups)), [len(group.pairs) for group in self.groups])

    @property
    def pairs_P3(self) -> np.ndarray:
        """Every pair as in its file: the record, chosen and rejected by their places in it, int64."""
        ends = [np.array(group.places, np.int64)[group.pairs.ends] for group in self.groups]
        record_N = np.array([group.record for group in self.groups], np.int64)
        return np.column_stack([record_N[self.place_P], np.concatenate([np.zeros((0, 2), np.int64), *ends])])

    @property
    def differences_PF(self) -> Matrix:
        """Features of chosen minus rejected."""
        return self.features_RF[self.ends_P2[:, 0]] - self.features_RF[self.ends_P2[:, 1]]


class Margins(NamedTuple):
    """Margins of pairs."""

    pairs_P3: np.ndarray  # see `Chunk`
    margin_P: np.ndarray


class Features(Protocol):
    """What makes chunks of records."""

    limit: int  # bytes of features that are fitted on

    def read(self, chunks: Sequence[np.ndarray]) -> Iterator[Chunk]:
        """A chunk for each lot of record numbers, in order; on every rank as many."""


class Part(NamedTuple):
    """Pairs that may be fitted on."""

    pairs_P3: np.ndarray  # see `Chunk`
    level_P: np.ndarray  # zeros that the hashed key begins with
    fold_P: np.ndarray
    differences_PF: Matrix

    @classmethod
    def of(cls, chunk: Chunk, seed: int) -> "Part":
        """All pairs of a chunk."""
        level_N, fold_N, place_P = level_of(chunk.key_N, seed), fold_of(chunk.key_N, seed), chunk.place_P
        return cls(chunk.pairs_P3, level_N[place_P], fold_N[place_P], chunk.differences_PF)

    @classmethod
    def joined(cls, parts: Sequence["Part"]) -> "Part":
        """All of them, in the order of the records."""
        columns = zip(*parts, strict=True)
        whole = cls(*(vstack(own, format="csr") if issparse(own[0]) else np.concatenate(own) for own in columns))
        order = np.argsort(whole.pairs_P3[:, 0], kind="stable")
        return whole if (np.diff(order) == 1).all() else whole.only(order)

    def only(self, pairs: np.ndarray) -> "Part":
        """Some of the pairs, by place or mask."""
        return Part(*(own[pairs] for own in self))

    def bytes_L(self) -> np.ndarray:
        """The bytes of each level's features."""
        rows = self.differences_PF
        row_bytes = 8 * np.diff(rows.indptr) if issparse(rows) else np.full(len(rows), 4 * rows.shape[1])
        return np.bincount(self.level_P, row_bytes, LEVELS)


def fold_of(keys: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each key."""
    return (mixed(keys, np.uint64(2 * seed)) % np.uint64(FOLDS)).astype(np.int64)


def level_of(keys: np.ndarray, seed: int) -> np.ndarray:
    """How many zeros each hashed key begins with, under `LEVELS`."""
    hashed = mixed(keys, np.uint64(2 * seed + 1)) >> np.uint64(1)  # so that a float64 holds its size
    return LEVELS - 1 - np.frexp(hashed.astype(float))[1].astype(np.int64)


def windows(features: Features, records: np.ndarray, ranks: Ranks, progress: Callable) -> Iterator[list[Chunk]]:
    """This rank's chunks of consecutive windows of the records; every rank has as many windows and chunks."""
    total = -(-len(records) // (CHUNK * ranks.number)) * ranks.number
    chunks = [records[at * CHUNK : (at + 1) * CHUNK] for at in range(total)][ranks.rank :: ranks.number]
    read = iter(progress(features.read(chunks), total=len(chunks)))
    while window := list(islice(read, WINDOW)):
        yield window


def sample(
    features: Features, records: np.ndarray, *, seed: int, ranks: Ranks, progress: Callable,
    see: Callable[[Chunk], None] = lambda chunk: None,
) -> tuple[Part, bool]:  # fmt: skip
    """The pairs to fit on, everyone's on every rank in the order of the records, and whether they are all there are.

    `see` is shown every chunk of this rank.
    """
    parts: list[Part] = []
    bytes_L, level = np.zeros(LEVELS), 0
    for window in windows(features, records, ranks, progress):
        found = [Part.of(chunk, seed) for chunk in window]
        bytes_L += sum(ranks.gather([sum(part.bytes_L() for part in found)]))
        parts += [part.only(part.level_P >= level) for part in found]
        while bytes_L[level:].sum() > features.limit:
            level += 1
            parts = [part.only(part.level_P >= level) for part in parts]
        for chunk in window:
            see(chunk)
    return Part.joined(ranks.gather(parts)), level == 0


class CrossFit(NamedTuple):
    """Regressions, and the margins of all records that they are of, where those were all fitted on."""

    fitted: Fitted
    margins: Margins | None


def fit(features: Features, records: np.ndarray, *, seed: int, ranks: Ranks, progress: Callable) -> CrossFit:
    """The regressions of these records, the same on every rank."""
    part, is_complete = sample(features, records, seed=seed, ranks=ranks, progress=progress)
    fitted = ranks.first(lambda: cross_fit(part.differences_PF, part.fold_P))
    return CrossFit(fitted, Margins(part.pairs_P3, fitted.margins_P) if is_complete else None)


def margins(
    features: Features, fitted: Fitted, records: np.ndarray, *, seed: int | None, ranks: Ranks, progress: Callable
) -> Iterator[Margins]:
    """The margins of all pairs, everyone's on every rank, in the order of the records.

    `seed` is of the folds that the records were fitted in; None for others, which all regressions may judge.
    """
    for window in windows(features, records, ranks, progress):
        parts = ranks.gather([chunk_margins(chunk, fitted, seed) for chunk in window])
        pairs_P3, margin_P = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(pairs_P3[:, 0], kind="stable")
        yield Margins(pairs_P3[order], margin_P[order])


def chunk_margins(chunk: Chunk, fitted: Fitted, seed: int | None) -> Margins:
    """The margins of a chunk's pairs."""
    scores_RK = np.asarray(chunk.features_RF @ fitted.weights_FK)
    place_P, ends_P2 = chunk.place_P, chunk.ends_P2
    fold_P = np.full(len(place_P), FOLDS) if seed is None else fold_of(chunk.key_N, seed)[place_P]
    margin_P = scores_RK[ends_P2[:, 0], fold_P] - scores_RK[ends_P2[:, 1], fold_P]
    return Margins(chunk.pairs_P3, margin_P)
