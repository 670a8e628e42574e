"""Published layouts of the field's preference benchmarks, read to items: one record each, its group and its pair.

    vl-rewardbench          id, query, response[2], image, human_ranking, query_source     arXiv 2411.17451
    multimodal-rewardbench  ID, Text, Image, Output1, Output2, Better, Category            arXiv 2502.14191
    mm-rlhf-rewardbench     id, prompt, chosen, rejected, image                            arXiv 2502.10391
    rewardbench             prompt, chosen, rejected, subset, id                           arXiv 2403.13787
    rewardbench-2           the same with lists of responses, and counts of them           arXiv 2506.01937
    pairs                   any record form with preferences

Files are Parquet, JSON lines, a JSON list or CSV. An image is a file name under the image root (with or without the
first folder of its name), a data URL, bytes, or the `{"bytes", "path"}` object of Parquet files.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from mmrm_fast.data.fields import Fields, is_empty, refuse_unread
from mmrm_fast.data.lines import Rows, open_rows
from mmrm_fast.data.pictures import ImageRoots, resolve_image
from mmrm_fast.data.records import MAX_PAIRS, READ_INSIDE, Group, Records, iter_groups, parse_group
from mmrm_fast.data.splits import record_files, said_left
from mmrm_fast.data.types import FieldError, Pairs, RecordError, at, kind_of
from mmrm_fast.evaluate.rewardbench import KINDS, TABLES, TIES
from mmrm_fast.tables import print_lines

IMAGE_FIELDS = ("image", "Image", "image_path", "images", "img_path")
ID_FIELDS = ("id", "ID")
COLUMNS = {  # that are read; others may say nothing that changes an item
    *ID_FIELDS, "query", "response", "human_ranking", "ranking", "query_source", "Text", "Output1", "Output2", "Better",
    "Category", "prompt", "chosen", "rejected", "subset", *IMAGE_FIELDS,
}  # fmt: skip


class MissingImage(RecordError):
    """An item whose image is not there: it cannot be scored, and that is neither right nor wrong."""


@dataclass(frozen=True)
class Item:
    """One benchmark item. `record` has the responses in published order and the labelled pairs among them."""

    id: str
    record: Group
    group: str = "all"
    subgroup: str | None = None
    in_training_set: bool = False  # from a data set that reward models are commonly trained on
    ordered: bool = True  # the order of the responses was published, not made by naming the better one `chosen`


@dataclass(frozen=True)
class Unread:
    """An item that cannot be scored, with the group it counts in where that is known."""

    id: str
    group: str
    error: RecordError


class Published(NamedTuple):
    """What a layout says in its own fields."""

    record: dict  # in ours: a prompt with two responses, or with the chosen and the rejected one
    labels: dict  # of the `Item`
    pairs: Pairs | None = None  # of all responses, where the record does not say them
    names: dict[str, str] = {}  # noqa: RUF012 what the layout calls our fields


def read_items(
    bench: str,
    data: Path,
    image_root: Sequence[str] = (),
    *,
    ignored: Collection[str] = (),
    max_pairs: int = MAX_PAIRS,
) -> Iterator[Item | Unread]:
    """Every item of a benchmark in the order of its files, an `Unread` in the place of each that cannot be used.

    Args:
        bench: `pairs` or a name in `LAYOUTS`.
        data: a file, or a folder with published files, of whose splits the tested one is read.
        image_root: folders that image file names start from, see `ImageRoots`; default the folder of the file.
        ignored: names of fields that may be dropped though they may change what an item says.
        max_pairs: see `records.parse_group`.

    Raises:
        ValueError: no such file, or one that is not of its format.
    """
    taken, left = record_files(data, "test")
    print_lines([said_left(taken, left)] if left else [])
    roots = ImageRoots.parse(image_root)
    roots.refuse_unused((path, str(data)) for path in taken)
    if bench == "pairs":
        options = {"need_pairs": True, "ignored": ignored, "max_pairs": max_pairs}
        yield from read_pairs(Records(*taken, image_root=roots, name=str(data), **options))
        return
    for file in open_rows(taken, COLUMNS):
        yield from read_layout(bench, file, roots.of(file.path, str(data)), ignored)


def read_pairs(records: Records) -> Iterator[Item | Unread]:
    """Items of preference records in any form, one a record."""
    for index, group in enumerate(iter_groups(records)):
        if isinstance(group, RecordError):
            yield Unread(str(index), "all", group)
            continue
        identity = group.id or str(index)
        absent = [image for image in group.images if isinstance(image, str) and not Path(image).is_file()]
        if absent:
            yield Unread(identity, "all", MissingImage(group.source, "image", f"{absent[0]}: no such image file"))
        else:
            yield Item(identity, group, ordered=len(group.responses) > 2)


def read_layout(
    bench: str, file: Rows, root: tuple[Path, Path | None], ignored: Collection[str]
) -> Iterator[Item | Unread]:
    """Items of one file in a benchmark's own layout; `root` as `ImageRoots.of` gives it."""
    for index in range(len(file)):
        identity, labels, source = str(index), {"group": "unknown"}, file.source(index)
        try:
            with at(source):
                row = file.fields(index)
                if not isinstance(row, dict):
                    raise FieldError("", f"an item is a JSON object, this is {kind_of(row)}")
                fields = Fields(row)
                identity = str(next((fields[name] for name in ID_FIELDS if not is_empty(fields.get(name))), index))
                published = LAYOUTS[bench](fields)
                labels = published.labels
                record = parse(published, source, ignored)
                refuse_unread(fields, COLUMNS, ignored)
                images = find_images(fields, source, *root, required=not bench.startswith("rewardbench"))
        except RecordError as error:
            yield Unread(identity, labels["group"], error)
        else:
            names = fields.names(file.unread, READ_INSIDE)
            yield Item(identity, replace(record, id=identity, record=index, images=images, **names), **labels)


