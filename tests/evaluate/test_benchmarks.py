"""Benchmarks as published, in every file format and with every kind of image, become items with the right label."""

import base64
import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from mmrm_fast.data.types import Pairs
from mmrm_fast.evaluate.benchmarks import Item, MissingImage, Unread, read_items

VL_FILE = {  # (query_source, id, image folder): items, as counted in the published file
    ("LRVInstruction", "LRVInstruction-{}", "vlfeedback"): 60,
    ("wildvision-battle", "wildvision-battle-{}", "wildvision-battle"): 123,
    ("POVID_preference_data_for_VLLMs", "hallucination_pair-{}", "povid"): 402,
    ("COCO", "RLHF-V-{}", "rlhf-v"): 114,
    ("OK-VQA", "RLAIF-V-{}", "rlaif-v"): 233,
    (None, "mathverse_{}", "reasoning_tasks"): 200,
    (None, "mmmu_pro_test_Art_{}", "reasoning_tasks"): 118,
}


def vl_item(number=0, source="COCO", identity="RLAIF-V-{}", ranking=(0, 1), **fields):
    return {
        "id": identity.format(number), "query": "What is this?", "response": ["A cat.", "A dog."],
        "human_ranking": list(ranking), "query_source": source, **fields,
    }  # fmt: skip


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(bench, path, images=None):
    return list(read_items(bench, path, [str(images)] if images else []))


@pytest.fixture
def picture(pictures):
    return Path(pictures["square"])


def test_vl_rewardbench_has_its_groups_and_its_overlap_with_training_sets(tmp_path, picture):
    rows, images = [], tmp_path / "images"
    for (source, identity, folder), count in VL_FILE.items():
        (images / folder).mkdir(parents=True, exist_ok=True)
        (images / folder / "one.png").write_bytes(picture.read_bytes())
        rows += [vl_item(i, source, identity, image_path=f"images/{folder}/one.png") for i in range(count)]
    items = read("vl-rewardbench", write_json_lines(tmp_path / "data.jsonl", rows), images)
    assert all(isinstance(item, Item) for item in items)
    assert Counter(item.group for item in items) == {"general": 183, "hallucination": 749, "reasoning": 318}
    assert sum(item.in_training_set for item in items) == 516


@pytest.mark.parametrize(
    ("source", "group", "overlap"),
    [
        ("WildVision", "general", False), ("VLFeedback", "general", False), ("POVID", "hallucination", True),
        ("RLHF-V", "hallucination", True), ("rlhf_v", "hallucination", True), ("RLAIF-V", "hallucination", False),
        ("MathVerse", "reasoning", False), ("MMMU-Pro", "reasoning", False),
    ],
)  # fmt: skip
def test_a_source_is_recognised_by_the_name_of_the_data_card(tmp_path, picture, source, group, overlap):
    row = vl_item(source=source, identity="{}", image=picture.name)
    (item,) = read("vl-rewardbench", write_json_lines(tmp_path / "data.jsonl", [row]))
    assert (item.group, item.in_training_set) == (group, overlap)


@pytest.mark.parametrize(("ranking", "chosen"), [((0, 1), 0), ((1, 0), 1)])
def test_the_response_of_rank_0_is_the_better_one(tmp_path, picture, ranking, chosen):
    path = write_json_lines(tmp_path / "data.jsonl", [vl_item(ranking=ranking, image=picture.name)])
    (item,) = read("vl-rewardbench", path)
    assert item.record.pairs == Pairs.of((chosen, 1 - chosen))
    assert item.record.responses == ("A cat.", "A dog.")


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *itertools.product(["parquet", "jsonl", "json", "csv"], ["name", "data URL"]),
        *itertools.product(["parquet"], ["bytes", "object with bytes", "object with a path"]),
    ],
)
def test_an_image_comes_as_a_name_a_url_or_bytes_in_any_format(tmp_path, picture, kind, suffix):
    content = picture.read_bytes()
    value = {
        "name": picture.name,
        "data URL": "data:image/png;base64," + base64.b64encode(content).decode(),
        "bytes": content,
        "object with bytes": {"bytes": content, "path": None},
        "object with a path": {"bytes": None, "path": picture.name},
    }[kind]
    row = {
        "ID": "a", "Text": "What?", "Image": value, "Output1": "A cat.", "Output2": "A dog.", "Better": "Output2",
        "Category": "vqa",
    }  # fmt: skip
    path = tmp_path / f"all_data.{suffix}"
    if suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif suffix == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
    else:
        path.write_text(json.dumps([row]) if suffix == "json" else json.dumps(row) + "\n")
    (item,) = read("multimodal-rewardbench", path, picture.parent)
    (image,) = item.record.images
    assert (image if isinstance(image, bytes) else Path(image).read_bytes()) == content
    assert item.record.pairs == Pairs.of((1, 0))


