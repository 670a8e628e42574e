"""What is wrong with labels, seen from the pairs alone: identical sides, contradictions, duplicates, shared pictures.

Shapes: N records, P pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmrm_fast.data.types import hash64
from mmrm_fast.shortcuts.crossfit import Chunk


class Seen(NamedTuple):
    """What records are told by, as 64-bit hashes."""

    key_N: np.ndarray  # image and prompt
    image_N: np.ndarray  # 0 without an image
    pair_P: np.ndarray  # key and both texts, in any order
    first_P: np.ndarray  # bool, which of the two texts is preferred
    same_P: np.ndarray  # bool, whether they are one text

    @classmethod
    def of(cls, chunk: Chunk) -> "Seen":
        """Of a chunk's records."""
        texts = (response.encode("utf-8", "surrogatepass") for group in chunk.groups for response in group.responses)
        chosen_P, rejected_P = np.fromiter(map(hash64, texts), np.uint64)[chunk.ends_P2].T
        low, high = np.minimum(chosen_P, rejected_P), np.maximum(chosen_P, rejected_P)
        with np.errstate(over="ignore"):
            pair_P = chunk.key_N[chunk.place_P] ^ (low * np.uint64(0x9E3779B97F4A7C15) + high)
        return cls(chunk.key_N, chunk.image_N, pair_P, chosen_P == low, chosen_P == rejected_P)

    @classmethod
    def joined(cls, parts: Sequence["Seen"]) -> "Seen":
        """All of them."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


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