def parse(published: Published, source: str, ignored: Collection[str]) -> Group:
    """An item's record with its pair. Raises `FieldError` in the layout's names."""
    try:
        group = parse_group(published.record, source=source, ignored=ignored)
    except RecordError as error:
        ours = error.field.partition("[")[0]
        raise FieldError(error.field.replace(ours, published.names.get(ours, ours)), error.reason) from None
    if published.pairs is None:
        return group
    if len(group.responses) != (expected := published.pairs.ends.max() + 1):
        raise FieldError(published.names["responses"], f"expected {expected} responses, got {len(group.responses)}")
    return replace(group, pairs=published.pairs)


def vl_rewardbench(fields: dict) -> Published:
    """VL-RewardBench; `human_ranking` holds each response's rank, 0 the better."""
    ranking = fields.get("human_ranking", fields.get("ranking"))
    if ranking not in ([0, 1], [1, 0]):
        raise FieldError("human_ranking", f"expected [0, 1] or [1, 0], got {ranking!r}")
    said = [str(fields.get(field) or "") for field in ("query_source", "image_path", "id")]
    names = " ".join(re.sub(r"[^a-z0-9]", "", name.lower()) for name in said)
    source, group = next((where for known, where in TABLES["vl_sources"].items() if known in names), (None, None))
    if source is None:
        raise FieldError("query_source", f"in no group: {said[0]!r}, id {said[2]!r}")
    return Published(
        {"prompt": fields.get("query"), "responses": fields.get("response")},
        {"group": group, "in_training_set": source in TABLES["training_sets"]},
        Pairs.of(tuple(ranking)),
        {"prompt": "query", "responses": "response"},
    )


