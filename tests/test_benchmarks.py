"""The benchmarks' own promises: counted FLOPs, runs that continue, regressions that are listed."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Sizes, batch_work
from benchmarks.harness import Row
from benchmarks.models import Geometry, make_model, make_records
from benchmarks.report import ResultFile, read_rows, regressions

TINY = Geometry(56, 32, 10, 0.1, vision_layers=1, text_layers=2, vocab_size=64)
ROW = Row("score", "score 1x1", "cpu", "float32", 1.0, "padded", 5.0, 5.0, spread=0.05, verified=True)


@pytest.mark.parametrize("trained", [False, True])
def test_products_are_counted_as_torch_counts_them(trained):
    """Attention is an op of its own, of which torch's counter knows nothing."""
    model = make_model(TINY)
    batch = make_records(TINY, [(3, (120, 100)), (1, (200, 80))]).pack()
    with FlopCounterMode(display=False) as counter:
        rewards = model(batch.main, batch.tiles)
        if trained:
            rewards.sum().backward()
    counted = batch_work(Sizes.of(model.model.config), batch, trained=trained).linear_flops
    assert counted == counter.get_total_flops()


def test_an_interrupted_run_continues_where_its_environment_is_the_same(tmp_path):
    path = tmp_path / "rows.json"
    ResultFile(path, {"cpu": "a"}, resume=True).add("score: 1x1", [ROW])
    assert read_rows(path) == [ROW]
    assert ResultFile(path, {"cpu": "a"}, resume=True).finished == ["score: 1x1"]
    assert ResultFile(path, {"cpu": "b"}, resume=True).finished == []
    assert ResultFile(path, {"cpu": "a"}, resume=False).rows == []


@pytest.mark.parametrize(("seconds", "listed"), [(1.0, 0), (1.09, 0), (1.2, 1)])
def test_a_row_that_takes_a_tenth_longer_is_a_regression(seconds, listed):
    assert len(regressions([replace(ROW, seconds=seconds)], [ROW])) == listed


def test_what_the_spread_explains_is_no_regression():
    assert not regressions([replace(ROW, seconds=1.2, spread=0.3)], [ROW])


def test_batches_of_the_benchmarks_are_what_they_say():
    records = make_records(TINY, [(3, (120, 100))])
    white, text = (records.pack(with_text=True, white=white) for white in (True, False))
    assert white.text_tiles is not None and text.text_tiles is None
    assert len(white.text.source_T) - len(text.text.source_T) == TINY.tokens_per_tile
    assert torch.equal(white.main.source_T, text.main.source_T)
