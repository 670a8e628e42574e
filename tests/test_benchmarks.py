"""The benchmarks' own promises: counted FLOPs, runs that continue, regressions that are listed."""

import gc
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import bench_ops, bench_score, bench_train_step, report
from benchmarks.bench_ops import digest
from benchmarks.flops import ATTENTION_BACKWARD, counted, visible_pairs
from benchmarks.harness import Baseline, Check, Comparison, Options, Row, compare, peak_bytes, relative_error
from benchmarks.models import Geometry, make_model, make_records
from benchmarks.report import ResultFile, read_rows, regressions
from mmrm_fast.data.packing import Packed, map_tensors
from mmrm_fast.ops.trie_attention import visible_keys

TINY = Geometry(56, 32, 10, 0.1, vision_layers=1, text_layers=2, vocab_size=64)
ROW = Row("score", "score 1x1", "cpu", "float32", 1.0, "padded", 5.0, 5.0, spread=0.05, verified=True)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """What is measured begins with a collection, which need not walk through all of torch."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_a_step_computes_every_shared_token_once_and_no_product_more():
    """One image of 3 tiles, a prompt and two responses; the last layer runs on what is read, the tower is frozen."""
    hidden, _, kv_heads, mlp = TINY.text
    width, _, vision_mlp = TINY.vision
    heads, head_size, patches, tiles = 8, 64, 16, 3
    start, responses = 32 + tiles * TINY.tokens_per_tile + 10, (12, 10)
    tokens, read = start + sum(responses), len(responses)
    kv, other = 2 * hidden * kv_heads * head_size, 2 * hidden * heads * head_size + 3 * hidden * mlp
    weights = TINY.text_layers * kv * tokens + other * ((TINY.text_layers - 1) * tokens + read)
    pairs = sum(triangle(start + response) for response in responses) - triangle(start)
    read_pairs = read * start + sum(responses)
    attention = 4 * heads * head_size * ((TINY.text_layers - 1) * pairs + read_pairs)
    rows = patches + 1
    layer = 2 * rows * (4 * width**2 + 2 * width * vision_mlp) + 4 * width * rows**2
    projector = 3 * 2 * TINY.tokens_per_tile * (4 * width * hidden + hidden**2)
    vision = tiles * (2 * patches * 3 * 14 * 14 * width + TINY.vision_layers * layer + projector)
    model = make_model(TINY)
    batch = make_records(TINY, [(tiles, (120, 100))]).pack()
    _, work = counted(lambda: model(batch.main, batch.tiles).sum().backward())
    assert work.flops == pytest.approx(3 * 2 * weights + (1 + ATTENTION_BACKWARD) * attention + vision, rel=1e-6)


def triangle(length: int) -> float:
    """(query, key) pairs of a causal sequence."""
    return length * (length + 1) / 2


def test_a_padded_step_counts_what_its_causal_mask_leaves():
    query, key = (torch.randn(1, 2, length, 8) for length in (6, 6))
    flops = [
        counted(partial(scaled_dot_product_attention, query, key, key, is_causal=c))[1].flops for c in (True, False)
    ]
    assert flops == [4 * 2 * 8 * 21, 4 * 2 * 8 * 36]


@pytest.mark.parametrize("window", [None, 1, 4, 6, 20])
def test_the_pairs_that_a_window_hides_are_not_counted(window):
    edges = {"cu_seqlens_q": torch.tensor([0, 3, 8]), "cu_seqlens_k": torch.tensor([0, 7, 12]), "window": window}
    expected = visible_keys(3, 7, window).sum() + visible_keys(5, 5, window).sum()
    assert visible_pairs({"q": None, **edges}) == expected


def test_an_interrupted_run_continues_where_its_environment_is_the_same(tmp_path):
    path = tmp_path / "rows.json"
    ResultFile(path, {"cpu": "a"}, resume=True).add("score: 1x1", [ROW])
    assert read_rows(path) == [ROW]
    assert ResultFile(path, {"cpu": "a"}, resume=True).finished == ["score: 1x1"]
    assert ResultFile(path, {"cpu": "b"}, resume=True).finished == []
    assert ResultFile(path, {"cpu": "a"}, resume=False).rows == []
    assert [each.name for each in tmp_path.iterdir()] == ["rows.json"]


def test_an_interrupted_run_continues_on_the_next_day_but_not_after_a_change_of_the_code(tmp_path):
    today, before = (tmp_path / f"{day}-cpu-full.json" for day in (date.today().isoformat(), "2020-02-03"))
    ResultFile(before, {"date": "2020-02-03", "commit": "a"}, resume=True).add("score: 1x1", [ROW])
    ResultFile(tmp_path / "2020-02-04-cpu.json", {"date": "2020-02-04", "commit": "a"}, resume=True).add("other", [])
    continued = ResultFile(today, {"date": "2020-02-05", "commit": "a"}, resume=True)
    assert (continued.path, continued.finished, continued.rows) == (before, ["score: 1x1"], [ROW])
    assert continued.environment["date"] == "2020-02-03"
    changed = ResultFile(today, {"date": "2020-02-05", "commit": "b"}, resume=True)
    assert (changed.path, changed.finished) == (today, [])


def test_running_needs_no_pytest():
    blocked = "import sys; sys.modules['pytest'] = None; import benchmarks.run"
    subprocess.run([sys.executable, "-c", blocked], cwd=Path(report.__file__).parents[1], check=True)


def test_a_row_without_a_check_is_not_verified():
    checks = ([], [Check(0.5, 1.0), Check(0.1, 1.0)], [Check(0.5, 0.4)], [Check(float("nan"), 1.0)])
    baselines = {str(number): Baseline(time.perf_counter, each) for number, each in enumerate(checks)}
    comparison = Comparison("ops", "a case", torch.float32, time.perf_counter, baselines)
    rows = list(compare(comparison, Options(quick=True)))
    found = [(row.verified, row.max_error) for row in rows]
    assert found == [(None, None), (True, 0.5), (False, 0.5), (False, None)]


def test_the_peak_of_a_call_on_a_gpu_is_its_allocators(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        is_available=lambda: True, reset_peak_memory_stats=lambda: calls.append("reset"),
        memory_allocated=lambda: 100, max_memory_allocated=lambda: 350,
    ))  # fmt: skip
    assert peak_bytes(lambda: calls.append("call")) == 250
    assert calls == ["reset", "call"]


def test_the_error_of_a_score_near_zero_is_relative_to_what_scores_usually_are():
    scores, others = torch.tensor([1e-6]), torch.tensor([2e-6])
    assert relative_error(scores, others) == pytest.approx(0.5)
    assert relative_error(scores, others, least=0.1) == pytest.approx(1e-5)
    assert relative_error(scores * 1e6, others * 1e6, least=0.1) == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_score_alone_is_verified(dtype, monkeypatch):
    monkeypatch.setattr(bench_score, "geometry", lambda options: TINY)
    rows = list(bench_score.rows("score", "score 1x1", ((1, (40,)),), dtype, Options(quick=True)))
    assert [(row.baseline, row.verified) for row in rows] == [("padded", True), ("reference", True)]


def test_a_step_with_another_proxy_is_timed_but_not_verified():
    records = partial(make_records, TINY, [(1, (40, 50))])
    rows = bench_train_step.rows("robust", records, "text", torch.float32, Options(quick=True))
    assert {row.baseline: row.verified for row in rows} == {"padded": True, "reference, white proxy": None}


def test_without_a_compiler_an_op_is_compared_with_eager_alone(capsys):
    def fail(*_):
        raise RuntimeError("No working C++ compiler found\nand more")

    op = bench_ops.pair_loss_op(8)
    op = replace(op, baselines={"torch.compile": fail, "eager": op.baselines["eager"]})
    (row,) = bench_ops.rows(op, Options(quick=True))
    assert (row.baseline, row.verified, row.bound_fraction > 0) == ("eager", True, True)
    assert "no row against torch.compile, No working C++ compiler found\n" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["token_index", "cu_seqlens_k"])
def test_an_op_that_gives_other_results_fails(part):
    (op,) = (op for op in bench_ops.OPS if op.suite == "plan")

    def wrong(*inputs):
        plan = op.ours(*inputs)
        return replace(plan, **{part: getattr(plan, part) + 1})

    (row,) = bench_ops.rows(replace(op, ours=wrong), Options(quick=True))
    assert row.verified is False and row.max_error > 0


def test_every_op_has_a_name_of_its_own():
    assert len({op.name for op in bench_ops.OPS}) == len(bench_ops.OPS)


@pytest.mark.parametrize("name", ["tiles", "margin_P", "main", "text", "chosen_P"])
def test_the_loaders_digest_is_of_every_part_of_a_batch(name):
    batch = make_records(TINY, [(3, (120, 100))]).pack(with_text=True)
    batch = replace(batch, margin_P=torch.tensor([1.0]))
    part = getattr(batch, name)
    other = part + 1 if isinstance(part, torch.Tensor) else map_tensors(part, lambda tensor: tensor + 1)
    batches = (batch, replace(batch), replace(batch, **{name: other}))
    digests = [digest(Packed(each, (), {}, None)).tolist() for each in batches]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_of_any_day_can_be_compared_with(path):
    rows = read_rows(path)
    slower = [replace(row, seconds=10 * row.seconds) for row in rows]
    assert not regressions(rows, rows)
    assert len(regressions(slower, rows)) == sum(not row.computed for row in rows)


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
