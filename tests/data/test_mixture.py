"""What a run trains on: mixtures have their shares, what is held out is nowhere else, copies are found."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmrm_fast.data.images import opened
from mmrm_fast.data.mixture import (
    SAMPLE,
    Look,
    Mixture,
    PreferenceDataset,
    contradictions,
    copies,
    is_held_out,
    parse_mixture,
    permutations,
    record_key,
    record_order,
    unknown_samples,
)
from mmrm_fast.data.records import Group, Records
from mmrm_fast.data.samples import Preparer

LONG = "I think so. " * 40


def test_weights_are_shares(tmp_path):
    assert parse_mixture(["a.jsonl:3", "b.jsonl:1"]) == Mixture(("a.jsonl", "b.jsonl"), (0.75, 0.25))
    assert parse_mixture(["a.jsonl", "s3:b.jsonl"]) == Mixture(("a.jsonl", "s3:b.jsonl"))
    odd = tmp_path / "records:2"
    odd.write_text("")
    assert parse_mixture([str(odd)]) == Mixture((str(odd),))


@pytest.mark.parametrize("specs", [["a:0.5", "b"], ["a:0", "b:1"], ["a:-1"], ["a:nan"], ["a:inf"]])
def test_wrong_weights_are_refused(specs):
    with pytest.raises(ValueError, match="weight"):
        parse_mixture(specs)


def test_without_weights_every_epoch_has_every_record_once():
    order = record_order([3, 7], 25, seed=1)
    assert order.dtype == np.uint32
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert len(set(order[20:])) == 5
    assert order[:10].tolist() != order[10:20].tolist()


def test_the_order_is_numpys_own_permutation_for_seed_and_epoch():
    expected = [np.random.default_rng((5, epoch)).permutation(1000) for epoch in range(2)]
    assert np.array_equal(permutations(1000, 2000, (5,)), np.concatenate(expected))


def test_a_mixture_has_its_shares_and_repeats_a_record_only_when_all_came():
    order = record_order([10, 1000], 200, seed=0, weights=[0.3, 0.7])
    small, large = order[order < 10], order[order >= 10]
    assert (len(small), len(large)) == (60, 140)
    assert np.bincount(small).tolist() == [6] * 10
    assert len(set(large)) == 140
    assert 15 < (order[:100] < 10).sum() < 45
    assert np.array_equal(order, record_order([10, 1000], 200, seed=0, weights=[0.3, 0.7]))


# looks


def keyed(prompt, images):
    with opened(images) as files:
        return record_key(Group("file:1", 0, None, prompt, None, files, ()))


def test_prompt_and_image_content_make_the_key(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "copy.png").write_bytes(b"picture")
    (tmp_path / "b.png").write_bytes(b"another")
    a, copy, b, missing = (str(tmp_path / name) for name in ("a.png", "copy.png", "b.png", "missing.png"))
    cases = [("p", [a]), ("p", [copy]), ("p", [b"picture"]), ("p", [b]), ("q", [a]), ("p", []), ("p", [missing])]
    first, second, third, *others = [keyed(*case) for case in cases]
    assert first == second == third
    assert len({first, *others}) == 5


PAIR = {"prompt": "p", "images": ["a.png"], "chosen": "x", "rejected": "y"}
RATED = {"prompt": "p", "images": ["a.png"], "responses": ["x", "y", "z"], "scores": [3, 2, 1]}
RELATIONS = {  # two records, and what the second is to the first
    "itself": (PAIR, PAIR, "a copy"),
    "another id and margin": (PAIR, {**PAIR, "id": 7, "margin": 2}, "a copy"),
    "a copy of the picture": (PAIR, {**PAIR, "images": ["copy.png"]}, "a copy"),
    "rated": (PAIR, {"prompt": "p", "images": ["a.png"], "responses": ["y", "x"], "scores": [1, 2]}, "a copy"),
    "in another order": (RATED, {**RATED, "responses": ["z", "x", "y"], "scores": [1, 3, 2]}, "a copy"),
    "other ratings of one order": (RATED, {**RATED, "scores": [9, 5, 4]}, "a copy"),
    "the other way round": (PAIR, {**PAIR, "chosen": "y", "rejected": "x"}, "opposed"),
    "all the other way round": (RATED, {**RATED, "scores": [1, 2, 3]}, "opposed"),
    "one pair the other way round": (RATED, {**RATED, "scores": [2, 3, 1]}, None),
    "some of its pairs": (RATED, PAIR, None),
    "another prompt": (PAIR, {**PAIR, "prompt": "q"}, None),
    "another picture": (PAIR, {**PAIR, "images": ["b.png"]}, None),
    "another response": (PAIR, {**PAIR, "rejected": "z"}, None),
    "another picture of one side": (PAIR, {**PAIR, "images": ["a.png", "b.png"], "rejected_images": ["a.png"]}, None),
    "sides of other pictures": (
        {**PAIR, "rejected_images": ["b.png"]}, {**PAIR, "images": ["b.png"], "rejected_images": ["a.png"]}, None),
    "no pair": ({**RATED, "scores": [1, 1, 1]}, {**RATED, "scores": [2, 2, 2]}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", RELATIONS)
def test_a_copy_has_the_same_pairs_and_a_contradiction_the_same_the_other_way_round(
    tmp_path, write_jsonl, make_preparer, kind
):
    *records, relation = RELATIONS[kind]
    for name, colour in (("a", "red"), ("copy", "red"), ("b", "blue")):
        Image.new("RGB", (60, 60), colour).save(tmp_path / f"{name}.png")
    look = Look(Records(write_jsonl(records)), make_preparer())
    table = np.array([row for record in range(2) for row in look(record).rows], SAMPLE)
    assert not any(notes and notes.errors for notes in table["notes"])
    assert copies(table, [0, 2]).tolist() == [[1, 0]] * (relation == "a copy")
    assert contradictions(table).tolist() == [[0, 1], [1, 0]] * (relation == "opposed")


def test_copies_are_of_the_first_record_between_two_edges():
    table = unknown_samples(range(6))
    table["answers"] = [8, 6, 8, 0, 8, 9]
    assert copies(table, [0, 6]).tolist() == [[2, 0], [4, 0]]
    assert copies(table, [0, 2, 6]).tolist() == [[4, 2]]
    assert copies(table[:0], [0, 0]).tolist() == contradictions(table[:2]).tolist() == []
    assert contradictions(table).tolist() == [[0, 5], [2, 5], [4, 5], [5, 0]]
    assert copies(np.repeat(table, 3), [0, 6]).tolist() == [[2, 0], [4, 0]]  # samples of one record


def test_what_is_held_out_depends_on_the_key_alone():
    keys = np.random.default_rng(0).integers(1, 2**64, 10_000, np.uint64)
    held_out = is_held_out(keys, 0.1)
    assert 900 < held_out.sum() < 1100
    assert np.array_equal(is_held_out(keys[::2], 0.1), held_out[::2])
    assert not is_held_out(np.zeros(3, np.uint64), 0.999).any()
    assert not is_held_out(keys, 0).any()


@pytest.fixture
def make_preparer(make_checkpoint):
    def make(**options):
        checkpoint = make_checkpoint(max_length=100)
        return Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, **{"pairs": "all", **options})

    return make


@pytest.fixture
def faulty(tmp_path, pictures, write_jsonl):
    """Records with one fault a line, but for lines 1 and 7."""
    truncated = tmp_path / "truncated.png"
    Image.effect_noise((100, 100), 50).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    good = {"prompt": "p", "img_path": pictures["square"], "chosen": "a", "rejected": "b"}
    records = [
        good,
        '{"prompt":',
        {"prompt": "p", "chosen": "a"},
        {**good, "img_path": "none.png"},
        {**good, "prompt": LONG},
        {**good, "img_path": str(truncated)},
        good,
        {**good, "rejected": LONG},
    ]
    return Records(write_jsonl(records))


@pytest.mark.parametrize(("decode", "lines"), [(False, [2, 3, 4, 5, 8]), (True, [2, 3, 4, 5, 6, 8])])
def test_every_fault_is_found_and_nothing_else(faulty, make_preparer, decode, lines):
    look = Look(faulty, make_preparer(overlong="error"), decode=decode)
    table = np.array([row for record in range(len(faulty)) for row in look(record).rows], SAMPLE)
    errors = [error for notes in table["notes"] if notes for error in notes.errors]
    assert [int(error.source.rpartition(":")[2]) for error in errors] == lines
    assert [record + 1 for record in table["record"][table["cost"] == 0]] == lines


def test_what_is_held_out_is_sized_as_it_is_tested(write_jsonl, make_preparer):
    record = {"prompt": "p", "responses": ["a", "b", LONG], "scores": [3, 2, 1]}
    training, testing = make_preparer(pairs="expand", overlong="skip"), make_preparer(overlong="truncate")
    look = Look(Records(write_jsonl([record])), training, testing)
    ((_, _, key, *_),) = replace(look, eval_fraction=0.9999999)(0).rows
    assert [pairs for *_, pairs, _ in replace(look, eval_fraction=(key + 2**32) / 2**64)(0).rows] == [3]
    assert [pairs for *_, pairs, _ in replace(look, eval_fraction=(key - 2**32) / 2**64)(0).rows] == [1, 0, 0]


# data sets


def test_a_data_set_has_the_samples_of_its_table(write_jsonl, make_preparer):
    records = Records(write_jsonl([{"prompt": p, "responses": ["a", "b", "c"], "scores": [1, 2, 3]} for p in "pq"]))
    look = Look(records, make_preparer(pairs="expand"))
    table = np.array([row for record in range(2) for row in look(record).rows], SAMPLE)
    dataset = PreferenceDataset(records, look.preparer, table[2:])
    assert [dataset.group(index).prompt for index in range(len(dataset))] == ["p", "q", "q", "q"]
    assert [dataset.group(index).responses for index in (0, 1)] == [("b", "c"), ("a", "b")]
    for index in range(len(dataset)):
        (size,) = replace(look.preparer, pairs="all").sizes(dataset.group(index))
        assert dataset.size(index) == size


def test_samples_are_counted_by_file(write_jsonl, make_preparer):
    files = [write_jsonl([{"prompt": "p", "chosen": "a", "rejected": "b"}] * n, f"{n}.jsonl") for n in (3, 0, 2)]
    records = Records(*files)
    assert len(records) == 5
    assert [records.source(index) for index in (2, 3)] == [f"{files[0]}:3", f"{files[2]}:1"]
    table = unknown_samples(range(5))
    assert PreferenceDataset(records, make_preparer(), table).samples_per_file() == [3, 0, 2]
    assert PreferenceDataset(records, make_preparer(), table[[0, 1, 1, 4]]).samples_per_file() == [3, 0, 1]


def test_a_size_that_is_not_known_is_found_by_a_look(write_jsonl, make_preparer):
    records = Records(write_jsonl([{"prompt": "p", "chosen": "a", "rejected": "b"}, "["]))
    dataset = PreferenceDataset(records, make_preparer(), unknown_samples(range(2)))
    for index in range(2):
        dataset.table[index] = dataset.look(index)
    assert (dataset.size(0).pairs, dataset.size(0).notes) == (1, None)
    assert [error.source for error in dataset.size(1).notes.errors] == [records.source(1)]
