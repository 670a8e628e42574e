"""What a record is once read: a group of responses to one prompt; and what a value may be, else a `FieldError`."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np


class FieldError(ValueError):
    """A field that cannot be used, and why; who knows where its record stands makes it a `RecordError`."""

    def __init__(self, field: str, reason: str):
        super().__init__(reason)
        self.field, self.reason = field, reason


class RecordError(ValueError):
    """A record that cannot be used: where it stands, which field, why and what to do."""

    def __init__(self, source: str, field: str, reason: str):
        super().__init__(f"{source}: {field}: {reason}" if field else f"{source}: {reason}")
        self.source, self.field, self.reason = source, field, reason

    def __reduce__(self):
        return type(self), (self.source, self.field, self.reason)


class RewardError(RecordError):
    """A record that got no reward: what the model gave it is NaN or infinite."""

    @classmethod
    def of(cls, source: str, field: str, reward: float) -> "RewardError":
        """Of the response or pair that `field` names."""
        return cls(source, field, f"the model's reward is {reward}, not a finite number; check its weights and dtype")


def file_of(source: str) -> str:
    """The file of a record that stands at "FILE:LINE" or "FILE[PLACE]"."""
    return re.sub(r"(:\d+|\[\d+\])$", "", source)


@contextmanager
def at(source: str) -> Iterator[None]:
    """A `FieldError` inside becomes that of the record at `source`."""
    try:
        yield
    except FieldError as error:
        raise RecordError(source, error.field, error.reason) from None


class Pair(NamedTuple):
    """`responses[chosen]` is preferred to `responses[rejected]`, by at least `margin` if one is given."""

    chosen: int
    rejected: int
    margin: float = 0.0


@dataclass(frozen=True, eq=False)
class Pairs:
    """Preferences among one group's responses, as arrays, since there may be millions; iterated over, `Pair`s."""

    ends: np.ndarray  # int32 [P, 2]: chosen and rejected response
    margins: np.ndarray  # float64 [P]

    @classmethod
    def of(cls, *pairs: tuple) -> "Pairs":
        """From (chosen, rejected) or (chosen, rejected, margin) each."""
        whole = [Pair(*pair) for pair in pairs]
        ends = np.array([pair[:2] for pair in whole], np.int32).reshape(-1, 2)
        return cls(ends, np.array([pair.margin for pair in whole], float))

    @classmethod
    def ranked(cls, ratings: np.ndarray, most: int | None = None, seed: int = 0) -> "Pairs":
        """Every two responses whose ratings differ, in the order of the responses; a rating of NaN is in no pair.

        Where there are more than `most`, so many of them are drawn, without making the others.
        """
        order = np.argsort(-ratings, kind="stable")[: np.isfinite(ratings).sum()]  # from the best, without NaN
        worse = np.searchsorted(-ratings[order], -ratings[order], side="right")  # where those rated lower begin
        edges = np.cumsum(len(order) - worse)  # of the pairs that each is the better of
        numbers = drawn(num_ranked(ratings), most, seed)
        better = np.searchsorted(edges, numbers, side="right")
        ends = order[np.stack([better, len(order) - edges[better] + numbers], axis=1)]
        ends = ends[np.lexsort((ends.max(axis=1), ends.min(axis=1)))].astype(np.int32)
        return cls(ends, np.zeros(len(ends)))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Pair]:
        for (chosen, rejected), margin in zip(self.ends.tolist(), self.margins.tolist(), strict=True):
            yield Pair(chosen, rejected, margin)

    def __getitem__(self, which: slice | np.ndarray) -> "Pairs":
        """Some of them: a slice, places or a mask."""
        return Pairs(self.ends[which], self.margins[which])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pairs) and list(self) == list(other)


def num_ranked(ratings: np.ndarray) -> int:
    """How many pairs of two responses there are whose ratings differ."""
    _, equal = np.unique(ratings[np.isfinite(ratings)], return_counts=True)
    return int(equal.sum() ** 2 - (equal**2).sum()) // 2


