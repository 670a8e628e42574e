"""What can be seen of a response without its picture: words, how they go together, length, form, the prompt's echo.

A row a response, a column a feature: first the `MEASURES`, then hashed ones: each word and each two words in a row (1
where they are there), the words crossed with the first two words of the prompt, and the measures crossed with them,
since a habit may depend on what is asked. A margin is a difference of two rows' scores, so that of a record's margins
each agrees with the others.

Shapes: R responses, T words, F features.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
from scipy.sparse import csr_matrix

from mmrm_fast.data.types import Group, Prompt

WORD = re.compile(r"[^\W㐀-鿿぀-ヿ가-힣]+|[㐀-鿿぀-ヿ가-힣]")  # one of Chinese, Japanese and Korean is a character
NUM_HASHED = 1 << 20
START_WORDS = 2
PIECE = 4  # characters of a word that are about a token

REFUSALS = (
    "i cannot", "i can't", "i can not", "i am unable", "i'm unable", "i am not able", "unable to", "i'm sorry",
    "i am sorry", "i apologize", "as an ai",
)  # fmt: skip
HEDGES = {
    "probably", "perhaps", "maybe", "might", "possibly", "seem", "seems", "appear", "appears", "likely", "unsure",
}  # fmt: skip
MARKS = {  # of what is counted
    "bold": ("**",), "code": ("`",), "line breaks": ("\n",), "sentence ends": tuple(".!?。！？"),
    "question marks": ("?", "？"), "exclamation marks": ("!", "！"), "commas": (",", "，", "、"), "colons": (":", "："),
    "quotes and brackets": ('"', "“", "(", "[", "（", "「"),
}  # fmt: skip
LIST_ITEM, HEADING = re.compile(r"^[ \t]*(?:[-*•+]|\d+[.)])[ \t]", re.M), re.compile(r"^#{1,6} ", re.M)
COUNTED = ("words", "characters", "tokens, about", *MARKS, "list items", "headings", "refusals", "hedges")
MEASURES = (*COUNTED, "share of it from the prompt", "share of the prompt in it")
GROUPS = {  # named groups of measures
    "length": ("words", "characters", "tokens, about"),
    "formatting": ("list items", "headings", "bold", "code", "line breaks"),
    "refusals": ("refusals",),
    "hedges": ("hedges",),
}
NUM_FEATURES = len(MEASURES) + NUM_HASHED
ONE, TWO, CROSSED, MEASURED = map(np.uint64, range(4))  # kinds of hashed features


@dataclass(frozen=True)
class Words:
    """The words of some responses, one after the other."""

    words: list[list[str]]  # of each response
    hash_T: np.ndarray  # uint64
    row_T: np.ndarray  # int64, the response of each
    start_R: np.ndarray  # uint64, of the prompt's first words

    def ones(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of every word."""
        return self.row_T, columns(ONE, self.hash_T)

    def twos(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of every two words in a row."""
        together = self.row_T[1:] == self.row_T[:-1]
        return self.row_T[1:][together], columns(TWO, self.hash_T[:-1][together], self.hash_T[1:][together])

    def crossed(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of every word with how the prompt begins."""
        return self.row_T, columns(CROSSED, self.hash_T, self.start_R[self.row_T])


def response_features(groups: Sequence[Group]) -> csr_matrix:
    """The features [R, F] float32 of all responses of the groups, in order."""
    words = read_words(groups)
    measures_RM = measured(groups, words.words)
    rows, found = map(np.concatenate, zip(words.ones(), words.twos(), words.crossed(), strict=True))
    there = np.unique(rows * NUM_FEATURES + found)
    row_V, measure_V = np.nonzero(measures_RM)
    value_V = measures_RM[row_V, measure_V]
    crossed_V = columns(MEASURED, measure_V.astype(np.uint64), words.start_R[row_V])
    row = np.concatenate([there // NUM_FEATURES, row_V, row_V])
    column = np.concatenate([there % NUM_FEATURES, measure_V, crossed_V])
    values = np.concatenate([np.ones(len(there)), value_V, value_V]).astype(np.float32)
    return csr_matrix((values, (row, column)), shape=(len(measures_RM), NUM_FEATURES))


def read_words(groups: Sequence[Group]) -> Words:
    """The words of all responses of the groups, in lower case."""
    words = [words_of(response) for group in groups for response in group.responses]
    starts = [start_of(group.prompt) for group in groups]
    start_R = [hash_of(" ".join(start)) for start, group in zip(starts, groups, strict=True) for _ in group.responses]
    hash_T = np.fromiter(map(hash_of, chain.from_iterable(words)), np.uint64)
    return Words(words, hash_T, np.repeat(np.arange(len(words)), list(map(len, words))), np.array(start_R, np.uint64))


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def start_of(prompt: Prompt) -> tuple[str, ...]:
    """The first words of what is asked last."""
    return tuple(words_of(asked(prompt)[:200])[:START_WORDS])


def asked(prompt: Prompt) -> str:
    """What is asked last, without the places of images."""
    text = prompt if isinstance(prompt, str) else next((m.content for m in reversed(prompt) if m.role == "user"), "")
    return text.replace("<image>", "")


@lru_cache(1 << 18)
def hash_of(word: str) -> int:
    """The same number for a word in every process."""
    data = word.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.crc32(data, 1)


def columns(*parts: np.ndarray) -> np.ndarray:
    """The columns, int64, of hashed features that are made of these uint64s."""
    return len(MEASURES) + (mixed(*parts) % np.uint64(NUM_HASHED)).astype(np.int64)


def mixed(*parts: np.ndarray) -> np.ndarray:
    """A uint64 of several, as splitmix64 mixes them."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state


def measured(groups: Sequence[Group], words: list[list[str]]) -> np.ndarray:
    """The `MEASURES` [R, M] float32 of all responses of the groups, given their words: log(1 + count), or a share."""
    rows, own = [], iter(words)
    for group in groups:
        prompt = set(words_of(asked(group.prompt)))
        rows += [measures(response, next(own), prompt) for response in group.responses]
    values_RM = np.array(rows, np.float32).reshape(-1, len(MEASURES))
    values_RM[:, : len(COUNTED)] = np.log1p(values_RM[:, : len(COUNTED)])
    return values_RM


def measures(text: str, words: list[str], prompt: set[str]) -> list[float]:
    """What is `COUNTED` in a text, then the share of its words that the prompt has, and of the prompt's that it has."""
    different, lower = set(words), text.lower()
    pieces = (sum(map(len, words)) + (PIECE - 1) * len(words)) / PIECE
    common = len(different & prompt)
    return [
        len(words), len(text), pieces,
        *(sum(map(text.count, marks)) for marks in MARKS.values()),
        len(LIST_ITEM.findall(text)), len(HEADING.findall(text)),
        sum(phrase in lower for phrase in REFUSALS), len(different & HEDGES),
        common / max(len(different), 1), common / max(len(prompt), 1),
    ]  # fmt: skip
