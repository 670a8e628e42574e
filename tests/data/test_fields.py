"""Nothing of a record is dropped in silence: fields are read, are about the record, or are refused by their name."""

import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mmrm_fast.data.fields import MEANING
from mmrm_fast.data.forms import FORM_FIELDS
from mmrm_fast.data.messages import MESSAGE_EXTRAS
from mmrm_fast.data.records import Records, parse_group
from mmrm_fast.data.types import Message, RecordError

PLAIN = {"prompt": "What is it?", "chosen": "A red thing.", "rejected": "A blue thing."}
TURN = {"role": "user", "content": "q"}
PICTURES = ("image_file", "image_paths", "img", "image_url", "Image", "img_paths", "image_name", "photo", "IMAGES")
CONVERSATION = [{"from": "human", "value": "q"}]


def parse(fields, **options):
    return parse_group(fields, source="file.jsonl:1", **options)


def refused(fields, name):
    with pytest.raises(RecordError, match=r"is not read here and may change|is not read in a part") as caught:
        parse(fields)
    assert caught.value.field == name


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("value", ["a.png", ["a.png"], {"bytes": None, "path": "a.png"}, "data:image/png;base64,A"])
def test_a_picture_under_another_name_is_refused(name, value):
    refused({**PLAIN, name: value}, name)


def test_bytes_and_conversations_are_refused_whatever_their_name():
    refused({**PLAIN, "blob": b"\x89PNG"}, "blob")
    refused({**PLAIN, "dialogue": CONVERSATION}, "dialogue")


@pytest.mark.parametrize("name", sorted(MEANING - {"images"}))
def test_a_field_that_changes_what_is_said_is_refused_in_records_and_messages(name):
    if name not in FORM_FIELDS:
        refused({**PLAIN, name: "x"}, name)
    if name not in MESSAGE_EXTRAS:
        refused({**PLAIN, "prompt": [{**TURN, name: "x"}]}, f"prompt[0].{name}")
    assert parse({**PLAIN, name: None}) == parse(PLAIN)


@pytest.mark.parametrize("name", ["url", "path", "image", "image_url", "anything"])
def test_a_text_part_says_its_text_alone(name):
    part = {"type": "text", "text": "q"}
    refused({**PLAIN, "prompt": [{"role": "user", "content": [{**part, name: "x"}]}]}, f"prompt[0].content[0].{name}")
    assert parse({**PLAIN, "prompt": [{"role": "user", "content": [{**part, name: None}]}]}).prompt == "q"


METADATA = {
    "id": 3, "idx": "a", "source": "coco", "image_id": 12, "image_source": "COCO_train_17", "img_width": 640,
    "num_images": 1, "score_chosen": 0.5, "labels": ["good"], "embedding": [0.1, 0.2], "meta": {"lang": "en"},
    "ds_name": "x", "models": [],
}  # fmt: skip


def test_what_is_about_a_record_passes():
    assert parse({**PLAIN, **METADATA}).responses == parse(PLAIN).responses


def test_ignored_names_are_dropped_though_they_are_read_elsewhere():
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields = {**PLAIN, "image": "a.png", "rejected_images": ["b.png"], "tools": tools, "system": "Be brief."}
    group = parse(fields, ignored=("rejected_images", "tools", "system"))
    assert (group.images, group.seen, group.tools, group.prompt) == (("a.png",), None, (), PLAIN["prompt"])
    assert {"rejected_images", "tools", "system"} <= {*group.unread}


def test_ignored_names_are_dropped_at_every_level():
    fields = {**PLAIN, "videos": ["a.mp4"], "prompt": [{"role": "user", "content": "q", "name": "n"}]}
    assert parse(fields, ignored=("videos", "name")).prompt == "q"


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)
KNOWN = {
    "record": {*PLAIN, "margin", "text", "system", "history", "completions", "conversations", "messages", "truth"},
    "message": {"role", "content", "from", "value", *MESSAGE_EXTRAS},
    "part": {"type", "text", "detail", "cache_control"},
}


