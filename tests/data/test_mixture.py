"""What a run trains on: mixtures have their shares, what is held out is nowhere else, copies are found."""

from types import SimpleNamespace

import numpy as np
import pytest

from mmrm_fast.data.mixture import (
    Sources,
    duplicates,
    is_held_out,
    parse_sources,
    permutations,
    record_key,
    record_order,
)
from mmrm_fast.data.records import Group, RecordError


def test_weights_are_shares(tmp_path):
    assert parse_sources(["a.jsonl:3", "b.jsonl:1"]) == Sources(("a.jsonl", "b.jsonl"), (0.75, 0.25))
    assert parse_sources(["a.jsonl", "s3:b.jsonl"]) == Sources(("a.jsonl", "s3:b.jsonl"))
    odd = tmp_path / "records:2"
    odd.write_text("")
    assert parse_sources([str(odd)]) == Sources((str(odd),))


@pytest.mark.parametrize("specs", [["a:0.5", "b"], ["a:0", "b:1"], ["a:-1"], ["a:nan"], ["a:inf"]])
def test_wrong_weights_are_refused(specs):
    with pytest.raises(ValueError, match="weight"):
        parse_sources(specs)


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


def dataset_of(*groups):
    def group(index):
        if groups[index] is None:
            raise RecordError("file:1", "", "broken")
        prompt, images = groups[index]
        return Group(f"file:{index + 1}", index, None, prompt, None, tuple(images), ())

    return SimpleNamespace(group=group)


def test_prompt_and_image_content_make_the_key(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "copy.png").write_bytes(b"picture")
    (tmp_path / "b.png").write_bytes(b"another")
    a, copy, b, missing = (str(tmp_path / name) for name in ("a.png", "copy.png", "b.png", "missing.png"))
    cases = [("p", [a]), ("p", [copy]), ("p", [b"picture"]), ("p", [b]), ("q", [a]), ("p", []), ("p", [missing]), None]
    data = dataset_of(*cases)
    first, second, third, *others = [record_key(data, index) for index in range(len(cases))]
    assert first == second == third
    assert len({first, *others}) == 6 and others[-1] == 0


def test_what_is_held_out_depends_on_the_key_alone():
    keys = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64)
    held_out = is_held_out(keys, 0.1)
    assert 900 < held_out.sum() < 1100
    assert np.array_equal(is_held_out(keys[::2], 0.1), held_out[::2])


@pytest.mark.parametrize("fraction", [0, 1, -1, 0.001])
def test_a_fraction_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ValueError, match="--eval-fraction"):
        is_held_out(np.array([2**63], np.uint64), fraction)


def test_test_records_that_are_trained_on_are_counted_and_one_is_named():
    data = dataset_of(("a", []), ("b", []), None)
    keys = np.array([record_key(data, index) for index in range(3)], np.uint64)
    number, first = duplicates(data, keys, keys[1:])
    assert (number, first.source) == (1, "file:2")
    assert duplicates(data, keys[:1], keys[1:]) == (0, None)
