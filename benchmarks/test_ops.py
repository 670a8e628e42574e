"""The table of ops under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

import pytest

import benchmarks.run  # noqa: F401 before torch is loaded, for which it sets variables
from benchmarks.bench_ops import OPS, checks, prepare


@pytest.mark.parametrize("side", ["ours", "baseline"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_op(benchmark, op, side):
    run, baseline = prepare(op), next(iter(op.baselines.values()))
    assert all(error <= bound for error, bound in checks(op, run, baseline))
    benchmark.group = op.name
    benchmark(run, op.ours if side == "ours" else baseline)
