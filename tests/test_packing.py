"""Samples to batches: what is shared and what never is, and a schedule that no number of ranks changes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmrm_fast.dataset import GroupDataset, Sample
from mmrm_fast.packing import MicroBatch, Packer, balance, cut, pack, schedule, unique_tiles
from mmrm_fast.prompt import Encoded
from mmrm_fast.records import Group, Pair, RecordError

TILES = {"tokens_per_tile": 4, "tile_size": 56}


def group(prompt, images, *responses, pairs=()):
    return Group("test", 0, None, prompt, None, tuple(images), responses, tuple(pairs))


@pytest.fixture
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def dataset(checkpoint):
    return GroupDataset([], checkpoint.prompt_encoder(), checkpoint.tiling)


@pytest.fixture
def pack_groups(dataset):
    def run(*groups, **options):
        samples = [dataset.encode(group) for group in groups]
        return pack(samples, [dataset.load(sample) for sample in samples], **TILES, **options)

    return run


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
    tiles, bases = unique_tiles([[a, b], [], [b.copy(), a.copy(), b]], 56)
    assert np.array_equal(tiles, np.concatenate([a, b]))
    assert bases == [[0, 3], [], [3, 0, 3]]


def test_an_image_that_begins_like_another_is_another_image():
    tiles, bases = unique_tiles([[tiles_of(1, 1)], [tiles_of(1, 3)]], 56)
    assert (len(tiles), bases) == (4, [[0], [1]])


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


def test_every_image_of_the_white_proxy_is_the_same_tile(checkpoint, pictures):
    dataset = GroupDataset([], checkpoint.prompt_encoder(), checkpoint.tiling, with_text=True, proxy_image="white")
    records = [
        group("<image>, <image>", [pictures["photo"], pictures["wide"]], "a"),
        group("", [pictures["tall"]], "b"),
    ]
    batch = Packer(dataset, with_text=True)[MicroBatch(tuple(map(dataset.encode, records)))].batch
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
    assert batch.pairs.chosen.tolist() == [2, 4, 5]
    assert batch.pairs.rejected.tolist() == [0, 5, 4]
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
    rewards[batch.pairs.chosen].sum().backward()
    assert (len(batch.pairs.chosen), batch.num_responses) == (0, ())
    assert (batch.text is not None) == with_text
    assert all(p.grad is None or not p.grad.any() for p in checkpoint.model.parameters())


@pytest.mark.parametrize("images", [False, True])
def test_every_batch_reaches_the_vision_tower(checkpoint, pack_groups, pictures, images):
    batch = pack_groups(group("What?", [pictures["wide"]] if images else [], "two"))
    checkpoint.model(batch.main, batch.tiles).sum().backward()
    assert all(p.grad is not None for p in checkpoint.model.model.multi_modal_projector.parameters())


def test_a_picture_that_cannot_be_decoded_leaves_the_batch(dataset, pictures, tmp_path):
    broken = tmp_path / "broken.jpg"
    Image.open(pictures["wide"]).save(broken)
    broken.write_bytes(broken.read_bytes()[:-2000])
    groups = [group("a", [pictures["wide"]], "x"), group("b", [str(broken)], "x"), group("c", [], "x", "y")]
    packed = Packer(dataset)[MicroBatch(tuple(map(dataset.encode, groups)), False, 7)]
    assert [sample.group.prompt for sample in packed.samples] == ["a", "c"]
    assert packed.batch.num_responses == (1, 2)
    assert [error.field for error in packed.errors.values()] == ["img_path"]
    assert (packed.ends_step, packed.consumed) == (False, 7)


# cut and balance


@pytest.mark.parametrize(
    ("costs", "budget", "runs"),
    [
        ([], 10, []),
        ([3], 10, [[0]]),
        ([5, 5, 1], 10, [[0, 1], [2]]),
        ([5, 6, 4], 10, [[0], [1, 2]]),
        ([50], 10, [[0]]),
        ([1, 50, 1], 10, [[0], [1], [2]]),
        ([10, 10], 10, [[0], [1]]),
    ],
)
def test_cut_fills_consecutive_runs_up_to_the_budget(costs, budget, runs):
    assert [list(run) for run in cut(costs, budget)] == runs


@pytest.mark.parametrize(
    ("costs", "limit", "num_ranks", "bins"),
    [
        ([], 10, 1, [[]]),
        ([], 10, 3, [[], [], []]),
        ([4], 10, 2, [[0], []]),
        ([4, 4], 10, 1, [[0, 1]]),
        ([4, 4], 10, 2, [[0], [1]]),
        ([4, 4, 4], 10, 1, [[0, 2], [1]]),
        ([1, 9, 2, 8], 10, 2, [[0, 1], [2, 3]]),
        ([6, 6, 6], 10, 1, [[0], [1], [2]]),
        ([6, 6, 6], 10, 2, [[0], [1], [2], []]),
        ([50, 1], 10, 1, [[0], [1], [], [], [], []]),
    ],
)
def test_balance_deals_the_largest_first_into_the_emptiest_bin(costs, limit, num_ranks, bins):
    assert balance(costs, limit, num_ranks) == bins


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_balance_keeps_limit_multiple_and_order_for_random_costs(num_ranks):
    rng = np.random.default_rng(num_ranks)
    for _ in range(100):
        costs = rng.integers(1, 60, rng.integers(0, 40)).tolist()
        bins = balance(costs, 100, num_ranks)
        assert len(bins) % num_ranks == 0
        assert sorted(item for items in bins for item in items) == list(range(len(costs)))
        assert all(items == sorted(items) and sum(costs[item] for item in items) <= 100 for items in bins)


# the schedule


class Records:
    """A stand-in data set: record i costs `costs[i]`; a cost of None is an error, 0 a record without responses."""

    encoder = SimpleNamespace(tokens_per_tile=4)

    def __init__(self, costs):
        self.costs = costs

    def __getitem__(self, index):
        cost = self.costs[index]
        if cost is None:
            raise RecordError(f"file.jsonl:{index + 1}", "prompt", "missing")
        group = Group("", index, None, "", None, (), ("",) * bool(cost))
        return Sized(group, (), Encoded((np.zeros(1, np.int64),) * bool(cost), 0, ()), cost)


class Sized(Sample):
    def __init__(self, group, tiles_per_image, main, work):
        super().__init__(group, tiles_per_image, main)
        object.__setattr__(self, "work", work)

    def cost(self, tokens_per_tile):
        return self.work


def random_records(seed, count=60):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 40, count).tolist()
    for index in rng.choice(count, 10, replace=False).tolist():
        costs[index] = [None, 0, 150][index % 3]
    return Records(costs), rng.permutation(count)


def run(records, order, *, num_ranks=1, per_batch=100, per_micro_batch=50, window=16):
    """Per rank its micro-batches, and the errors that rank 0 met."""
    errors = []
    ranks = [
        list(
            schedule(
                records, order, tokens_per_batch=per_batch, tokens_per_micro_batch=per_micro_batch,
                on_error=errors.append if rank == 0 else lambda error: None,
                rank=rank, num_ranks=num_ranks, window=window,
            )
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    return ranks, errors


def indices(micro):
    return [sample.group.record for sample in micro.samples]


def steps(ranks):
    """The records of each step, over all ranks, sorted."""
    found = [[]]
    for at_once in zip(*ranks, strict=True):
        found[-1] += [index for micro in at_once for index in indices(micro)]
        if at_once[0].ends_step:
            found.append([])
    assert found.pop() == []
    return [sorted(step) for step in found]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_records_of_a_step_do_not_depend_on_the_number_of_ranks(seed, num_ranks):
    records, order = random_records(seed)
    assert steps(run(records, order, num_ranks=num_ranks)[0]) == steps(run(records, order)[0])


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_the_records_of_a_step_do_not_depend_on_the_window(seed, window):
    records, order = random_records(seed)
    assert steps(run(records, order, window=window)[0]) == steps(run(records, order)[0])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_run_in_lockstep(seed, num_ranks):
    ranks, _ = run(*random_records(seed), num_ranks=num_ranks)
    beats = [[(micro.ends_step, micro.consumed) for micro in rank] for rank in ranks]
    assert all(rank == beats[0] for rank in beats)
    assert beats[0][-1][0]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_every_record_is_used_once_or_reported_once_or_has_nothing_to_score(seed, num_ranks):
    records, order = random_records(seed)
    ranks, errors = run(records, order, num_ranks=num_ranks)
    used = sorted(index for rank in ranks for micro in rank for index in indices(micro))
    assert used == [index for index, cost in enumerate(records.costs) if cost]
    reported = sorted(int(error.source.rpartition(":")[2]) - 1 for error in errors)
    assert reported == [index for index, cost in enumerate(records.costs) if cost is None]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_budgets_hold_but_for_a_record_that_is_over_them_by_itself(seed, num_ranks):
    records, order = random_records(seed)
    ranks, _ = run(records, order, num_ranks=num_ranks)
    micro_batches = [indices(micro) for rank in ranks for micro in rank]
    for budget, batches in ((100, steps(ranks)), (50, micro_batches)):
        assert all(len(batch) <= 1 or sum(records.costs[index] for index in batch) <= budget for batch in batches)


def test_a_rank_without_work_gets_empty_micro_batches():
    ranks, _ = run(Records([5, 5]), [0, 1], num_ranks=4)
    assert [list(map(indices, rank)) for rank in ranks] == [[[0]], [[1]], [[]], [[]]]


@pytest.mark.parametrize("seed", range(3))
def test_going_on_after_the_consumed_records_gives_the_remaining_steps(seed):
    records, order = random_records(seed)
    ranks, _ = run(records, order)
    for step, micro in enumerate([micro for micro in ranks[0] if micro.ends_step], 1):
        assert steps(run(records, order[micro.consumed :])[0]) == steps(ranks)[step:]


def test_the_last_step_has_consumed_everything_even_if_it_ends_in_errors():
    ranks, _ = run(Records([5, None, 0, None]), range(4))
    assert ranks[0][-1].consumed == 4


@pytest.mark.parametrize("costs", [[], [None, 0]])
def test_nothing_usable_is_no_step(costs):
    assert run(Records(costs), range(len(costs)))[0] == [[]]
