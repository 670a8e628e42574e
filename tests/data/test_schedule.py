"""Which records make a step and a micro-batch: no number of ranks, workers or windows changes the steps."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock as Mock

import numpy as np
import pytest

from mmrm_fast.data import schedule as module
from mmrm_fast.data.mixture import PreferenceDataset, unknown_samples
from mmrm_fast.data.samples import Size
from mmrm_fast.data.schedule import balance, cut, imbalance, schedule
from mmrm_fast.data.types import RecordError

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
        ([0, 0], 10, [[0, 1]]),
        ([0, 50, 0, 1, 0], 10, [[0, 1, 2], [3, 4]]),
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
        ([50, 1], 10, 1, [[0], [1]]),
        ([50], 10, 1, [[0]]),
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


class StandIn(PreferenceDataset):
    """Sample i costs `costs[i]`; a cost of None is an error, 0 a record without responses."""

    def __init__(self, costs, known=()):
        super().__init__(None, None, unknown_samples(range(len(costs))))
        object.__setattr__(self, "costs", costs)
        object.__setattr__(self, "looked_at", [])
        for index in known:
            self.table[index] = self.look(index)

    def look(self, index):
        self.looked_at.append(index)
        cost = self.costs[index]
        error = RecordError(f"file.jsonl:{index + 1}", "prompt", "missing")
        return (index, 0, 0, 0, *(Size.of_error(error) if cost is None else Size(cost, int(cost > 0))))


def random_records(seed, count=60):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 40, count).tolist()
    for index in rng.choice(count, 10, replace=False).tolist():
        costs[index] = [None, 0, 150][index % 3]
    return costs, rng.permutation(count)


class Exchange:
    """Every rank's lists to all ranks, which run as threads."""

    def __init__(self, num_ranks):
        self.lists, self.barrier = [[] for _ in range(num_ranks)], threading.Barrier(num_ranks, timeout=60)

    def gather(self, rank, items):
        self.lists[rank] = items
        self.barrier.wait()
        gathered = [item for part in self.lists for item in part]
        self.barrier.wait()
        return gathered


def run(costs, order, *, num_ranks=1, per_batch=100, per_micro_batch=50, window=16, known=(), **options):
    """Per rank its micro-batches."""
    exchange = Exchange(num_ranks)

    def on_rank(rank):
        return list(
            schedule(
                StandIn(costs, known), order, tokens_per_batch=per_batch, tokens_per_micro_batch=per_micro_batch,
                window=window, rank=rank, num_ranks=num_ranks, gather=lambda items: exchange.gather(rank, items),
                **options,
            )
        )  # fmt: skip

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(on_rank, range(num_ranks)))


def steps(ranks):
    """The records of each step, over all ranks, sorted."""
    found = [[]]
    for at_once in zip(*ranks, strict=True):
        found[-1] += [index for micro in at_once for index in micro.samples]
        if at_once[0].step:
            found.append([])
    assert found.pop() == []
    return [sorted(step) for step in found]


def places(micro_batches):
    """What each micro-batch trains on, and how far the data are used up where it ends a step."""
    return [(micro.samples, micro.step and micro.step.consumed) for micro in micro_batches]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_records_of_a_step_do_not_depend_on_the_number_of_ranks(seed, num_ranks):
    costs, order = random_records(seed)
    assert steps(run(costs, order, num_ranks=num_ranks)) == steps(run(costs, order))


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_the_records_of_a_step_do_not_depend_on_the_window(seed, window):
    costs, order = random_records(seed)
    assert steps(run(costs, order, window=window)) == steps(run(costs, order))


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("known", [range(60), range(40), range(0, 60, 7)])
def test_nothing_depends_on_which_sizes_are_known_before(known, num_ranks):
    costs, order = random_records(0)
    ranks = run(costs, order, num_ranks=num_ranks)
    assert [*map(places, run(costs, order, num_ranks=num_ranks, known=known))] == [*map(places, ranks)]


