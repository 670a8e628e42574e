"""Records to groups: one prompt with its images, K responses and the preference pairs among them.

Every layout of `forms` and every file of `lines` becomes one type, `Group`, so that nothing downstream
asks where a record came from.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmrm_fast.data.fields import Fields, refuse_unread
from mmrm_fast.data.forms import COMPLETION, FORM_FIELDS, TRANSLATED, Form, has_preferences, parse_form, translated
from mmrm_fast.data.lines import open_rows
from mmrm_fast.data.messages import MESSAGE_EXTRAS, as_json, parse_objects
from mmrm_fast.data.pictures import IMAGE_FIELDS, ImageRoots, parse_images, resolve_image, shown_images
from mmrm_fast.data.splits import Split, record_files
from mmrm_fast.data.types import FieldError, Group, Pairs, RecordError, at, hash64, kind_of, num_ranked, number, text

ID_FIELDS = ("id", "idx")
MAX_PAIRS = 2048  # of a record: all of 64 responses
READ_INSIDE = {"role", "content", "from", "value", *MESSAGE_EXTRAS, *COMPLETION}
FIELDS = {*ID_FIELDS, *IMAGE_FIELDS, *FORM_FIELDS, "truth"}


def parse_group(
    fields: object,
    *,
    source: str,
    record: int = 0,
    image_root: Path | None = None,
    confined: bool = False,
    beside: Path | None = None,
    ignored: Collection[str] = (),
    max_pairs: int = MAX_PAIRS,
    columns: Collection[str] = (),
    need_pairs: bool = False,
) -> Group:
    """Turn one decoded record of any form into a `Group`.

    Args:
        image_root: where relative image paths start.
        confined: accept only encoded images and paths under `image_root`, for records that strangers send.
        beside: where a picture of the same relative path must be the same.
        ignored: names of fields that may be dropped though they may change what the record says.
        max_pairs: of more pairs so many are drawn, of equal responses with equal ratings always the same.
        columns: of its file that were not read.
        need_pairs: refuse a record without preferences.

    Raises:
        RecordError: a field is missing, of the wrong type, not a finite number, over a limit, or not read here though
            it may change what the record says.
    """
    with at(source):
        if not isinstance(fields, dict):
            raise FieldError("", f"a record is a JSON object, this is {kind_of(fields)}")
        own = Fields(fields)
        fields = translated(Fields({name: value for name, value in own.items() if name not in ignored}, own.read))
        if need_pairs and not has_preferences(fields):
            raise FieldError("chosen", "missing; training and evaluation need chosen/rejected or completions")
        refuse_unread(fields, FIELDS, ignored)
        form = parse_form(fields, ignored)
        extras = tuple(reply.extra for reply in form.replies)
        where = {"image_root": image_root, "confined": confined, "beside": beside}
        said = {
            "id": parse_id(fields),
            "prompt": form.prompt,
            "responses": tuple(reply.content for reply in form.replies),
            "extras": extras if any(extras) else None,
            "tools": tuple(as_json(tool, "tools") for tool in parse_objects(fields.get("tools"), "tools")),
            "truth": parse_truth(fields, len(form.replies)),
            **images_of(fields, form, where),
            **preferences(form, max_pairs),
        }
        own.read.difference_update(ignored)
        return Group(source, record, **said, **own.names(columns, READ_INSIDE))


def images_of(fields: dict, form: Form, where: dict) -> dict:
    """A group's images, as written and resolved; where the two sides of a pair have others, all and whose they are."""
    written, images = parse_images(fields, form.images, **where)
    others = fields.get("rejected_images", form.rejected_images)
    if others is None:
        return {"img_path": written, "images": images}
    if form.rejected_images is not None and "rejected_images" in fields:
        raise FieldError("rejected_images", "there are images in the rejected messages as well; use one of the two")
    if form.ratings is not None or not len(form.pairs):
        raise FieldError("rejected_images", "belongs to a chosen and a rejected reply; this record has other responses")
    others = list(others) if isinstance(others, (list, tuple)) else [others]
    rejected = tuple(resolve_image(item, "rejected_images", **where) for item in others)
    if rejected == images:
        return {"img_path": written, "images": images}
    distinct = tuple(dict.fromkeys((*images, *rejected)))
    seen = tuple(tuple(map(distinct.index, own)) for own in (images, rejected))
    return {"img_path": written, "images": distinct, "seen": seen, "rejected_images": shown_images(others)}