def drawn(count: int, most: int | None, seed: int | tuple[int, ...]) -> np.ndarray:
    """`most` of the numbers below `count`, increasing, int64; all of them where there are no more."""
    if most is None or count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def hash64(*parts: bytes, key: bytes = b"") -> int:
    """64 bits of some bytes, one after the other, the same in every process."""
    return int.from_bytes(blake2b(b"".join(parts), digest_size=8, key=key).digest(), "little")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; a user's `content` may hold `<image>` slots."""

    role: str  # system, user, assistant or tool
    content: str
    extra: str = field(default="", repr=False)  # JSON of its other fields for the chat template, such as tool_calls

    def as_json(self) -> dict:
        """The message as JSON has it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.extra) if self.extra else {})}


Prompt = str | tuple[Message, ...]


def prompt_json(prompt: Prompt) -> str | list[dict]:
    """A prompt as JSON has it."""
    return prompt if isinstance(prompt, str) else [message.as_json() for message in prompt]


@dataclass(frozen=True)
class Group:
    """One record: everything that shares a prompt and its images."""

    source: str  # "file.jsonl:12", for messages
    record: int  # position in its file or files, counted from 0
    id: str | None
    prompt: Prompt
    img_path: str | list | None  # as written in the record, encoded images shortened
    images: tuple[str | bytes, ...]  # resolved paths, or image files' bytes
    responses: tuple[str, ...]
    pairs: Pairs = field(default_factory=Pairs.of)
    truth: tuple[float, ...] | None = None  # true quality of each response, where the data knows it
    num_unrated: int = 0  # responses whose rating is not a finite number
    num_undrawn: int = 0  # pairs over the most that a record may have, which are not among `pairs`
    read: tuple[str, ...] = ()  # the record's fields that make up the group
    unread: tuple[str, ...] = ()  # those that it has besides
    kept: tuple[int, ...] | None = None  # which of the record's responses these are, where some were left out
    seen: tuple[tuple[int, ...], ...] | None = None  # which images each response of a record has, where they differ
    rejected_images: str | list | None = None  # those of the rejected one as written, then
    tools: tuple[str, ...] = ()  # JSON of each that the conversation may call
    extras: tuple[str, ...] | None = None  # `Message.extra` of each response of a record, where any has one

    @property
    def places(self) -> Sequence[int]:
        """Each response's place in the record, by which all files number them."""
        return range(len(self.responses)) if self.kept is None else self.kept

    @property
    def replies(self) -> tuple[Message, ...]:
        """The responses as messages."""
        extras = (self.extras[place] if self.extras else "" for place in self.places)
        return tuple(Message("assistant", text, extra) for text, extra in zip(self.responses, extras, strict=True))

    def response_json(self, response: int) -> str | dict:
        """A response as JSON has it: its text, or a message where that has more."""
        reply = self.replies[response]
        return reply.as_json() if reply.extra else reply.content

    def images_written(self, response: int) -> str | list | None:
        """A response's images as the record has them."""
        return self.rejected_images if self.seen and self.places[response] == 1 else self.img_path


def text(value: object, name: str) -> str:
    """A string that can be encoded (JSON allows lone surrogates, tokenizers do not)."""
    if not isinstance(value, str):
        raise FieldError(name, f"expected a string, got {kind_of(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise FieldError(name, "holds a lone surrogate (\\ud800 to \\udfff), which is not valid text")
    return value


def some_list(values: object, name: str, *, of: str) -> list:
    """A required list that is not empty."""
    if not isinstance(values, list) or not values:
        raise FieldError(name, f"expected a non-empty list of {of}, got {kind_of(values)}")
    return values


def number(value: object) -> float:
    """A finite JSON number or numeric text as float; NaN for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, (list, str, dict)) and not value:
        return {list: "an empty list", str: "an empty string", dict: "an empty object"}[type(value)]
    names = {dict: "an object", list: "a list", str: "a string", bytes: "bytes", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
