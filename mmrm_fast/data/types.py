"""What a record is once read: a group of responses to one prompt; and what a value may be, else a `RecordError`."""

import math
from dataclasses import dataclass


class RecordError(ValueError):
    """A record that cannot be used: where it stands, which field, why and what to do."""

    def __init__(self, source: str, field: str, reason: str):
        super().__init__(f"{source}: {field}: {reason}" if field else f"{source}: {reason}")
        self.source, self.field, self.reason = source, field, reason

    def __reduce__(self):
        return RecordError, (self.source, self.field, self.reason)


@dataclass(frozen=True)
class Pair:
    """`responses[chosen]` is preferred to `responses[rejected]`, by at least `margin` if one is given."""

    chosen: int
    rejected: int
    margin: float = 0.0


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; a user's `content` may hold `<image>` slots."""

    role: str  # system, user or assistant
    content: str


Prompt = str | tuple[Message, ...]


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
    pairs: tuple[Pair, ...] = ()
    truth: tuple[float, ...] | None = None  # true quality of each response, where the data knows it
    num_unrated: int = 0  # responses whose rating is not a finite number


def text(value: object, name: str, source: str) -> str:
    """A string that can be encoded (JSON allows lone surrogates, tokenizers do not)."""
    if not isinstance(value, str):
        raise RecordError(source, name, f"expected a string, got {kind_of(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RecordError(source, name, "holds a lone surrogate (\\ud800 to \\udfff), which is not valid text")
    return value


def some_list(values: object, name: str, source: str, *, of: str) -> list:
    """A required list that is not empty."""
    if not isinstance(values, list) or not values:
        raise RecordError(source, name, f"expected a non-empty list of {of}, got {kind_of(values)}")
    return values


def number(value: object) -> float:
    """A JSON number or numeric text as float; NaN for anything else."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, (list, str, dict)) and not value:
        return {list: "an empty list", str: "an empty string", dict: "an empty object"}[type(value)]
    names = {dict: "an object", list: "a list", str: "a string", bytes: "bytes", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
