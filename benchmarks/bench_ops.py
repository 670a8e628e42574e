"""The op cases under pytest-benchmark: `pytest benchmarks --benchmark-only`; the only file here that needs pytest."""

import pytest

from benchmarks import (
    bench_pack_image_tokens,
    bench_pair_loss,
    bench_patchify,
    bench_pixel_shuffle_norm,
    bench_plan_trie,
)

MODULES = (
    bench_pair_loss,
    bench_pack_image_tokens,
    bench_pixel_shuffle_norm,
    bench_patchify,
    bench_plan_trie,
)
CASES = {bench.title(*case): (bench, case) for bench in MODULES for case in bench.CASES}


@pytest.mark.parametrize("side", ["ours", "baseline"])
@pytest.mark.parametrize("title", CASES)
def test_op(benchmark, title, side):
    bench, case = CASES[title]
    sides = bench.make_sides(*case)
    assert all(check.passed for check in bench.checks(sides))
    benchmark.group = title
    benchmark(sides["ours" if side == "ours" else bench.BASELINE])
