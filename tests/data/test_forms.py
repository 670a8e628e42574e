"""Published layouts to one: who holds the prompt, which replies, which pairs; any JSON is a group or a named error."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrm_fast.data.forms import FORM_FIELDS
from mmrm_fast.data.records import FIELDS, parse_group
from mmrm_fast.data.types import Group, Message, Pairs, RecordError, prompt_json

USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "c"}, {"role": "assistant", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}
EARLIER = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]


def parse(fields) -> Group:
    return parse_group(fields, source="file.jsonl:1")


def turns(*pairs):
    return tuple(Message(role, content) for role, content in pairs)


MULTI_TURN = turns(("user", "q0"), ("assistant", "a0"), ("user", "q"))
PAIRWISE = {
    "strings": ({"prompt": "q", "chosen": "c", "rejected": "r"}, "q"),
    "RLAIF-V's question": ({"question": "q", "chosen": "c", "rejected": "r"}, "q"),
    "RLHF-V's text": ({"text": json.dumps({"question": "q", "chosen": "c", "rejected": "r"})}, "q"),
    "text as an object": ({"text": {"question": "q", "chosen": "c", "rejected": "r"}}, "q"),
    "POVID": (
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "c"}],
            "rejected_conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}],
        },
        "q",
    ),
    "TRL, prompt in the replies": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "q"),
    "TRL, prompt outside": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "q"),
    "prompt outside as well, as text": ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "q"),
    "prompt outside as well, as messages": ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "q"),
    "rejected as text": ({"chosen": [USER, GOOD], "rejected": "r"}, "q"),
    "ms-swift": ({"messages": [USER, GOOD], "rejected_response": "r"}, "q"),
    "ms-swift's rejected messages": ({"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, "q"),
    "several turns": ({"prompt": [*EARLIER, USER], "chosen": "c", "rejected": "r"}, MULTI_TURN),
    "several turns in the replies": (
        {"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}, MULTI_TURN),
    "first turn outside as well": (
        {"prompt": "q0", "chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}, MULTI_TURN),
    "a system prompt": (
        {"prompt": [SYSTEM, USER], "chosen": "c", "rejected": "r"}, turns(("system", "s"), ("user", "q"))),
}  # fmt: skip


@pytest.mark.parametrize("layout", PAIRWISE)
def test_every_pairwise_layout_is_a_prompt_with_a_chosen_and_a_rejected_response(layout):
    fields, prompt = PAIRWISE[layout]
    group = parse(fields)
    assert (group.prompt, group.responses, group.pairs) == (prompt, ("c", "r"), Pairs.of((0, 1)))


def test_scores_rank_responses():
    group = parse({"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [1, 3.5, "N/A", 1]})
    assert [(pair.chosen, pair.rejected) for pair in group.pairs] == [(1, 0), (1, 3)]
    assert group.num_unrated == 1


def test_responses_may_be_messages():
    assert parse({"prompt": [USER], "responses": ["a", GOOD, [BAD]]}).responses == ("a", "c", "r")


def test_text_beside_responses_is_not_read():
    assert parse({"prompt": "q", "responses": ["a"], "text": "a caption"}).responses == ("a",)


def test_a_prompt_is_written_as_it_was_read():
    assert prompt_json(parse({"prompt": [SYSTEM, USER], "responses": ["a"]}).prompt) == [SYSTEM, USER]
    assert prompt_json(parse({"prompt": "q", "responses": ["a"]}).prompt) == "q"


# parts


def parts(*items):
    return {"prompt": [{"role": "user", "content": list(items)}], "responses": ["a"]}


def text_part(text):
    return {"type": "text", "text": text}


def test_an_image_part_is_a_slot_on_its_own_line():
    group = parse(
        parts(
            text_part("Compare "),
            {"type": "image", "image": "a.png"},
            text_part("with "),
            {"type": "image_url", "image_url": {"url": "file:///b.png"}},
            text_part("now"),
        )
    )
    assert group.prompt == "Compare <image>\nwith <image>\nnow"
    assert group.images == ("a.png", "/b.png")
    assert group.img_path == ["a.png", "file:///b.png"]


def test_an_image_part_without_a_source_stands_for_one_of_images():
    group = parse({**parts({"type": "image"}, text_part("q")), "images": ["a.png"]})
    assert (group.prompt, group.images) == ("<image>\nq", ("a.png",))


def test_parts_as_parquet_has_them_with_nulls():
    group = parse({**parts({"type": "image", "text": None}, {"type": "text", "text": "q"}), "images": ["a.png"]})
    assert group.prompt == "<image>\nq"


MALFORMED = {
    "a reply that ends with the user": (
        {"chosen": [GOOD, USER], "rejected": "r"}, "chosen", "must end with the assistant's message"),
    "different conversations": (
        {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "rejected", "differs from chosen before its"),
    "another prompt outside": (
        {"prompt": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt", "is not the one inside"),
    "no prompt anywhere": ({"chosen": [GOOD], "rejected": [BAD]}, "prompt", "missing"),
    "a prompt that ends with the assistant": ({"prompt": EARLIER, "responses": ["a"]}, "prompt", "must be the user's"),
    "a system message in the middle": ({"prompt": [USER, SYSTEM, USER], "responses": ["a"]}, "prompt", "only the"),
    "an unknown role": (
        {"prompt": [{"role": "judge", "content": "x"}], "responses": ["a"]}, "prompt[0].role", "expected system, user"),
    "no role": ({"prompt": [{"content": "x"}], "responses": ["a"]}, "prompt[0].from", "expected system"),
    "no content": ({"prompt": [{"role": "user"}], "responses": ["a"]}, "prompt[0].content", "got null"),
    "a message that is text": ({"prompt": ["x"], "responses": ["a"]}, "prompt[0]", "expected a message"),
    "no messages": ({"prompt": [], "responses": ["a"]}, "prompt", "got an empty list"),
    "an unknown part": (parts({"type": "video"}), "prompt[0].content[0]", "text, image or image_url"),
    "a part that is text": (parts("x"), "prompt[0].content[0]", "text, image or image_url"),
    "a part without text": (parts({"type": "text"}), "prompt[0].content[0].text", "got null"),
    "an image URL without one": (
        parts({"type": "image_url", "image_url": {}}), "prompt[0].content[0].image_url", "missing its url"),
    "an image in a reply": (
        {"prompt": "q", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": "r"},
        "chosen[0].content[0]", "expected a part of type text"),
    "images in two places": (
        {**parts({"type": "image", "image": "a.png"}), "images": ["b.png"]}, "images", "in the messages as well"),
    "a conversation as a response": ({"prompt": "q", "responses": [[USER, GOOD]]}, "responses[0]", "message alone"),
    "scores of the wrong length": ({"prompt": "q", "responses": ["a"], "scores": [1, 2]}, "scores", "a list of 1"),
    "text that is not JSON": ({"text": "a plain text"}, "text", "expected a JSON string with question"),
    "text that is a list": ({"text": "[1]"}, "text", "got a list"),
    "text without a rejected": ({"text": '{"question": "q", "chosen": "c"}'}, "rejected", "missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_layout_is_an_error_naming_the_field(kind):
    fields, field, reason = MALFORMED[kind]
    with pytest.raises(RecordError) as caught:
        parse(fields)
    assert caught.value.field == field
    assert reason in caught.value.reason


# any JSON

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("data:image/png;base64,AA")
)
INNER = [
    "role",
    "content",
    "from",
    "value",
    "type",
    "image_url",
    "url",
    "bytes",
    "path",
    "annotations",
    "response",
    "Rating",
]
NAMES = st.sampled_from([*sorted(FIELDS), *INNER])
WORDS = st.sampled_from(["user", "assistant", "system", "human", "gpt", "text", "image", "image_url", "{}", "[]"])
MESSAGE = st.fixed_dictionaries({"role": WORDS, "content": LEAVES | WORDS | st.lists(st.dictionaries(NAMES, WORDS))})
ANY = st.recursive(
    LEAVES | WORDS | st.binary(max_size=4) | st.lists(MESSAGE, max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANY | st.dictionaries(st.sampled_from(sorted(FIELDS)), ANY, max_size=6))
def test_any_value_is_a_group_or_a_record_error(fields):
    try:
        group = parse(fields)
    except RecordError as error:
        assert error.source == "file.jsonl:1"
    else:
        assert all(isinstance(response, str) for response in group.responses)
        assert all({pair.chosen, pair.rejected} <= set(range(len(group.responses))) for pair in group.pairs)
        assert all(isinstance(image, (str, bytes)) for image in group.images)
        json.dumps([group.img_path, prompt_json(group.prompt)])


def test_every_field_of_a_layout_is_read_from_parquet():
    assert FORM_FIELDS < FIELDS
