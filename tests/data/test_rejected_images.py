"""The two replies of a pair to different pictures: one record, one sample, what they have in common computed once."""

import shutil

import pytest
from pyarrow import parquet

from mmrm_fast.config import ScoreConfig
from mmrm_fast.data.packing import pack_items
from mmrm_fast.data.records import RecordError, Records, iter_groups, parse_group
from mmrm_fast.data.samples import Preparer
from mmrm_fast.score.command import rows_of
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.shards import PAIRS, Shards
from mmrm_fast.train.command import train

PAIR = {"prompt": "What is it?", "chosen": "A square.", "rejected": "A circle."}
TURNS = [{"role": "user", "content": "What is it?"}]


def reply(text):
    return [{"role": "assistant", "content": text}]


def parse(**fields):
    return parse_group(fields, source="here")


def with_part(path, text):
    return [{"role": "user", "content": [{"type": "image", "image": path}]}, *reply(text)]


SWIFT = {"messages": TURNS + reply("A square."), "images": ["a.png"], "rejected_images": ["b.png"]}
FORMS = {  # record: pictures of the chosen and of the rejected reply
    "TRL": ({**PAIR, "images": ["a.png"], "rejected_images": ["b.png"]}, "a", "b"),
    "one each, no list": ({**PAIR, "image": "a.png", "rejected_images": "b.png"}, "a", "b"),
    "two and one": ({**PAIR, "images": ["a.png", "b.png"], "rejected_images": ["b.png"]}, "ab", "b"),
    "none and one": ({**PAIR, "rejected_images": ["b.png"]}, "", "b"),
    "one and none": ({**PAIR, "images": ["a.png"], "rejected_images": []}, "a", ""),
    "twice the same": ({**PAIR, "images": ["a.png"], "rejected_images": ["b.png", "b.png"]}, "a", "bb"),
    "ms-swift, the pictures alone": (SWIFT, "a", "b"),
    "ms-swift, a reply": ({**SWIFT, "rejected_response": "A circle."}, "a", "b"),
    "ms-swift, messages": ({**SWIFT, "rejected_messages": TURNS + reply("A circle.")}, "a", "b"),
    "in the messages": (
        {"chosen": with_part("a.png", "A square."), "rejected": with_part("b.png", "A circle.")},
        "a",
        "b",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_reply_has_its_own_pictures(form):
    fields, *letters = FORMS[form]
    group = parse(**fields)
    names = [tuple(group.images[place] for place in own) for own in group.seen]
    assert names == [tuple(f"{letter}.png" for letter in own) for own in letters]
    assert len(set(group.images)) == len(group.images) and len(group.responses) == 2


@pytest.mark.parametrize("others", [None, ["a.png"], "a.png"])
def test_equal_pictures_are_those_of_the_record(others):
    group = parse(**PAIR, images=["a.png"], rejected_images=others)
    assert (group.images, group.seen) == (("a.png",), None)


WRONG = {
    "rejected_images": {"prompt": "?", "responses": ["a", "b"], "rejected_images": ["b.png"]},
    "rejected_images ": {"prompt": "?", "responses": ["a", "b"], "scores": [1, 2], "rejected_images": ["b.png"]},
    "rejected_images  ": {**FORMS["in the messages"][0], "rejected_images": ["b.png"]},
    "prompt": {"prompt": with_part("c.png", "")[:1], **FORMS["in the messages"][0]},
    "rejected_image": {**PAIR, "rejected_image": "b.png"},
}


@pytest.mark.parametrize("field", WRONG)
def test_what_they_would_belong_to_is_said(field):
    with pytest.raises(RecordError) as caught:
        parse(**WRONG[field])
    assert caught.value.field == field.strip()


@pytest.fixture
def preparer(make_checkpoint):
    checkpoint = make_checkpoint()
    return Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, pairs="all")


def packed(preparer, fields):
    return pack_items(preparer, [parse(**fields)], preparer.whole).batch


def test_what_the_two_have_in_common_is_computed_once(preparer, pictures, tmp_path):
    wide, photo, copy = pictures["wide"], pictures["photo"], tmp_path / "copy.png"
    shutil.copy(wide, copy)
    system = {"system": "You look at pictures and say what is in them, and nothing else at all." * 2}
    alone = packed(preparer, {**PAIR, **system, "images": [wide]})
    same = packed(preparer, {**PAIR, **system, "images": [wide], "rejected_images": [str(copy)]})
    assert len(same.main.source_T) == len(alone.main.source_T) and len(same.tiles) == len(alone.tiles)
    second = packed(preparer, {**PAIR, **system, "images": [wide, photo], "rejected_images": [str(copy), wide]})
    tokens = len(preparer.sample(parse(**PAIR, **system, images=[wide, photo])).main.sequences[0])
    assert len(second.tiles) == 3 + 7
    assert len(second.main.source_T) < second.main.num_tokens_unshared and len(second.main.source_T) > tokens


def test_a_slot_each_is_asked_of_both_sides(preparer, pictures):
    fields = {**PAIR, "prompt": "<image> What?", "images": [pictures["wide"]], "rejected_images": []}
    with pytest.raises(RecordError, match="has 1 <image> for 0 images"):
        preparer.sample(parse(**fields))


def test_rewards_are_those_of_two_records(scorer, pictures):
    fields = {**PAIR, "images": [pictures["wide"]], "rejected_images": [pictures["photo"], pictures["tall"]]}
    (both,) = scorer.score_groups([parse(**fields)])
    alone = [
        {"prompt": PAIR["prompt"], "images": fields[images], "responses": [PAIR[side]]}
        for side, images in (("chosen", "images"), ("rejected", "rejected_images"))
    ]
    assert both.rewards == pytest.approx([own for (own,) in scorer.score(alone)], abs=1e-5)


@pytest.mark.parametrize("rewards", [(2.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("others", [["b.png"], []])
def test_scores_say_which_pictures_and_pairs_of_them_are_read_again(tmp_path, rewards, kind, others):
    group = parse(**PAIR, image="a.png", rejected_images=others)
    scored = Scored(group, rewards, (False, False))
    assert [row["img_path"] for row in rows_of(scored, ScoreConfig())] == ["a.png", others]
    shards = Shards(tmp_path / "out", kind, 1, PAIRS)
    shards.open({})
    shards.write(0, rows_of(scored, ScoreConfig(to_pairs=0.0)), {})
    (again,) = iter_groups(Records(tmp_path / "out", image_root="."))
    best = 0 if rewards[0] > rewards[1] else 1
    assert again.responses == (group.responses[best], group.responses[1 - best])
    names = [[again.images[place] for place in own] for own in again.seen]
    assert names == [["a.png"], others][:: 1 if best == 0 else -1]
    assert kind == "jsonl" or parquet.read_schema(shards.shard(0)).field("rejected_images").type.value_type == "string"


def test_training_and_its_evaluation_see_them(make_config, pictures, write_jsonl):
    pair = {**PAIR, "rejected": PAIR["chosen"]}  # the pictures alone differ
    rows = [{**pair, "images": [pictures["wide"]], "rejected_images": [pictures[name]]} for name in ("photo", "tall")]
    data = str(write_jsonl(rows, "pictures.jsonl"))
    run = train(make_config("run", data=(data,), eval=(f"same={data}",), robust=True, epochs=4))
    assert '"margin": 0.0' not in (run / "eval-same.jsonl").read_text()