@pytest.mark.parametrize("window", [7, 1000])
def test_a_sample_is_sized_once_in_all_epochs_and_one_whose_size_is_known_never(window):
    costs, order = random_records(0)
    data = StandIn(costs, known=range(20))
    data.looked_at.clear()
    epochs = np.concatenate([order, order[::-1]])
    list(schedule(data, epochs, tokens_per_batch=100, tokens_per_micro_batch=50, window=window))
    list(schedule(data, epochs, tokens_per_batch=100, tokens_per_micro_batch=50, window=window))
    assert sorted(data.looked_at) == list(range(20, 60))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_run_in_lockstep(seed, num_ranks):
    ranks = run(*random_records(seed), num_ranks=num_ranks)
    beats = [[micro.step for micro in rank] for rank in ranks]
    assert all(rank == beats[0] for rank in beats)
    assert beats[0][-1]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_every_record_is_used_once_or_reported_once_or_has_nothing_to_score(seed, num_ranks):
    costs, order = random_records(seed)
    ranks = run(costs, order, num_ranks=num_ranks)
    used = sorted(index for rank in ranks for micro in rank for index in micro.samples)
    assert used == [index for index, cost in enumerate(costs) if cost]
    errors = [error for micro in ranks[0] if micro.step for error in micro.step.notes.errors]
    reported = sorted(int(error.source.rpartition(":")[2]) - 1 for error in errors)
    assert reported == [index for index, cost in enumerate(costs) if cost is None]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_budgets_hold_but_for_a_record_that_is_over_them_by_itself(seed, num_ranks):
    costs, order = random_records(seed)
    ranks = run(costs, order, num_ranks=num_ranks)
    micro_batches = [micro.samples for rank in ranks for micro in rank]
    for budget, batches in ((100, steps(ranks)), (50, micro_batches)):
        assert all(len(batch) <= 1 or sum(costs[index] for index in batch) <= budget for batch in batches)


def test_steps_of_a_number_of_pairs_take_as_many_whatever_they_cost():
    costs, order = random_records(0)
    found = steps(run(costs, order, num_ranks=2, pairs_per_step=8))
    assert [len(step) for step in found[:-1]] == [8] * (len(found) - 1)
    assert sorted(index for step in found for index in step) == [i for i, cost in enumerate(costs) if cost]


def test_a_rank_without_work_gets_empty_micro_batches():
    ranks = run([5, 5], [0, 1], num_ranks=4)
    assert [[micro.samples for micro in rank] for rank in ranks] == [[(0,)], [(1,)], [()], [()]]


@pytest.mark.parametrize("seed", range(3))
def test_started_at_the_consumed_records_it_gives_exactly_what_remained(seed):
    costs, order = random_records(seed)
    (whole,) = run(costs, order)
    for number, micro in enumerate(whole):
        if micro.step:
            (rest,) = run(costs, order, start=micro.step.consumed, window=7)
            assert places(rest) == places(whole[number + 1 :])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_change_nothing(num_workers):
    costs, order = random_records(0, count=200)
    options = {"tokens_per_batch": 300, "tokens_per_micro_batch": 100, "window": 150}
    alone, helped = (list(schedule(StandIn(costs), order, num_workers=n, **options)) for n in (0, num_workers))
    assert places(helped) == places(alone)


def test_worker_processes_without_shared_memory_are_told_what_gives_them_more(monkeypatch):
    bus_error = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that it is out of shared memory."
    )
    monkeypatch.setattr(
        module, "DataLoader", Mock(return_value=Mock(__iter__=Mock(side_effect=RuntimeError(bus_error))))
    )
    with pytest.raises(OSError, match=r"^/dev/shm: .*Bus error.* --shm-size 16g; or --num-workers 0"):
        next(module.load(StandIn([1]), [0], tokens_per_batch=1, tokens_per_micro_batch=1))


def test_the_last_step_has_consumed_everything_even_if_it_ends_in_errors():
    ((*_, last),) = run([5, None, 0, None], range(4))
    assert last.step.consumed == 4 and len(last.step.notes.errors) == 2


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_where_nothing_is_usable_the_only_step_is_empty_and_says_why(num_ranks):
    for (micro,) in run([None, 0], range(2), num_ranks=num_ranks):
        assert (micro.samples, micro.step.records, len(micro.step.notes.errors)) == ((), 0, 1)
    assert run([], []) == [[]]


def test_imbalance_is_the_slowest_rank_over_the_mean_at_every_micro_batch():
    assert imbalance([4, 4, 4, 4], 2) == 1
    assert imbalance([6, 2, 2, 6], 2) == 1.5
    assert imbalance([0, 0], 2) == 0