def preferences(form: Form, most: int) -> dict:
    """A group's pairs, and how many more there are: every two responses with different ratings make one."""
    if form.ratings is None:
        return {"pairs": form.pairs}
    texts = "\0".join(reply.content for reply in form.replies)
    pairs = Pairs.ranked(form.ratings, most, seed=hash64(texts.encode()))
    unrated = int(np.isnan(form.ratings).sum())
    return {"pairs": pairs, "num_unrated": unrated, "num_undrawn": num_ranked(form.ratings) - len(pairs)}


def parse_id(fields: dict) -> str | None:
    """The record's own name, text or a number, as text."""
    for name in ID_FIELDS:
        if (value := fields.get(name)) is not None:
            return str(value) if isinstance(value, (int, float)) else text(value, name)
    return None


def parse_truth(fields: dict, num_responses: int) -> tuple[float, ...] | None:
    """The optional true quality of each response, in the order of the responses (chosen, rejected)."""
    truth = fields.get("truth")
    if truth is None:
        return None
    if not isinstance(truth, list) or len(truth) != num_responses or not all(math.isfinite(number(x)) for x in truth):
        raise FieldError("truth", f"expected a list of {num_responses} finite numbers, one a response")
    return tuple(map(number, truth))


class Records:
    """The records of files, read at random: opening builds an index, `group(i)` parses one record.

    Args:
        specs: each a file (JSONL, also .gz or .zst, Parquet, CSV, a JSON array), every one of a folder, or a glob.
        split: of a folder whose files are splits, the one that is meant, see `splits.record_files`.
        image_root: folder that relative image paths start from, or one for some files; default each file's own folder.
        name: of the test set that the files are, for its own image root.
        ignored, max_pairs, need_pairs: see `parse_group`.

    Raises:
        ValueError: no such file, or not of these kinds.
    """

    def __init__(
        self,
        *specs: str | Path,
        split: Split | None = None,
        image_root: str | Path | ImageRoots | None = None,
        name: str | None = None,
        ignored: Collection[str] = (),
        max_pairs: int = MAX_PAIRS,
        need_pairs: bool = False,
    ):
        self.options = {"ignored": frozenset(ignored), "max_pairs": max_pairs, "need_pairs": need_pairs}
        roots = image_root if isinstance(image_root, ImageRoots) else ImageRoots(image_root and Path(image_root))
        found = [record_files(spec, split) for spec in specs]
        self.left = [file for _, left in found for file in left]  # of other splits
        opened = [open_rows(taken, FIELDS | TRANSLATED) for taken, _ in found]
        self.files = [file for own in opened for file in own]
        called = [str(spec) for spec, own in zip(specs, opened, strict=True) for _ in own]
        self.names = [(file.path, *filter(None, (name, spec))) for file, spec in zip(self.files, called, strict=True)]
        self.roots = [roots.of(*names) for names in self.names]  # and where the same names must be the same pictures
        self.edges = np.cumsum([0, *map(len, self.files)])
        self.spec_edges = np.cumsum([0, *(sum(map(len, own)) for own in opened)])  # where the records of each begin

    def __len__(self) -> int:
        return int(self.edges[-1])

    def group(self, index: int, *, compare: bool = False) -> Group:
        """Parse record `index`. Raises `RecordError` naming file, line and field.

        Args:
            compare: where pictures come from a folder for all files, refuse one that is another one beside its file.
        """
        number, row = self.place(index)
        file, (root, beside) = self.files[number], self.roots[number]
        return parse_group(
            file.fields(row), source=file.source(row), record=int(index), image_root=root,
            beside=beside if compare else None, columns=file.unread, **self.options,
        )  # fmt: skip

    def source(self, index: int) -> str:
        """File and line of record `index`, which is not read."""
        number, row = self.place(index)
        return self.files[number].source(row)

    def place(self, index: int) -> tuple[int, int]:
        """Record `index` as the number of its file and its row."""
        number = int(np.searchsorted(self.edges, index, side="right")) - 1
        return number, int(index - self.edges[number])


def iter_groups(records: Records, indices: Sequence[int] | None = None) -> Iterator[Group | RecordError]:
    """The groups in order, a `RecordError` in the place of each one that cannot be parsed."""
    for index in range(len(records)) if indices is None else indices:
        try:
            yield records.group(index, compare=True)
        except RecordError as error:
            yield error
