"""JSONL lines to groups: one prompt with its images, K responses and the preference pairs among them.

Three forms, recognised by their fields (K-wise `completions`, pairwise `chosen`/`rejected`, scoring `responses`),
become one type, `Group`, so that nothing downstream asks where a record came from.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SCAN_BYTES = 1 << 24
WHITE_SPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)
PREFERENCE_FIELDS = {"chosen", "rejected", "completions"}


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
class Group:
    """One record: everything that shares a prompt and its images."""

    source: str  # "file.jsonl:12", for messages
    record: int  # position in its file, counted from 0
    id: str | None
    prompt: str
    img_path: str | list[str] | None  # as written in the record
    images: tuple[str, ...]  # resolved paths
    responses: tuple[str, ...]
    pairs: tuple[Pair, ...] = ()
    truth: tuple[float, ...] | None = None  # true quality of each response, where the data knows it
    num_unrated: int = 0  # responses whose rating is not a finite number


class RecordFile:
    """A JSONL file read by line offset: opening scans for newlines, `group(i)` parses one line.

    Args:
        path: the JSONL file; blank lines are not records.
        image_root: folder that relative `img_path`s start from; default the file's own folder.
        need_pairs: refuse records without preferences (training, evaluation).
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None, *, need_pairs: bool = False):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file; expected a JSONL file of records")
        self.image_root = Path(image_root) if image_root else self.path.parent
        self.need_pairs = need_pairs
        self.offsets, self.line_numbers = scan_lines(self.path)

    def __len__(self) -> int:
        return len(self.offsets)

    def group(self, index: int) -> Group:
        """Parse record `index`. Raises `RecordError` naming file, line and field."""
        source = f"{self.path}:{self.line_numbers[index]}"
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordError(source, "", f"not valid JSON ({error})") from None
        if self.need_pairs and isinstance(fields, dict) and not PREFERENCE_FIELDS & fields.keys():
            raise RecordError(source, "chosen", "missing; training and evaluation need chosen/rejected or completions")
        return parse_group(fields, source=source, record=index, image_root=self.image_root)


def scan_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets (int64) and 1-based line numbers (int64) of a file's non-blank lines."""
    starts, suspects, position, opens_line = [], [], 0, True
    with open(path, "rb") as file:
        while chunk := file.read(SCAN_BYTES):
            data = np.frombuffer(chunk, np.uint8)
            begins = np.flatnonzero(np.concatenate([[opens_line], data[:-1] == ord("\n")]))
            opens_line = data[-1] == ord("\n")
            starts.append(begins + position)
            suspects.append(np.isin(data[begins], WHITE_SPACE))
            position += len(chunk)
        offsets = np.concatenate([np.zeros(0, np.int64), *starts])
        keep = np.ones(len(offsets), bool)
        for index in np.flatnonzero(np.concatenate([np.zeros(0, bool), *suspects])):
            file.seek(offsets[index])
            keep[index] = bool(file.readline().strip())
    kept = np.flatnonzero(keep)
    return offsets[kept], kept + 1


def parse_group(fields: object, *, source: str, record: int = 0, image_root: Path | None = None) -> Group:
    """Turn one decoded record of any form into a `Group`.

    Raises:
        RecordError: a field is missing, of the wrong type or not a finite number.
    """
    if not isinstance(fields, dict):
        raise RecordError(source, "", f"a record is a JSON object, this is {kind_of(fields)}")
    img_path = fields.get("img_path")
    images = image_paths(img_path, source, image_root)
    responses, pairs, num_unrated = parse_responses(fields, source)
    identity = fields.get("id")
    return Group(
        source=source,
        record=record,
        id=None if identity is None else text(str(identity), "id", source),
        prompt=text_field(fields, "prompt", source),
        img_path=img_path,
        images=images,
        responses=responses,
        pairs=pairs,
        truth=parse_truth(fields, len(responses), source),
        num_unrated=num_unrated,
    )


def image_paths(img_path: object, source: str, image_root: Path | None) -> tuple[str, ...]:
    """`img_path` as resolved paths: absent or null is no image, a string one, a list several."""
    if img_path is None:
        return ()
    names = img_path if isinstance(img_path, list) else [img_path]
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise RecordError(source, "img_path", f"expected a path or a list of paths, got {kind_of(name)}")
        text(name, "img_path", source)
    return tuple(str(image_root / name if image_root else Path(name)) for name in names)


