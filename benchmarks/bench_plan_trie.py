"""plan_trie in C++ against its Python reference: 64 responses to one long prompt."""

from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial

import numpy as np

from benchmarks.harness import Check, Options, Row, interleaved, make_row
from mmrm_fast.ops.plan_trie import TriePlan, plan_trie, plan_trie_ref

NUM_SEQUENCES, LENGTH, SHARED = 64, 2300, 2100
MIN_SHARED = 32
CASES = ((),)
BASELINE = "Python"


def rows(options: Options) -> Iterator[Row]:
    """One row."""
    sides = make_sides()
    ours, theirs = interleaved(list(sides.values()), repeats=options.repeats)
    yield make_row("plan", title(), "int64", ours=ours, baseline=BASELINE, theirs=theirs, checks=checks(sides))


def title() -> str:
    """The row's name."""
    return f"plan_trie N={NUM_SEQUENCES} x {LENGTH:,}"


def make_sides() -> dict[str, Callable[[], TriePlan]]:
    """Both implementations on the same sequences."""
    keys = np.random.default_rng(0).integers(0, 150_000, (NUM_SEQUENCES, LENGTH))
    keys[:, :SHARED] = keys[0, :SHARED]
    cu_seqlens = np.arange(0, keys.size + 1, LENGTH)
    return {
        "ours": partial(plan_trie, keys.reshape(-1), cu_seqlens, min_shared=MIN_SHARED),
        BASELINE: partial(plan_trie_ref, keys.reshape(-1), cu_seqlens, MIN_SHARED),
    }


def checks(sides: dict[str, Callable[[], TriePlan]]) -> list[Check]:
    """Equal arrays, or an infinite error."""
    plans = [astuple(side()) for side in sides.values()]
    equal = all(np.array_equal(array, expected) for array, expected in zip(*plans, strict=True))
    return [Check(0.0 if equal else float("inf"), 0.0)]
