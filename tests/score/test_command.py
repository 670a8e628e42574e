"""Batch scoring without Ray: every line of input ends as scores or as a named error, once, in order."""

import json
import multiprocessing
import platform
from collections import Counter

import pytest
import torch
from pyarrow import parquet

from mmrm_fast.cli import main
from mmrm_fast.config import ScoreConfig
from mmrm_fast.data.records import Group, RecordError, Records, iter_groups
from mmrm_fast.files import locked
from mmrm_fast.score.command import ScoringActor, error_row, finish, rows_of, score_or_say_why
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.score.shards import Shards


def test_a_model_that_is_not_one_is_refused_at_once(scoring, capsys):
    folder, data, _ = scoring
    assert main(["score", "--model", str(folder), "--data", str(data), "--out", str(folder / "out.jsonl")]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_a_folder_of_parquet_shards_with_normalised_scores(scoring, capsys, monkeypatch):
    folder, data, good = scoring
    monkeypatch.chdir(folder)
    (folder / "model" / "reward_stats.json").write_text(json.dumps({"mean": 0.5, "std": 2.0}))
    options = ["--format", "parquet", "--normalize", "--allow-errors", "--image-root", "."]
    arguments = ["score", "--model", "model", "--data", data.name, "--out", "out", *options]
    assert main(arguments) == 0
    rows = parquet.read_table(folder / "out" / "part-000000.parquet").to_pylist()
    (rewards,) = Scorer.from_pretrained(folder / "model", device="cpu").score([good[3]])
    assert [row["score"] for row in rows if row["record"] == 3] == pytest.approx([(rewards[0] - 0.5) / 2], abs=1e-5)
    assert len((folder / "out" / "errors.jsonl").read_text().splitlines()) == 2

    assert main(arguments) == 0, "a finished run that is started again has nothing to do"
    (folder / "out" / "part-000000.parquet").unlink()
    assert main(arguments) == 0
    assert "part-000000.parquet is gone: its records are scored again" in capsys.readouterr().out
    assert parquet.read_table(folder / "out" / "part-000000.parquet").to_pylist() == rows
    data.write_text(data.read_text() + "\n")
    assert main(arguments) == 2
    assert "other data" in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_a_file_that_is_there_is_replaced_only_where_that_is_asked_for(scoring, capsys):
    folder, data, _ = scoring
    arguments = ["score", "--model", str(folder / "model"), "--data", str(data), "--out"]
    (folder / "thesis.jsonl").write_text("mine")
    assert main([*arguments, str(folder / "thesis.jsonl")]) == 2
    assert "thesis.jsonl: is there already: --overwrite replaces it" in capsys.readouterr().err
    assert (folder / "thesis.jsonl").read_text() == "mine" and not (folder / "thesis.jsonl.parts").exists()
    assert main([*arguments, str(folder / "thesis.jsonl"), "--overwrite"]) == 3
    assert len((folder / "thesis.jsonl").read_text().splitlines()) == 7
    (folder / "folder.jsonl").mkdir()
    assert main([*arguments, str(folder / "folder.jsonl"), "--overwrite"]) == 2
    assert "folder.jsonl: a folder" in capsys.readouterr().err


def hold(folder, held, go_on):
    with locked(folder):
        held.set()
        go_on.wait(60)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("out", "folder_of_shards"), [("out.jsonl", "out.jsonl.parts"), ("out", "out")])
def test_a_second_process_on_one_output_is_refused_while_the_first_is_alive(scoring, capsys, out, folder_of_shards):
    folder, data, _ = scoring
    arguments = ["score", "--model", str(folder / "model"), "--data", str(data), "--out", str(folder / out)]
    context = multiprocessing.get_context("fork")
    held, go_on = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder / folder_of_shards, held, go_on))
    process.start()
    assert held.wait(60)
    assert main(arguments) == 2
    assert f"process {process.pid} on {platform.node()} is at work there" in capsys.readouterr().err
    go_on.set()
    process.join(60)
    assert main(arguments) == 3


@pytest.mark.usefixtures("without_ray")
def test_pairs_in_parquet_shards_are_records_to_train_on(scoring):
    folder, data, _ = scoring
    options = ["--out", str(folder / "pairs"), "--format", "parquet", "--to-pairs", "0"]
    assert main(["score", "--model", str(folder / "model"), "--data", str(data), *options]) == 3
    groups = list(iter_groups(Records(folder / "pairs", need_pairs=True)))
    assert [(group.id, len(group.pairs)) for group in groups] == [("a", 1), ("7", 1)]


# what is written


def scored(*rewards, pairs=()):
    group = Group("f:1", 7, "a", "What?", None, (), tuple(f"r{i}" for i in range(len(rewards))), pairs)
    return Scored(group, rewards, (False,) * len(rewards))


def test_best_of_is_the_response_with_the_highest_reward():
    (row,) = rows_of(scored(1.0, 3.0, 2.0, 3.0), ScoreConfig(best_of=True))
    assert (row["record"], row["response_index"], row["response"], row["score"]) == (7, 1, "r1", 3.0)


def test_pairs_are_best_and_worst_where_they_are_far_enough_apart():
    (row,) = rows_of(scored(1.0, 3.0, 2.0), ScoreConfig(to_pairs=2.0))
    assert (row["chosen"], row["rejected"], row["reward_margin"]) == ("r1", "r0", 2.0)
    assert rows_of(scored(1.0, 3.0, 2.0), ScoreConfig(to_pairs=2.1)) == []
    assert rows_of(scored(1.0), ScoreConfig(to_pairs=0.0)) == []


def test_scores_are_normalised_by_mean_and_deviation():
    assert [row["score"] for row in rows_of(scored(1.0, 3.0), ScoreConfig(), 2.0, 0.5)] == [-2.0, 2.0]


class Fragile:
    """A scorer that fails as a whole when a certain group is among the others."""

    def score_groups(self, groups):
        if any(isinstance(group, Group) and group.record == 3 for group in groups):
            raise RuntimeError("out of memory")
        return [group if isinstance(group, RecordError) else scored(1.0) for group in groups]


def test_a_failure_costs_only_the_record_at_fault():
    groups = [Group(f"f:{i}", i, None, "p", None, (), ("r",)) for i in range(6)]
    groups[5] = RecordError("f:6", "", "not valid JSON")
    results = score_or_say_why(Fragile(), groups)
    assert [type(result) for result in results] == [Scored] * 3 + [RuntimeError, Scored, RecordError]
    assert error_row(3, results[3])["error"] == "RuntimeError" and error_row(3, results[3])["reason"] == "out of memory"


def test_a_chunk_on_which_the_model_always_fails_is_not_done(write_jsonl, tmp_path, monkeypatch):
    class Broken:
        def score_groups(self, groups):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: Broken())
    data = write_jsonl([{"prompt": "p", "responses": ["a"]}] * 3)
    shards = Shards(tmp_path / "out", "jsonl", 3)
    shards.open({})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ScoringActor(ScoreConfig(data=data), shards, num_threads=torch.get_num_threads()).score(0)
    assert shards.todo() == [0]


def test_a_failure_in_a_file_whose_name_is_no_unicode_is_printed(tmp_path, capsys):
    shards = Shards(tmp_path, "jsonl", 1)
    error = error_row(0, RecordError("caf\udce9.jsonl:1", "", "not valid JSON"))
    assert finish(ScoreConfig(out=tmp_path), shards, Counter(records=1, failed=1), [error]) == 3
    assert "caf?.jsonl:1: not valid JSON" in capsys.readouterr().out
