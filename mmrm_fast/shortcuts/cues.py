"""What a shortcut is: rules about text alone that tell the preferred response, the most telling first.

A cue is a rule that gives a pair +1 (the preferred response has it), -1 (the other one has it) or 0 (it does not tell).
Its coverage is the share of the pairs that it tells, its accuracy how often rightly, its advantage both at once: the
share told rightly minus the share told wrongly. Cues that tell the same pairs alike are one, by all its names.

Shapes: P pairs, R responses, C candidates.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from scipy.sparse import vstack

from mmrm_fast.shortcuts.crossfit import Chunk
from mmrm_fast.shortcuts.features import MEASURES, read_words, start_of, words_of

CANDIDATES, ORDERED, HABITS, STARTS = 300, 60, 60, 20  # that are looked at, the most frequent ones
SHOWN = 12
SURE = 5.0  # standard deviations of chance
SAME = 0.7  # correlation of two cues that are one
WORTH = 0.05  # advantage by which a rule of two things beats one thing
LIKE = 0.3  # correlation with a better cue at which a rule of two things is nothing of its own
BY_CHANCE = 0.8  # mean of |normal|


class Sample(Chunk):
    """Some records of a file, with the features of their responses by column."""

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "Sample":
        """All records of some chunks."""
        groups = tuple(group for chunk in chunks for group in chunk.groups)
        keys, images = (np.concatenate([getattr(own, name) for own in chunks]) for name in ("key_N", "image_N"))
        return cls(groups, keys, images, vstack([chunk.features_RF for chunk in chunks]).tocsc())

    @cached_property
    def start_P(self) -> np.ndarray:
        """How each pair's prompt begins, as words."""
        starts = [" ".join(start_of(group.prompt)) for group in self.groups]
        return np.array(starts, object)[self.place_P]

    @cached_property
    def first_places(self) -> list[dict[str, int]]:
        """Where each word of a response first stands."""
        responses = (words_of(response) for group in self.groups for response in group.responses)
        return [{word: place for place, word in reversed(list(enumerate(words)))} for words in responses]

    @cached_property
    def names(self) -> dict[int, str]:
        """Words and two words in a row by their column."""
        words, names = read_words(self.groups), {}
        flat = np.array([word for own in words.words for word in own], object)
        together = words.row_T[1:] == words.row_T[:-1]
        pairs = flat[:-1][together] + " " + flat[1:][together] if len(flat) else flat
        for (_, found), texts in ((words.twos(), pairs), (words.ones(), flat)):
            column, place = np.unique(found, return_index=True)
            names |= dict(zip(column.tolist(), texts[place].tolist(), strict=True))
        return names | dict(enumerate(MEASURES))

    def values(self, columns: Sequence[int]) -> np.ndarray:
        """Features [R, C] float32 of some columns."""
        return self.features_RF[:, list(columns)].toarray()

    def differences(self, columns: Sequence[int]) -> np.ndarray:
        """Their signs [P, C] int8: which response has more."""
        values_RC = self.values(columns)
        return np.sign(values_RC[self.ends_P2[:, 0]] - values_RC[self.ends_P2[:, 1]]).astype(np.int8)


@dataclass
class Cue:
    """A rule, how well it tells the pairs of a sample, and other rules that tell the same."""

    kind: str  # `Has`, `ByQuestion`, `Before` or `Either`
    name: str
    signs: Callable[[Sample], np.ndarray]  # +1, -1 or 0 [P] of any sample's pairs
    sign_P: np.ndarray  # of this sample's, turned so that it is right more often than wrong
    direction: int  # 1: the preferred response has it, -1: the other one
    column: int = -1  # of what `Has` is about
    also: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, kind: str, name: str, signs: Callable[[Sample], np.ndarray], sign_P: np.ndarray, **more) -> "Cue":
        """A rule with its signs on a sample, turned the way that is right more often."""
        direction = 1 if sign_P.sum(dtype=np.int64) >= 0 else -1
        return cls(kind, name, signs, direction * sign_P, direction, **more)

    @property
    def right(self) -> float:
        return float((self.sign_P > 0).mean())

    @property
    def coverage(self) -> float:
        return float((self.sign_P != 0).mean())

    @property
    def advantage(self) -> float:
        return 2 * self.right - self.coverage

    def row(self) -> dict:
        """What is told of it."""
        return {
            "cue": self.name, "also": self.also, "preferred": "has it" if self.direction > 0 else "has it not",
            "kind": self.kind, "coverage": self.coverage, "accuracy": self.right / max(self.coverage, 1e-12),
        }  # fmt: skip