@given(name=st.text(min_size=1), value=json_values, level=st.sampled_from(("record", "message", "part")))
def test_a_field_of_any_name_is_named_or_says_nothing(name, value, level):
    if name in KNOWN[level]:
        return
    extra = {here: {name: value} if here == level else {} for here in KNOWN}
    part = {"type": "text", "text": "q", **extra["part"]}
    fields = {**PLAIN, "prompt": [{"role": "user", "content": [part], **extra["message"]}], **extra["record"]}
    try:
        group = parse(fields)
    except RecordError as error:
        assert name in error.field
    else:
        assert group.prompt == "q" and (level != "part" or value in (None, "", []))
        told = {"record": name, "message": f"prompt[].{name}"}.get(level)
        assert told in (*group.read, *group.unread) or value in (None, "", []) or level == "part"


# better than refusing


def test_a_system_column_and_a_history_are_turns():
    group = parse({**PLAIN, "system": "Answer in one word.", "history": [["a", "b"], ["c", "d"]]})
    said = [("system", "Answer in one word."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert group.prompt == tuple(Message(*turn) for turn in [*said, ("user", "What is it?")])
    with pytest.raises(RecordError, match="system: the conversation has a system turn of its own"):
        parse({**PLAIN, "system": "s", "prompt": [{"role": "system", "content": "t"}, TURN]})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "red.png"},
        {"type": "image", "path": "red.png"},
        {"type": "image", "url": "red.png"},
        {"type": "image_url", "image_url": {"url": "red.png"}},
        {"type": "image_url", "image_url": {"path": "red.png"}},
        {"type": "image_url", "image_url": "red.png"},
    ],
    ids=str,
)  # fmt: skip
def test_an_image_part_has_its_picture_under_any_of_its_names(part):
    fields = {**PLAIN, "prompt": [{"role": "user", "content": [part, {"type": "text", "text": "q"}]}]}
    assert parse(fields).images == ("red.png",)
    with pytest.raises(RecordError, match="there are images in the messages as well"):
        parse({**fields, "images": ["blue.png"]})


def test_an_image_part_in_base64_is_its_bytes():
    part = {"type": "image", "base64": "iVBORw0K"}
    assert parse({**PLAIN, "prompt": [{"role": "user", "content": [part]}]}).images == (b"\x89PNG\r\n",)


def test_a_picture_named_twice_in_a_part_is_refused():
    part = {"type": "image", "url": "a.png", "path": "b.png"}
    with pytest.raises(RecordError, match="has its picture twice, as url and path"):
        parse({**PLAIN, "prompt": [{"role": "user", "content": [part]}]})


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>Name the colour."}, {"from": "gpt", "value": "Red."},
        {"from": "human", "value": "And the shape?"},
    ],
    "images": ["red.png"],
}  # fmt: skip
AS_REPLY = {
    "text": str,
    "a turn": lambda text: {"from": "gpt", "value": text},
    "a list of one turn": lambda text: [{"role": "assistant", "content": text}],
}


@pytest.mark.parametrize("kind", AS_REPLY)
def test_a_sharegpt_preference_answers_its_conversation(kind):
    group = parse({**SHAREGPT, "chosen": AS_REPLY[kind]("A square."), "rejected": AS_REPLY[kind]("A circle.")})
    assert group.prompt[0] == Message("user", "<image>Name the colour.") and len(group.prompt) == 3
    assert (group.responses, group.images) == (("A square.", "A circle."), ("red.png",))


def test_replies_that_go_on_with_further_turns_are_refused():
    further = [{"from": "gpt", "value": "OK"}, {"from": "human", "value": "Again?"}, {"from": "gpt", "value": "Fine."}]
    with pytest.raises(RecordError, match="chosen: goes on with further turns behind `conversations`"):
        parse({**SHAREGPT, "chosen": further, "rejected": "No."})


def test_columns_of_other_layouts_that_are_null_are_not_there():
    others = ("completions", "conversations", "rejected_response", "text", "scores", "responses", "system")
    assert parse({**PLAIN, **dict.fromkeys(others)}).responses == parse(PLAIN).responses


def test_a_parquet_column_that_is_not_read_is_refused_by_name(tmp_path):
    rows = [{**PLAIN, "image_file": "red.png", "source": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(RecordError, match="image_file: is not read here"):
        Records(tmp_path / "a.parquet").group(0)
    assert Records(tmp_path / "a.parquet", ignored=["image_file"]).group(0).images == ()


def test_a_line_of_a_file_is_refused_by_file_line_and_field(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**PLAIN, "videos": ["a.mp4"]}))
    with pytest.raises(RecordError, match=r"a\.jsonl:1: videos: is not read here"):
        Records(tmp_path / "a.jsonl").group(0)
