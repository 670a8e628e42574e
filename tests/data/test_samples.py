"""Records to samples: only paired responses are encoded, overlong ones follow the policy, faults are found."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from mmrm_fast.data.samples import Preparer, only_paired
from mmrm_fast.data.types import Group, Pair, Pairs, RecordError
from mmrm_fast.train.margins import ProxyMargins

LONG = "I think so. " * 40


def group(*responses, pairs=(), truth=None, prompt="What?", images=()):
    return Group("file.jsonl:1", 0, None, prompt, None, tuple(images), responses, Pairs.of(*pairs), truth)


@pytest.fixture
def make_preparer(make_checkpoint):
    def make(*, max_length=100, pairs="all", **options):
        checkpoint = make_checkpoint(max_length=max_length)
        return Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, pairs=pairs, **options)

    return make


@pytest.fixture
def prepare(make_preparer):
    """The only sample of a group."""

    def run(group, **options):
        preparer = make_preparer(**options)
        (part,) = preparer.parts(group)
        return preparer.sample(part)

    return run


# only_paired


def test_responses_without_a_pair_are_left_out():
    kept = only_paired(group("a", "b", "c", "d", pairs=[Pair(3, 1, 0.5), Pair(1, 3)], truth=(0, 1, 2, 3)))
    assert kept.responses == ("b", "d")
    assert kept.pairs == Pairs.of((1, 0, 0.5), (0, 1))
    assert kept.truth == (1, 3)
    assert kept.places == (1, 3) and only_paired(replace(kept, pairs=Pairs.of((1, 1)))).places == (3,)


def test_a_group_whose_responses_are_all_paired_stays_as_it_is():
    whole = group("a", "b", "c", pairs=[Pair(0, 1), Pair(2, 1)])
    assert only_paired(whole) is whole


def test_a_group_without_pairs_keeps_no_response():
    assert only_paired(group("a", "b")).responses == ()


# samples


def test_scoring_encodes_every_response_and_training_only_the_paired(prepare):
    record = group("a", "b", "c", pairs=[Pair(0, 2)])
    assert len(prepare(record, pairs=None).main.sequences) == 3
    assert len(prepare(record).main.sequences) == 2


def test_loaded_tiles_are_those_that_were_counted(make_preparer, pictures):
    record = group("a", "b", images=[pictures["photo"], pictures["square"]])
    sample, tiles = make_preparer(max_length=512).whole(record)
    assert sample.tiles_per_image == (7, 1)
    assert [len(own) for own in tiles] == [7, 1]


def test_a_packed_sample_carries_no_pictures(make_preparer, pictures):
    content = Path(pictures["wide"]).read_bytes()
    sample, tiles = make_preparer().whole(group("a", "b", images=[content, pictures["square"]]))
    assert (sample.group.images, [len(own) for own in tiles]) == ((), [3, 1])
    assert len(pickle.dumps(sample)) < 5000


@pytest.mark.parametrize("prompt", ["What?", "<image>\nWhat?"])
def test_the_proxy_sees_the_same_record_without_its_image(prepare, pictures, prompt):
    pairs = [Pair(0, 1)]
    seeing = prepare(group("a", "b", pairs=pairs, prompt=prompt, images=[pictures["wide"]]), with_text=True)
    blind = prepare(group("a", "b", pairs=pairs))
    for text, main in zip(seeing.text.sequences, blind.main.sequences, strict=True):
        assert text.tolist() == main.tolist()


def test_removing_a_slot_makes_no_new_one(prepare, pictures):
    record = group("a", "b", pairs=[Pair(0, 1)], prompt="<ima<image>ge>", images=[pictures["wide"]])
    sample = prepare(record, with_text=True)
    assert all((sequence >= 0).all() for sequence in sample.text.sequences)


@pytest.mark.parametrize(
    ("prompt", "image", "field"),
    [("<image> and <image>", "square", "prompt"), (LONG, "square", "prompt"), ("What?", None, "img_path")],
    ids=["wrong slots", "prefix too long", "no such image"],
)
def test_a_group_that_cannot_be_encoded_is_an_error_naming_its_line_and_field(prepare, pictures, prompt, image, field):
    with pytest.raises(RecordError) as caught:
        prepare(group("a", prompt=prompt, images=[pictures.get(image, "/none.png")]))
    assert (caught.value.source, caught.value.field) == ("file.jsonl:1", field)


def test_a_white_proxy_sees_one_tile_in_place_of_each_image(prepare, pictures):
    record = group(
        "a", "b", pairs=[Pair(0, 1)], prompt="<image> or <image>?", images=[pictures["photo"], pictures["wide"]]
    )
    sample = prepare(record, with_text=True, proxy_image="white", max_length=512)
    assert [(sequence < 0).sum() for sequence in sample.text.sequences] == [2 * 4, 2 * 4]
    assert [(sequence < 0).sum() for sequence in sample.main.sequences] == [10 * 4, 10 * 4]


def test_text_inputs_are_a_white_tile_for_each_image_whatever_it_is(make_preparer):
    sample, tiles = make_preparer(inputs="text").whole(group("a", images=["/none.png", "/none either.png"]))
    assert sample.tiles_per_image == (1, 1)
    assert [own.min() for own in tiles] == [255, 255]


def test_image_inputs_have_no_question(prepare, pictures):
    asked, unasked = (
        prepare(group("a", prompt=prompt, images=[pictures["wide"]]), inputs="image", pairs=None)
        for prompt in ("What is it?", "")
    )
    assert asked.main.sequences[0].tolist() == unasked.main.sequences[0].tolist()
    assert asked.group.prompt == "What is it?"


# overlong responses


def test_skip_drops_only_the_pairs_of_the_overlong_response(prepare):
    pairs = [Pair(0, 1), Pair(1, 2), Pair(0, 2), Pair(2, 3)]
    sample = prepare(group("a", LONG, "b", "c", pairs=pairs), overlong="skip", with_text=True)
    assert sample.group.responses == ("a", "b", "c")
    assert sample.group.pairs == Pairs.of((0, 1), (1, 2))
    assert [note.field for note in sample.dropped] == ["response 1"]
    assert len(sample.main.sequences) == len(sample.text.sequences) == 3
    assert not any(sample.main.truncated)


def test_skip_drops_responses_that_are_left_without_a_pair(prepare):
    sample = prepare(group("a", LONG, "b", "c", pairs=[Pair(0, 1), Pair(2, 3)]), overlong="skip")
    assert sample.group.responses == ("b", "c")
    assert sample.group.pairs == Pairs.of((0, 1))


def test_margins_of_a_file_stay_with_their_pairs_where_a_response_is_left_out(prepare, write_jsonl):
    pairs = [Pair(a, b) for a in range(4) for b in range(a + 1, 4)]
    rows = [{"record": 0, "chosen": p.chosen, "rejected": p.rejected, "proxy_margin": i} for i, p in enumerate(pairs)]
    sample = prepare(group("a", LONG, "b", "c", pairs=pairs), overlong="skip")
    margins = ProxyMargins(write_jsonl(rows, "margins.jsonl")).of([sample])
    assert margins.tolist() == [pairs.index(Pair(*pair)) for pair in ((0, 2), (0, 3), (2, 3))]


def test_skip_leaves_nothing_of_a_record_whose_every_pair_is_overlong(prepare):
    sample = prepare(group(LONG, "a", pairs=[Pair(0, 1)]), overlong="skip")
    assert (len(sample.group.pairs), sample.main.sequences) == (0, ())
    assert len(sample.dropped) == 1


def test_truncate_keeps_every_pair_and_says_what_was_cut(prepare):
    sample = prepare(group("a", LONG, pairs=[Pair(0, 1)]), overlong="truncate")
    assert sample.group.pairs == Pairs.of((0, 1))
    assert sample.main.truncated == (False, True)
    assert [len(sequence) <= 100 for sequence in sample.main.sequences] == [True, True]
    assert sample.dropped == ()


def test_error_names_the_response(prepare):
    with pytest.raises(RecordError, match="response 1: does not fit into --max-length 100"):
        prepare(group("a", LONG, pairs=[Pair(0, 1)]), overlong="error")


def test_with_the_habits_of_the_reference_every_overlong_response_is_cut(make_preparer):
    preparer = make_preparer(overlong="error")
    preparer.encoder.compat = "reference"
    sample = preparer.sample(group("a", LONG, pairs=[Pair(0, 1)]))
    assert (sample.group.pairs, sample.main.truncated) == (Pairs.of((0, 1)), (False, True))


@pytest.mark.parametrize("overlong", ["skip", "truncate", "error"])
def test_an_overlong_response_in_no_pair_does_not_matter(prepare, overlong):
    sample = prepare(group("a", LONG, "b", pairs=[Pair(0, 2)]), overlong=overlong)
    assert sample.group.responses == ("a", "b")
    assert sample.dropped == ()


# sides that are the same


@pytest.mark.parametrize("overlong", ["skip", "truncate"])
@pytest.mark.parametrize(
    ("responses", "pairs", "kept", "texts"),
    [
        (["a", "a"], [(0, 1)], [], ()),
        (["a", "b", "a"], [(0, 1), (0, 2), (1, 2)], [(0, 1), (1, 2)], ("a", "b", "a")),
        (["a", "a", "b"], [(0, 1), (2, 1)], [(1, 0)], ("a", "b")),
        (["a", "b"], [(0, 1)], [(0, 1)], ("a", "b")),
    ],
)
def test_pairs_whose_sides_are_the_same_are_left_out_and_counted(prepare, overlong, responses, pairs, kept, texts):
    sample = prepare(group(*responses, pairs=pairs), overlong=overlong)
    assert ([pair[:2] for pair in sample.group.pairs], sample.group.responses) == (kept, texts)
    assert sample.num_identical == len(pairs) - len(kept)
    assert [note.reason for note in sample.dropped] == [
        f"{sample.num_identical} of {len(pairs)} pairs have two sides of the same tokens"
    ] * bool(sample.num_identical)


@pytest.mark.parametrize(("overlong", "identical", "dropped"), [("truncate", 1, 1), ("skip", 0, 2)])
def test_sides_may_be_the_same_for_being_cut(prepare, overlong, identical, dropped):
    sample = prepare(group(LONG + "x", LONG + "y", pairs=[(0, 1)]), overlong=overlong)
    assert (len(sample.group.pairs), sample.num_identical, len(sample.dropped)) == (0, identical, dropped)


def test_where_preferences_do_not_matter_every_response_stays(prepare):
    assert prepare(group("a", "a", pairs=[(0, 1)]), pairs=None).group.responses == ("a", "a")


# which pairs


RANKED = group("a", "b", "c", pairs=[(0, 1, 0.5), (0, 2), (1, 2)])


def test_every_pair_can_be_a_sample_of_its_own(make_preparer):
    parts = [*make_preparer(pairs="expand").parts(replace(RANKED, num_unrated=2))]
    assert [part.responses for part in parts] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [part.pairs for part in parts] == [Pairs.of((0, 1, 0.5)), Pairs.of((0, 1)), Pairs.of((0, 1))]
    assert [part.num_unrated for part in parts] == [2, 0, 0]


def test_a_record_without_pairs_is_one_sample_of_none(make_preparer):
    (part,) = make_preparer(pairs="expand").parts(group("a", "b"))
    assert (len(part.pairs), part.responses) == (0, ())


def test_random_pairs_of_a_record_are_always_the_same_for_a_seed(make_preparer):
    def used(count, seed=0):
        (part,) = make_preparer(pairs=count, seed=seed).parts(RANKED)
        return tuple(part.pairs), part.responses

    assert len(used(2)[0]) == 2
    assert used(2) == used(2)
    assert len({used(1, seed) for seed in range(20)}) == 3
    assert used(3) == used(4) == (tuple(RANKED.pairs), RANKED.responses)


# sizes


def test_a_size_is_work_pairs_and_what_is_not_trained_on(make_preparer):
    preparer = make_preparer(overlong="skip")
    (size,) = preparer.sizes(group("a", LONG, "b", pairs=[(0, 1), (0, 2)]))
    assert (size.cost, size.pairs) == (preparer.sample(group("a", "b", pairs=[(0, 1)])).cost(4), 1)
    assert [note.field for note in size.notes.dropped] == ["response 1"]


def test_a_record_that_cannot_be_used_has_one_size_that_says_why(make_preparer):
    for pairs in ("all", "expand"):
        (size,) = make_preparer(pairs=pairs).sizes(replace(RANKED, images=("none.png",)))
        assert (size.cost, size.pairs) == (0, 0)
        assert [error.field for error in size.notes.errors] == ["img_path"]


def test_a_record_without_preferences_is_counted(make_preparer):
    (size,) = make_preparer().sizes(replace(group("a", "b"), num_unrated=1))
    assert (size.cost, size.notes.unpaired, size.notes.unrated) == (0, 1, 1)