def parse_responses(fields: dict, source: str) -> tuple[tuple[str, ...], tuple[Pair, ...], int]:
    """The responses, the pairs among them and the count of unrated ones, whichever form the record has."""
    if "completions" in fields:
        return parse_kwise(fields["completions"], source)
    if "chosen" in fields or "rejected" in fields:
        responses = (text_field(fields, "chosen", source), text_field(fields, "rejected", source))
        margin = 0.0 if fields.get("margin") is None else number(fields["margin"])
        if not math.isfinite(margin):
            raise RecordError(source, "margin", f"expected a finite number, got {fields['margin']!r}")
        return responses, (Pair(0, 1, margin),), 0
    if "responses" in fields:
        return text_list(fields["responses"], "responses", source), (), 0
    raise RecordError(source, "", "needs `chosen` and `rejected`, or `completions`, or `responses`")


def parse_kwise(completions: object, source: str) -> tuple[tuple[str, ...], tuple[Pair, ...], int]:
    """VLFeedback's `completions`: every two responses with different mean ratings make a pair."""
    if isinstance(completions, list):  # as the public data set stores it: one object a response
        if not all(isinstance(item, dict) for item in completions):
            raise RecordError(source, "completions", "expected objects with `annotations` and `response`")
        columns = {key: [item.get(key) for item in completions] for key in ("annotations", "response")}
    elif isinstance(completions, dict):
        columns = completions
    else:
        raise RecordError(source, "completions", f"expected an object or a list, got {kind_of(completions)}")
    responses = text_list(columns.get("response"), "completions.response", source)
    annotations = columns.get("annotations")
    if not isinstance(annotations, list) or len(annotations) != len(responses):
        raise RecordError(source, "completions.annotations", f"expected a list of {len(responses)}, one a response")
    ratings = [mean_rating(annotation) for annotation in annotations]
    pairs = []
    for i in range(len(responses)):
        for j in range(i + 1, len(responses)):
            if ratings[i] > ratings[j]:  # false when either is not a number
                pairs.append(Pair(i, j))
            elif ratings[j] > ratings[i]:
                pairs.append(Pair(j, i))
    return responses, tuple(pairs), sum(math.isnan(rating) for rating in ratings)


def mean_rating(annotation: object) -> float:
    """Mean `Rating` over the aspects of one annotation, NaN unless every one is a finite number."""
    if not isinstance(annotation, dict) or not annotation:
        return math.nan
    ratings = [number(aspect.get("Rating")) if isinstance(aspect, dict) else math.nan for aspect in annotation.values()]
    mean = sum(ratings) / len(ratings)
    return mean if math.isfinite(mean) else math.nan


def parse_truth(fields: dict, num_responses: int, source: str) -> tuple[float, ...] | None:
    """The optional true quality of each response, in the order of the responses (chosen, rejected)."""
    truth = fields.get("truth")
    if truth is None:
        return None
    if not isinstance(truth, list) or len(truth) != num_responses or not all(math.isfinite(number(x)) for x in truth):
        raise RecordError(source, "truth", f"expected a list of {num_responses} finite numbers, one a response")
    return tuple(map(number, truth))


def text_field(fields: dict, name: str, source: str) -> str:
    """A required string field."""
    if name not in fields:
        raise RecordError(source, name, "missing")
    return text(fields[name], name, source)


def text_list(values: object, name: str, source: str) -> tuple[str, ...]:
    """A required, non-empty list of strings."""
    if not isinstance(values, list) or not values:
        raise RecordError(source, name, f"expected a non-empty list of strings, got {kind_of(values)}")
    return tuple(text(value, f"{name}[{index}]", source) for index, value in enumerate(values))


def text(value: object, name: str, source: str) -> str:
    """A string that can be encoded (JSON allows lone surrogates, tokenizers do not)."""
    if not isinstance(value, str):
        raise RecordError(source, name, f"expected a string, got {kind_of(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RecordError(source, name, "holds a lone surrogate (\\ud800 to \\udfff), which is not valid text")
    return value


def number(value: object) -> float:
    """A JSON number or numeric text as float; NaN for anything else."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def kind_of(value: object) -> str:
    """What a JSON value is, for messages."""
    if isinstance(value, (list, str, dict)) and not value:
        return {list: "an empty list", str: "an empty string", dict: "an empty object"}[type(value)]
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def iter_groups(file: RecordFile, indices: Sequence[int] | None = None) -> Iterator[Group | RecordError]:
    """The file's groups in order, a `RecordError` in the place of each one that cannot be parsed."""
    for index in range(len(file)) if indices is None else indices:
        try:
            yield file.group(index)
        except RecordError as error:
            yield error
