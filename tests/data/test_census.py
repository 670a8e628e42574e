"""What is said of records before they are used: pictures by file, fields that were read and fields that were not."""

from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from mmrm_fast.data import census
from mmrm_fast.data.census import Kind, counted, peek, told
from mmrm_fast.data.records import RecordError, Records, iter_groups

PLAIN = {"prompt": "What?", "chosen": "a", "rejected": "b"}
RATED = {"prompt": "What?", "responses": ["a", "b"], "scores": [1, 2]}
RECORDS = {  # a record: its fields that are read, and that are not
    "pairwise": (PLAIN, "prompt chosen rejected", ""),
    "with its id and source": ({"id": "7", **PLAIN, "source": "web"}, "id prompt chosen rejected", "source"),
    "fields of another layout": ({**PLAIN, "text": "cat", "scores": [1]}, "prompt chosen rejected", "text scores"),
    "rated, with a margin": ({**RATED, "margin": 1}, "prompt responses scores", "margin"),
    "two prompts": ({"question": "Who?", **PLAIN}, "prompt chosen rejected", "question"),
    "RLHF-V": (
        {"text": '{"question": "q", "chosen": "a", "rejected": "b"}', "image": "a.png", "ds_name": "x"},
        "text image", "ds_name"),
    "keys inside": (
        {**PLAIN, "prompt": [{"role": "user", "content": "q", "weight": 1, "id": None}]}, "prompt chosen rejected",
        "prompt[].weight"),
    "completions": (
        {"prompt": "q", "completions": [{"annotations": {}, "response": "a", "model": "m"}] * 2}, "prompt completions",
        "completions[].model"),
    "a null": ({**PLAIN, "margin": None, "source": None}, "prompt chosen rejected", ""),
    "a picture": ({**PLAIN, "images": ["a.png"], "labels": [1]}, "prompt chosen rejected images", "labels"),
}  # fmt: skip


def records_of(write_jsonl, *files):
    return Records(*(write_jsonl(records, f"{number}.jsonl") for number, records in enumerate(files)))


@pytest.mark.parametrize("kind", RECORDS)
def test_a_field_is_read_or_not_by_what_the_layout_asks_for(write_jsonl, kind):
    fields, read, unread = RECORDS[kind]
    group = records_of(write_jsonl, [fields]).group(0)
    assert (set(group.read), set(group.unread)) == (set(read.split()), set(unread.split()))
    assert Kind.of(group).pictured == bool({"image", "images"} & fields.keys())


def test_columns_that_stay_in_the_file_are_not_read(tmp_path):
    parquet.write_table(
        pyarrow.Table.from_pylist([{**PLAIN, "embedding": [0.5], "source": "x"}]), tmp_path / "a.parquet"
    )
    assert Records(tmp_path / "a.parquet").group(0).unread == ("embedding", "source")


def test_a_file_has_a_line_with_its_pictures_and_fields(write_jsonl):
    pictured = {**PLAIN, "images": ["a.png"]}
    first = [pictured, pictured, {**PLAIN, "source": "web"}, "{broken", {**PLAIN, "videos": ["a.mp4"]}]
    records = records_of(write_jsonl, first, [PLAIN])
    one, two = told(records, counted(map(Kind.of, iter_groups(records))))
    path = str(records.files[0].path)
    assert one == (
        f"{path}: 5 records, 2 with pictures, 1 without, 2 that cannot be used; "
        "read: chosen, prompt, rejected, images (2); not read: source (1)"
    )
    assert two.endswith("1.jsonl: 1 records, 0 with pictures, 1 without; read: chosen, prompt, rejected")


def test_no_more_than_so_many_records_are_looked_at_and_that_is_said(write_jsonl, monkeypatch):
    monkeypatch.setattr(census, "PEEKED", 6)
    monkeypatch.setattr(census, "MAX_FILES", 2)
    records = records_of(write_jsonl, [PLAIN] * 9, [PLAIN] * 2, [PLAIN] * 4, [PLAIN] * 4)
    lines = list(told(records, peek(records)))
    assert [line.partition(": ")[2].partition(" with")[0] for line in lines] == [
        "9 records, 3 looked at, 0", "2 records, 0", "8 records, 0 looked at",
    ]  # fmt: skip
    assert lines[-1].startswith("2 more files: ")


def test_fields_without_end_are_counted_together(monkeypatch):
    monkeypatch.setattr(census, "MAX_KINDS", 3)
    kinds = [Kind("f", False, ("prompt",), (f"field {number}",)) for number in range(10)]
    counts = counted(kinds)
    assert len(counts) == 4 and counts[Kind("f", False, ("prompt",), ("...",))] == 7
    assert counted(kinds, Counter(counts)).total() == 20


def test_a_record_that_cannot_be_read_is_of_its_file():
    for source in ("a:b.jsonl:3", "a:b.jsonl[3]"):
        assert Kind.of(RecordError(source, "", "")) == Kind("a:b.jsonl", None)
