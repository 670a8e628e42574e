"""A function of many records, in worker processes, with the results in order; and one that may never return."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Any

from torch.utils.data import DataLoader

CHUNK = 64  # records that a worker takes at a time
MOST = 8


def in_order(
    function: Callable[[int], Any], ranges: Iterable[range], *, num_workers: int = 0, ahead: int = 1024
) -> Iterator[Any]:
    """`function(index)` for every index of the ranges, in order, computed by `num_workers` processes (0: by this one).

    From when the first is asked for, at least `ahead` results are computed before they are.
    """
    chunks = (indices[at : at + CHUNK] for indices in ranges for at in range(0, len(indices), CHUNK))
    options = {}
    if num_workers:
        options = {"num_workers": num_workers, "prefetch_factor": max(2, -(-ahead // (CHUNK * num_workers)))}
    for results in DataLoader(Values(function), batch_sampler=chunks, collate_fn=list, **options):
        yield from results


class Values:
    """A function of an index as a torch data set."""

    def __init__(self, function: Callable[[int], Any]):
        self.function = function

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


def idle_workers() -> int:
    """Processes that fit on this machine's CPUs while nothing trains: its share a rank, at most `MOST`."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST, max(1, len(os.sched_getaffinity(0)) // ranks_here))


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns or raises; `TimeoutError` where that takes longer, and its thread is left to itself."""
    outcome: Future = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    wait([outcome], seconds)
    if not outcome.done():
        raise TimeoutError
    return outcome.result()