def find_cues(sample: Sample) -> list[Cue]:
    """The cues that are no chance, the most telling first, `SHOWN` at most."""
    if not len(sample.ends_P2):
        return []
    singles = [*has(sample)]
    found = [*singles, *by_question(sample, singles), *orders(sample), *either(sample)]
    least = SURE / len(sample.ends_P2) ** 0.5
    sure = [cue for cue in found if cue.advantage > least * max(cue.coverage, 1e-12) ** 0.5]
    return merged(sorted(sure, key=rank))


def rank(cue: Cue) -> tuple:
    """The more telling first, one thing before two; of equal ones what is there, in words, before what is not."""
    words = -len(cue.name.split()) if cue.column >= len(MEASURES) else 0
    return -round(cue.advantage, 6) + WORTH * (cue.kind != "Has"), -cue.direction, words


def merged(cues: Iterable[Cue]) -> list[Cue]:
    """Cues that tell the same are the first of them, by all their names."""
    kept: list[Cue] = []
    for cue in cues:
        is_single = cue.kind == "Has"
        alike = [correlation(cue.sign_P, other.sign_P) for other in kept]
        most = max(alike, default=0.0)
        if most <= (SAME if is_single else LIKE):
            if len(kept) < SHOWN:
                kept.append(cue)
        elif is_single and most > SAME:
            same = kept[int(np.argmax(alike))]
            same.also.append(("" if cue.direction == same.direction else "not ") + cue.name)
    return kept


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """How alike two rules tell, 0 to 1."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    return float(abs(one @ other) / max(np.sqrt((one @ one) * (other @ other)), 1e-12))


def has(sample: Sample) -> Iterable[Cue]:
    """The response that has something, or more of it: of the measures and the most telling words."""
    advantage_F = np.abs(np.asarray(sample.differences_PF.sign().sum(axis=0))).ravel()
    advantage_F[: len(MEASURES)] = advantage_F.max(initial=0) + 1
    columns = np.argsort(-advantage_F, kind="stable")[:CANDIDATES]
    columns = [column for column in columns.tolist() if column in sample.names]
    for column, sign_P in zip(columns, sample.differences(columns).T, strict=True):
        yield Cue.of("Has", sample.names[column], partial(signs_of_one, column=column), sign_P, column=column)


def signs_of_one(sample: Sample, *, column: int) -> np.ndarray:
    """Which response has more of a feature."""
    return sample.differences([column])[:, 0]


def by_question(sample: Sample, singles: Sequence[Cue]) -> Iterable[Cue]:
    """The response that has something after some beginnings of a prompt, the other one after others."""
    starts = [start for start, _ in Counter(sample.start_P.tolist()).most_common(STARTS)]
    if len(starts) < 2:
        return
    columns = sorted({*range(len(MEASURES)), *frequent(sample, CANDIDATES)})
    signs_PC, plain = sample.differences(columns), {cue.column: cue.advantage for cue in singles}
    sums_SC = np.stack([signs_PC[sample.start_P == start].sum(axis=0, dtype=np.int64) for start in starts])
    told_SC = np.stack([np.abs(signs_PC[sample.start_P == start]).sum(axis=0, dtype=np.int64) for start in starts])
    advantage_C = (np.abs(sums_SC) - BY_CHANCE * np.sqrt(told_SC)).sum(axis=0) / len(sample.ends_P2)
    for place, column in enumerate(columns):
        if advantage_C[place] > plain.get(column, 0.0) + WORTH:
            ways = dict(zip(starts, np.sign(sums_SC[:, place]).tolist(), strict=True))
            says = ", ".join(f"{'+' if way > 0 else '−'} {start} …" for start, way in [*ways.items()][:6] if way)
            rule = partial(signs_by_question, column=column, ways=ways)
            yield Cue.of("ByQuestion", f"{sample.names[column]}, by the question: {says}", rule, rule(sample))


def signs_by_question(sample: Sample, *, column: int, ways: dict[str, int]) -> np.ndarray:
    """Which response has more of a feature, the way [P] that goes with how the prompt begins."""
    way_P = np.array([ways.get(start, 0) for start in sample.start_P.tolist()], np.int8)
    return signs_of_one(sample, column=column) * way_P


def frequent(sample: Sample, number: int) -> list[int]:
    """The columns of words that some responses have and some have not, the most evenly divided first."""
    features, num_rows = sample.features_RF, sample.features_RF.shape[0]
    share_F = np.diff(features.indptr) / max(num_rows, 1)
    order = np.argsort(-share_F * (1 - share_F), kind="stable")[: 4 * number]
    return [int(c) for c in order if share_F[c] < 1 and c >= len(MEASURES) and int(c) in sample.names][:number]


def orders(sample: Sample) -> Iterable[Cue]:
    """Which of two words is mentioned first, of words that many responses have."""
    counts = Counter(word for found in sample.first_places for word in found)
    words = tuple(sorted(word for word, _ in counts.most_common(ORDERED)))
    places_RW = places(sample, words)
    for i, word in enumerate(words):
        signs_PW = order_signs(places_RW, i, sample)
        for j in (np.abs(signs_PW.mean(axis=0))[i + 1 :] > WORTH).nonzero()[0] + i + 1:
            rule = partial(signs_before, words=(word, words[j]))
            yield Cue.of("Before", f"“{word}” before “{words[j]}”", rule, signs_PW[:, j])


def signs_before(sample: Sample, *, words: tuple[str, str]) -> np.ndarray:
    """Which response mentions one word before another, where both mention both."""
    return order_signs(places(sample, words), 0, sample)[:, 1]


def places(sample: Sample, words: Sequence[str]) -> np.ndarray:
    """Where each word first stands [R, W] float32, NaN where it does not."""
    return np.array([[own.get(word, np.nan) for word in words] for own in sample.first_places], np.float32)


def order_signs(places_RW: np.ndarray, word: int, sample: Sample) -> np.ndarray:
    """+1 [P, W] where only the preferred response has a word before another, -1 where only the other one has."""
    chosen_PW, rejected_PW = places_RW[sample.ends_P2[:, 0]], places_RW[sample.ends_P2[:, 1]]
    chosen, rejected = (own[:, word, None] < own for own in (chosen_PW, rejected_PW))
    there = ~np.isnan(chosen_PW) & ~np.isnan(rejected_PW)
    return (chosen.astype(np.int8) - rejected) * (there & there[:, word, None])


def either(sample: Sample) -> Iterable[Cue]:
    """Having exactly one of two things, of words that divide the responses evenly and tell less alone."""
    columns = distinct(sample, frequent(sample, 4 * HABITS))
    values_RC = np.where(sample.values(columns) > 0, 1.0, -1.0).astype(np.float32)
    chosen_PC, rejected_PC = values_RC[sample.ends_P2[:, 0]], values_RC[sample.ends_P2[:, 1]]
    advantage_CC = (rejected_PC.T @ rejected_PC - chosen_PC.T @ chosen_PC) / (2 * len(sample.ends_P2))
    alone_C = np.abs((chosen_PC - rejected_PC).mean(axis=0)) / 2
    worth_CC = np.abs(advantage_CC) > np.maximum(alone_C[:, None], alone_C) + WORTH
    for i, j in np.argwhere(np.triu(worth_CC, 1)).tolist():
        name = f"exactly one of “{sample.names[columns[i]]}” and “{sample.names[columns[j]]}”"
        rule = partial(signs_of_either, columns=(columns[i], columns[j]))
        yield Cue.of("Either", name, rule, rule(sample))


def signs_of_either(sample: Sample, *, columns: tuple[int, int]) -> np.ndarray:
    """Which response has exactly one of two things."""
    one_R = (sample.values(columns) > 0).sum(axis=1) == 1
    return one_R[sample.ends_P2[:, 0]].astype(np.int8) - one_R[sample.ends_P2[:, 1]]


def distinct(sample: Sample, columns: Sequence[int]) -> list[int]:
    """Columns of which no two are nearly the same, `HABITS` at most."""
    there_RC = sample.values(columns) > 0
    centred = there_RC - there_RC.mean(axis=0, keepdims=True)
    centred /= np.maximum(np.linalg.norm(centred, axis=0), 1e-12)
    alike_CC, kept = np.abs(centred.T @ centred), []
    for place in range(len(columns)):
        if len(kept) < HABITS and not (alike_CC[place, kept] > 0.9).any():
            kept.append(place)
    return [columns[place] for place in kept]
