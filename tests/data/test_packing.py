"""Samples to batches: what is shared and what never is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmrm_fast.data.packing import Step, pack, pack_items, unique_tiles
from mmrm_fast.data.samples import Notes, Preparer
from mmrm_fast.data.types import Group, Pair, Pairs

TILES = {"tokens_per_tile": 4, "tile_size": 56}


def group(prompt, images, *responses, pairs=()):
    return Group("test", 0, None, prompt, None, tuple(images), responses, Pairs.of(*pairs))


@pytest.fixture
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def preparer(checkpoint):
    return Preparer(checkpoint.prompt_encoder(), checkpoint.tiling)


@pytest.fixture
def pack_groups(preparer):
    return lambda *groups: pack_items(preparer, groups, preparer.whole).batch


@pytest.fixture
def rewards_of(checkpoint, pack_groups):
    @torch.inference_mode()
    def run(*groups):
        batch = pack_groups(*groups)
        return checkpoint.model(batch.main, batch.tiles).split(list(batch.num_responses))

    return run


def tiles_of(colour, count=1):
    return np.full((count, 56, 56, 3), colour, np.uint8)


# images


def test_equal_images_are_stored_once():
    a, b = tiles_of(1, 3), tiles_of(2, 2)
    tiles, places = unique_tiles([[a, b], [], [b.copy(), a.copy(), b]], 56)
    assert np.array_equal(tiles, np.concatenate([a, b]))
    assert [own.tolist() for own in places] == [[0, 1, 2, 3, 4], [], [3, 4, 0, 1, 2, 3, 4]]


def test_an_image_that_begins_like_another_is_another_image():
    tiles, places = unique_tiles([[tiles_of(1, 1)], [tiles_of(1, 3)]], 56)
    assert (len(tiles), [own.tolist() for own in places]) == (4, [[0], [1, 2, 3]])


def test_image_tokens_count_over_the_batch(pack_groups, pictures):
    batch = pack_groups(group("", [pictures["wide"]], "a"), group("", [pictures["tall"], pictures["wide"]], "a"))
    rows = -1 - batch.main.source_T[batch.main.source_T < 0]
    assert len(batch.tiles) == 3 + 5
    assert rows.tolist() == [*range(12), *range(12, 32), *range(12)]


def test_records_with_the_same_picture_and_text_are_computed_once(pack_groups, pictures):
    once = pack_groups(group("What?", [pictures["photo"]], "a"))
    twice = pack_groups(group("What?", [pictures["photo"]], "a"), group("What?", [pictures["photo"]], "a"))
    assert len(twice.main.source_T) == len(once.main.source_T)
    assert twice.main.num_tokens_unshared == 2 * once.main.num_tokens_unshared
    assert twice.main.last_index_R.tolist() == 2 * once.main.last_index_R.tolist()


def test_identical_responses_have_identical_rewards(rewards_of, pictures):
    (rewards,) = rewards_of(group("What?", [pictures["wide"]], "two", "red", "two"))
    assert rewards[0] == rewards[2] != rewards[1]


def test_different_pictures_with_the_same_text_have_different_rewards(rewards_of, pictures, tmp_path):
    other = tmp_path / "other.png"
    ImageOps.invert(Image.open(pictures["wide"])).save(other)
    first, second = rewards_of(group("What?", [pictures["wide"]], "two"), group("What?", [str(other)], "two"))
    assert abs(first - second) > 1e-3


def test_every_image_of_the_white_proxy_is_the_same_tile(preparer, pictures):
    white = replace(preparer, with_text=True, proxy_image="white")
    records = [
        group("<image>, <image>", [pictures["photo"], pictures["wide"]], "a"),
        group("", [pictures["tall"]], "b"),
    ]
    batch = pack_items(white, records, white.whole).batch
    assert batch.text_tiles.shape == (1, 56, 56, 3)
    assert batch.text_tiles.min() == 255
    assert (-1 - batch.text.source_T[batch.text.source_T < 0]).tolist() == [*range(4), *range(4), *range(4)]


@pytest.mark.parametrize(("proxy_image", "with_text", "has_tile"),
                         [("none", True, False), ("white", True, True), ("white", False, False)])  # fmt: skip
def test_a_batch_has_a_white_tile_even_without_images_where_the_proxy_looks_at_one(proxy_image, with_text, has_tile):
    batch = pack([], [], **TILES, with_text=with_text, proxy_image=proxy_image)
    assert (batch.text_tiles is not None) == has_tile


# batches


def test_rewards_come_in_the_order_of_the_responses(rewards_of, pictures):
    groups = [
        group("What?", [pictures["photo"]], "two", "", "red circles", "two red"),
        group("Why?", [], "so", "two"),
        group("What?", [pictures["photo"]], "red", "two"),
    ]
    for together, one in zip(rewards_of(*groups), groups, strict=True):
        for reward, response in zip(together, one.responses, strict=True):
            ((alone,),) = rewards_of(replace(one, responses=(response,)))
            assert abs(reward - alone) < 1e-5


def test_pairs_and_margins_count_over_the_batch(pack_groups):
    batch = pack_groups(
        group("a", [], "x", "y", "z", pairs=[Pair(2, 0, 0.5)]),
        group("b", [], "x"),
        group("c", [], "x", "y", pairs=[Pair(0, 1), Pair(1, 0)]),
    )
    assert batch.chosen_P.tolist() == [2, 4, 5]
    assert batch.rejected_P.tolist() == [0, 5, 4]
    assert batch.margin_P.tolist() == [0.5, 0, 0]


def test_without_margins_there_is_no_margin_tensor(pack_groups):
    assert pack_groups(group("a", [], "x", "y", pairs=[Pair(0, 1)])).margin_P is None


def test_a_batch_of_text_has_one_black_stand_in_tile(pack_groups):
    batch = pack_groups(group("What?", [], "two"))
    assert batch.tiles.shape == (1, 56, 56, 3)
    assert not batch.tiles.any()
    assert (batch.main.source_T >= 0).all()


@pytest.mark.parametrize("with_text", [False, True])
def test_an_empty_batch_runs_and_has_no_pair_and_no_gradient(checkpoint, with_text):
    batch = pack([], [], **TILES, with_text=with_text)
    rewards = checkpoint.model(batch.main, batch.tiles)
    rewards[batch.chosen_P].sum().backward()
    assert (len(batch.chosen_P), batch.num_responses) == (0, ())
    assert (batch.text is not None) == with_text
    assert all(p.grad is None or not p.grad.any() for p in checkpoint.model.parameters())


@pytest.mark.parametrize("images", [False, True])
def test_every_batch_reaches_the_vision_tower(checkpoint, pack_groups, pictures, images):
    batch = pack_groups(group("What?", [pictures["wide"]] if images else [], "two"))
    checkpoint.model(batch.main, batch.tiles).sum().backward()
    assert all(p.grad is not None for p in checkpoint.model.model.multi_modal_projector.parameters())


def test_a_picture_that_cannot_be_decoded_leaves_the_batch(preparer, pictures, tmp_path):
    broken = tmp_path / "broken.jpg"
    Image.open(pictures["wide"]).save(broken)
    broken.write_bytes(broken.read_bytes()[:-2000])
    groups = [group("a", [pictures["wide"]], "x"), group("b", [str(broken)], "x"), group("c", [], "x", "y")]
    step = Step(consumed=7, records=3, imbalance=1.0, notes=Notes())
    packed = pack_items(preparer, groups, preparer.whole, step)
    assert [sample.group.prompt for sample in packed.samples] == ["a", "c"]
    assert packed.batch.num_responses == (1, 2)
    assert [error.field for error in packed.errors.values()] == ["img_path"]
    assert packed.step is step