def multimodal_rewardbench(fields: dict) -> Published:
    """Multimodal RewardBench; safety and reasoning are split by the prefix of the id."""
    better, category = fields.get("Better"), fields.get("Category")
    if better not in ("Output1", "Output2"):
        raise FieldError("Better", f"expected 'Output1' or 'Output2', got {better!r}")
    if not isinstance(category, str):
        raise FieldError("Category", f"expected a string, got {kind_of(category)}")
    labels = {"group": category}
    if category in TABLES["multimodal_splits"]:
        prefix, with_prefix, without = TABLES["multimodal_splits"][category]
        part = with_prefix if str(fields.get("ID")).lower().startswith(prefix) else without
        labels["subgroup"] = f"{category}/{part}"
    record = {"prompt": fields.get("Text"), "responses": [fields.get("Output1"), fields.get("Output2")]}
    names = {"prompt": "Text", "responses": "Output1, Output2"}
    return Published(record, labels, Pairs.of((0, 1) if better == "Output1" else (1, 0)), names)


def chosen_rejected(fields: dict) -> Published:
    """MM-RLHF-RewardBench, of which several pairs share an id, and RewardBench, which is text grouped by its subset."""
    record = {name: fields.get(name) for name in ("prompt", "chosen", "rejected")}
    return Published(record, {"group": str(fields.get("subset", "all")), "ordered": False})


def lists_of_responses(fields: dict) -> Published:
    """RewardBench 2: one right response of four, or, in the subset of ties, any number of right ones."""
    subset, chosen, rejected = (fields.get(name) for name in ("subset", "chosen", "rejected"))
    for name, responses in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(responses, list) or not responses:
            raise FieldError(name, f"expected a list of responses, got {kind_of(responses)}")
    if subset == TIES and not re.fullmatch(rf"({'|'.join(KINDS)}):.+", str(fields.get("id"))):
        raise FieldError("id", f"expected ref:N or tied:N in the subset {TIES}, got {fields.get('id')!r}")
    if subset != TIES and len(chosen) != 1:
        raise FieldError("chosen", f"expected one response outside of the subset {TIES}, got {len(chosen)}")
    record = {"prompt": fields.get("prompt"), "responses": [*chosen, *rejected]}
    labels = {"group": str(subset), "ordered": False}
    places = range(len(chosen) + len(rejected))
    pairs = Pairs.of(*product(places[: len(chosen)], places[len(chosen) :]))
    return Published(record, labels, pairs, {"responses": "chosen, rejected"})


LAYOUTS: dict[str, Callable[[dict], Published]] = {
    "vl-rewardbench": vl_rewardbench,
    "multimodal-rewardbench": multimodal_rewardbench,
    "mm-rlhf-rewardbench": chosen_rejected,
    "rewardbench": chosen_rejected,
    "rewardbench-2": lists_of_responses,
}


def find_images(
    fields: dict, source: str, root: Path, beside: Path | None, *, required: bool
) -> tuple[str | bytes, ...]:
    """The images of an item, as paths or encoded bytes."""
    filled = [name for name in IMAGE_FIELDS if not is_empty(fields.get(name))]
    if not filled:
        if required:
            raise MissingImage(source, "image", "the item has no image")
        return ()
    field, *others = filled
    paths = [fields[name] for name in filled if isinstance(fields[name], str)]
    files = {Path(path).name for path in paths if not path.startswith("data:")}
    if len(files) > 1:
        raise FieldError(others[0], f"names another image than `{field}` beside it")
    values = fields[field] if isinstance(fields[field], list) else [fields[field]]
    return tuple(find_image(value, source, field, root, beside) for value in values)


def find_image(value: object, source: str, field: str, root: Path, beside: Path | None) -> str | bytes:
    """One image as a path below `root` or as encoded bytes."""
    image = resolve_image(value, field, root, confined=True, beside=beside)
    if isinstance(image, bytes) or Path(image).is_file():
        return image
    shorter = root.joinpath(*Path(image).relative_to(root.resolve()).parts[1:])
    if not shorter.is_file():
        raise MissingImage(source, field, f"{image}: no such image file")
    return str(shorter)
