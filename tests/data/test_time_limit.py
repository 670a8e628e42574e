"""Code that loops without end is interrupted, and nothing else is."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from mmrm_fast.data.time_limit import Overtime, TimeLimit


def for_ever():
    for _ in count():
        pass


def test_what_loops_without_end_is_interrupted_in_whatever_thread_and_nothing_else_is():
    limit = TimeLimit(0.2)
    with ThreadPoolExecutor(3) as pool:
        endless = [pool.submit(limit, for_ever) for _ in range(2)]
        assert sum(limit(lambda i=i: i) for i in range(1000)) == sum(range(1000))
        for future in endless:
            with pytest.raises(Overtime):
                future.result(60)
    with pytest.raises(ZeroDivisionError):
        limit(lambda: 1 / 0)
    assert limit(int, "11", base=2) == 3


def interrupted_here(limit):
    with pytest.raises(Overtime):
        limit(for_ever)


def test_a_fork_has_a_limit_too():
    limit = TimeLimit(0.2)
    interrupted_here(limit)
    process = multiprocessing.get_context("fork").Process(target=interrupted_here, args=(limit,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