def test_multimodal_rewardbench_splits_safety_and_reasoning_by_the_id(tmp_path, picture):
    row = {"Text": "What?", "Image": picture.name, "Output1": "A", "Output2": "B", "Better": "Output1"}
    cases = {
        ("PAIRS-1", "safety"): "safety/bias",
        ("hateful-2", "safety"): "safety/toxicity",
        ("mathvista-3", "reasoning"): "reasoning/math",
        ("emma-coding-4", "reasoning"): "reasoning/coding",
        ("math-5", "vqa"): None,
    }
    rows = [{**row, "ID": identity, "Category": category} for identity, category in cases]
    path = tmp_path / "all_data.json"
    path.write_text(json.dumps(rows))
    items = read("multimodal-rewardbench", path)
    assert [item.subgroup for item in items] == list(cases.values())
    assert [item.group for item in items] == [category for _, category in cases]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_changes_no_count(tmp_path, picture, encoding):
    cases = {"pairs-1": "safety", "toxic-2": "safety", "math-3": "reasoning", "code-4": "reasoning", "": "vqa"}
    with open(tmp_path / "all.csv", "w", newline="", encoding=encoding) as file:
        rows = csv.writer(file)
        rows.writerow(["ID", "Text", "Image", "Output1", "Output2", "Better", "Category"])
        rows.writerows([identity, "What?", picture.name, "A", "B", "Output2", own] for identity, own in cases.items())
    items = read("multimodal-rewardbench", tmp_path / "all.csv", picture.parent)
    parts = ["safety/bias", "safety/toxicity", "reasoning/math", "reasoning/coding", None]
    assert [(item.id, item.subgroup) for item in items] == list(
        zip(["pairs-1", "toxic-2", "math-3", "code-4", "4"], parts, strict=True)
    )


@pytest.mark.parametrize("bench", ["mm-rlhf-rewardbench", "rewardbench", "pairs"])
def test_items_without_an_id_have_one_each(tmp_path, picture, bench):
    row = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No.", "image": picture.name}
    path = write_json_lines(tmp_path / "data.jsonl", [{**row, "id": None}, row, {**row, "id": 7}])
    assert [item.id for item in read(bench, path, picture.parent)] == ["0", "1", "7"]


def test_rewardbench_is_text_and_grouped_by_subset(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    go, stop = ([{"role": "assistant", "content": text}] for text in ("Go.", "Stop."))
    rows = [
        {"id": 7, "subset": "donotanswer", "prompt": "Hi", "chosen": "No.", "rejected": "Yes."},
        {"id": 8, "subset": "hep-go", "prompt": messages, "chosen": go, "rejected": stop},
    ]
    items = read("rewardbench", write_json_lines(tmp_path / "filtered.jsonl", rows))
    assert [(item.id, item.group, item.record.responses, item.record.images) for item in items] == [
        ("7", "donotanswer", ("No.", "Yes."), ()),
        ("8", "hep-go", ("Go.", "Stop."), ()),
    ]


def test_pairs_takes_any_preference_record(tmp_path):
    ratings = [{"Helpfulness": {"Rating": rating}} for rating in ("4", "2", "1")]
    rows = [
        {"prompt": "What?", "chosen": "A", "rejected": "B"},
        {"prompt": "What?", "completions": {"annotations": ratings, "response": ["A", "B", "C"]}},
    ]
    items = read("pairs", write_json_lines(tmp_path / "pairs.jsonl", rows))
    assert [len(item.record.pairs) for item in items] == [1, 3]


def test_a_missing_image_of_a_preference_file_is_one_too(tmp_path):
    row = {"id": "x", "prompt": "What?", "img_path": "absent.png", "chosen": "A", "rejected": "B"}
    (item,) = read("pairs", write_json_lines(tmp_path / "pairs.jsonl", [row]))
    assert isinstance(item.error, MissingImage) and item.id == "x"


def test_a_missing_image_is_an_unread_item_of_its_group(tmp_path):
    rows = [vl_item(image="absent.png"), vl_item(image=None)]
    absent, none = read("vl-rewardbench", write_json_lines(tmp_path / "data.jsonl", rows))
    for item in (absent, none):
        assert isinstance(item, Unread) and isinstance(item.error, MissingImage)
        assert item.group == "hallucination"
    assert "absent.png" in str(absent.error)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"human_ranking": [0, 0]}, "human_ranking"),
        ({"query_source": "nowhere", "id": "x"}, "query_source"),
        ({"response": ["only one"]}, "response"),
        ({"query": None}, "query"),
        ({"image": "../../outside.png"}, "image"),
    ],
)
def test_what_is_wrong_is_named_by_the_field_of_the_layout(tmp_path, picture, fields, field):
    path = write_json_lines(tmp_path / "data.jsonl", [{**vl_item(image=picture.name), **fields}])
    (item,) = read("vl-rewardbench", path)
    assert item.error.field == field
    assert item.error.source.endswith("data.jsonl:1")


def test_of_a_folder_with_splits_the_tested_one_is_read(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    row = {"prompt": "Hi", "rejected": "Yes.", "subset": "donotanswer"}
    for name in ("raw", "filtered"):
        write_json_lines(tmp_path / "data" / f"{name}-00000.jsonl", [{**row, "id": name, "chosen": "No."}])
    assert [item.id for item in read("rewardbench", tmp_path)] == ["filtered"]
    assert [item.id for item in read("pairs", tmp_path)] == ["filtered"]
    said = "filtered-00000.jsonl; left, of other splits: raw-00000.jsonl"
    assert capsys.readouterr().out.count(said) == 2


@pytest.mark.parametrize("name", ["absent.jsonl", "empty"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=name):
        read("rewardbench", tmp_path / name)


def test_a_file_of_any_other_name_is_json_lines(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (item,) = read("rewardbench", tmp_path / "notes.txt")
    assert str(item.error).startswith(f"{tmp_path / 'notes.txt'}:1: not valid JSON")
