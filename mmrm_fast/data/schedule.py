"""Samples in a given order to packed micro-batches on every rank: steps, micro-batches, worker processes.

Sizes that are not known yet are found a window ahead: each rank's workers look at their share and the ranks exchange
what they found, so that all of them cut the same steps. A sample is sized once, however often it is trained on.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
from torch.utils.data import DataLoader

from mmrm_fast.data.mixture import UNKNOWN, PreferenceDataset
from mmrm_fast.data.packing import MicroBatch, Packed, Step, pack_items
from mmrm_fast.data.samples import Notes, Size
from mmrm_fast.data.workers import Values, in_order

WINDOW = 4096


def load(
    dataset: PreferenceDataset, order: Sequence[int], *, num_workers: int = 0, pin_memory: bool = False, **options
) -> Iterator[Packed]:
    """The packed micro-batches of `schedule`, in its order, prepared by `num_workers` processes (0: by this one).

    Raises:
        OSError: the processes have no room for what they hand over.
    """
    micro_batches = schedule(dataset, order, num_workers=num_workers, **options)
    packed = Values(partial(pack_micro_batch, dataset))
    options = {"batch_size": None, "num_workers": num_workers, "pin_memory": pin_memory}
    try:
        yield from DataLoader(packed, sampler=micro_batches, **options)
    except RuntimeError as error:
        if "shared memory" not in str(error) and "shm" not in str(error):
            raise
        raise OSError(f"/dev/shm: {error}; a container has more with --shm-size 16g; or --num-workers 0") from error


def pack_micro_batch(dataset: PreferenceDataset, micro: MicroBatch) -> Packed:
    """Prepare and pack a micro-batch."""
    return pack_items(dataset.preparer, micro.samples, dataset.prepared, micro.step)


def schedule(
    dataset: PreferenceDataset,
    order: Sequence[int],
    *,
    tokens_per_micro_batch: int,
    tokens_per_batch: int = 0,
    pairs_per_step: int | None = None,
    start: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Callable[[list], list] = list,
    num_workers: int = 0,
    window: int = WINDOW,
) -> Iterator[MicroBatch]:
    """One rank's micro-batches over the samples of `order`; which samples make a step depends on no rank.

    Consecutive samples are cut into steps, and each step is balanced over the ranks in micro-batches of at most
    `tokens_per_micro_batch`; every rank gets equally many. Where no sample can be used the only step is empty.

    Args:
        order: samples by their index; what is not known of them is filled into the data set's table.
        tokens_per_micro_batch: work of one micro-batch, see `Sample.cost`; a sample over it stands alone.
        tokens_per_batch: work of one step over all ranks.
        pairs_per_step: cut steps by this number of pairs instead.
        start: position in the order to begin at. A step's `consumed` gives what an uninterrupted run goes on with.
        gather: lists of all ranks to one list, on every rank, in lockstep.
        num_workers: processes that size samples ahead; 0 sizes them here.
        window: samples sized together; no step depends on it.
    """
    pending: list[Size] = []
    for end, sizes in size_windows(dataset, order, start, rank, num_ranks, gather, num_workers, window):
        pending += sizes
        first, at_end = end - len(pending), end == len(order)
        budget = pairs_per_step or tokens_per_batch
        runs = cut([size.pairs if pairs_per_step else size.cost for size in pending], budget)
        rest = [] if at_end else pending[runs.pop().start :]
        for run in runs:
            sized = {first + item: pending[item] for item in run}
            yield from step_micro_batches(order, sized, tokens_per_micro_batch, rank, num_ranks)
        pending = rest


def step_micro_batches(order, sized: dict[int, Size], limit: int, rank: int, num_ranks: int) -> Iterator[MicroBatch]:
    """One rank's micro-batches of the step whose samples are sized by their position in the order."""
    usable = [position for position, size in sized.items() if size.cost]
    costs = [sized[position].cost for position in usable]
    bins = balance(costs, limit, num_ranks)
    notes = sum((size.notes for size in sized.values() if size.notes), Notes())
    loads = [sum(costs[item] for item in items) for items in bins]
    step = Step(max(sized) + 1, len(usable), imbalance(loads, num_ranks), notes)
    mine = [tuple(int(order[usable[item]]) for item in items) for items in bins[rank::num_ranks]]
    yield from map(MicroBatch, mine[:-1])
    yield MicroBatch(mine[-1], step)


def size_windows(
    dataset: PreferenceDataset, order, start: int, rank: int, num_ranks: int, gather, num_workers: int, window: int
) -> Iterator[tuple[int, list[Size]]]:
    """(end, sizes) of consecutive windows of the order; of what is not known each rank sizes its share."""
    windows = [np.asarray(order[at : at + window]) for at in range(start, len(order), window)]
    news = first_seen(windows, dataset.table["cost"] == UNKNOWN)
    shares = [new[rank::num_ranks] for new in news]
    rows = in_order(dataset.look, shares, num_workers=num_workers, ahead=window // num_ranks)
    for own, new, share in zip(windows, news, shares, strict=True):
        if len(new):
            for index, row in gather([*zip(share.tolist(), islice(rows, len(share)), strict=True)]):
                dataset.table[index] = row
        start += len(own)
        yield start, [dataset.size(index) for index in own]


def first_seen(windows: list[np.ndarray], unknown: np.ndarray) -> list[np.ndarray]:
    """What each window has that is unknown and in no window before it."""
    news = []
    for own in windows:
        news.append(np.unique(own[unknown[own]]))
        unknown[own] = False
    return news


def cut(costs: Sequence[int], budget: int) -> list[range]:
    """Consecutive runs of items whose costs sum to at most `budget`; an item over it stands alone.

    Items without cost belong to the run before them (the first ones to the run after).
    """
    runs, start, total = [], 0, 0
    for index, cost in enumerate(costs):
        if total and cost and total + cost > budget:
            runs.append(range(start, index))
            start, total = index, 0
        total += cost
    return [*runs, range(start, len(costs))] if len(costs) else []


def balance(costs: Sequence[int], limit: int, num_ranks: int) -> list[list[int]]:
    """Deal items into a multiple of `num_ranks` bins of at most `limit` each (an item over it stands alone).

    Largest first into the emptiest bin; bins may be empty. Items keep their order inside a bin. Rank r takes
    `bins[r::num_ranks]`.
    """
    least = -(-sum(min(cost, limit) for cost in costs) // limit)
    num_bins = -(-max(1, least) // num_ranks) * num_ranks
    while True:
        bins = deal(costs, num_bins)
        if all(len(items) <= 1 or sum(costs[item] for item in items) <= limit for items in bins):
            return bins
        num_bins += num_ranks


def deal(costs: Sequence[int], num_bins: int) -> list[list[int]]:
    """Each item, largest first, into the emptiest of `num_bins`."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + costs[item], number))
        bins[number].append(item)
    return [sorted(items) for items in bins]


def imbalance(loads: Sequence[int], num_ranks: int) -> float:
    """Max over mean cost of the ranks, which wait for each other after every micro-batch: 1 is perfect."""
    slowest = sum(max(loads[at : at + num_ranks]) for at in range(0, len(loads), num_ranks))
    return slowest * num_ranks / (sum(loads) or 1)
