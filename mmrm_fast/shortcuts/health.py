"""What is wrong with labels, seen from the pairs alone: identical sides, contradictions, duplicates, shared pictures.

Shapes: N records, P pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrm_fast.data.types import Group
from mmrm_fast.shortcuts.crossfit import Chunk


@dataclass(frozen=True)
class Seen:
    """What records are told by, as 64-bit hashes."""

    key_N: np.ndarray  # image and prompt
    image_N: np.ndarray  # 0 without an image
    pair_P: np.ndarray  # key and both texts, in any order
    first_P: np.ndarray  # bool, which of the two texts is preferred
    same_P: np.ndarray  # bool, whether they are one text

    @classmethod
    def of(cls, chunk: Chunk) -> "Seen":
        """Of a chunk's records."""
        keys = np.repeat(chunk.key_N, [len(group.pairs) for group in chunk.groups])
        ends = [texts for group in chunk.groups for texts in pair_texts(group)]
        chosen_P, rejected_P = np.array(ends, np.uint64).reshape(-1, 2).T
        low, high = np.minimum(chosen_P, rejected_P), np.maximum(chosen_P, rejected_P)
        with np.errstate(over="ignore"):
            pair_P = keys ^ (low * np.uint64(0x9E3779B97F4A7C15) + high)
        return cls(chunk.key_N, chunk.image_N, pair_P, chosen_P == low, chosen_P == rejected_P)

    @classmethod
    def joined(cls, parts: Sequence["Seen"]) -> "Seen":
        """All of them."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def pair_texts(group: Group) -> list[tuple[int, int]]:
    """Hashes of the preferred and the other text of every pair."""
    hashes = [text_hash(response) for response in group.responses]
    return [(hashes[pair.chosen], hashes[pair.rejected]) for pair in group.pairs]


def text_hash(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def own_health(seen: Seen) -> dict[str, int]:
    """Pairs of one file whose sides are identical, that stand there again, or with the other side preferred."""
    different = ~seen.same_P
    pairs, labels = seen.pair_P[different], seen.first_P[different]
    _, place, count = np.unique(pairs, return_inverse=True, return_counts=True)
    first = np.bincount(place, labels, len(count))
    contradictory = (first > 0) & (first < count)
    return {
        "identical sides": int(seen.same_P.sum()),
        "duplicates": int((count - 1)[~contradictory].sum()),
        "contradictory": int(count[contradictory].sum()),
    }


def shared(one: Seen, other: Seen) -> dict[str, int]:
    """How much of one file is in another: its pairs, records with the same image and prompt, records with an image."""
    return {
        "pairs": int(np.isin(one.pair_P, other.pair_P).sum()),
        "image and prompt": int(np.isin(one.key_N, other.key_N).sum()),
        "image": int(np.isin(one.image_N[one.image_N > 0], other.image_N).sum()),
    }
