"""A reward that is NaN or infinite is an error of its record everywhere: never written, picked or averaged."""

import json

import httpx
import pytest
import torch
from reward_server import running
from runs import read

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.cli import main
from mmrm_fast.data.types import RewardError
from mmrm_fast.score.command import ScoringActor
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train.command import train

POISON = "~"  # a token whose embedding is infinite
REASON = "the model's reward is nan, not a finite number"


@pytest.fixture
def folder(make_checkpoint, tmp_path):
    """A reward model that gives NaN to whatever holds POISON."""
    checkpoint = make_checkpoint(max_length=256)
    (token,) = checkpoint.tokenizer.encode(POISON)
    with torch.no_grad():
        checkpoint.model.model.language_model.embed_tokens.weight[token] = torch.inf
    save_checkpoint(tmp_path / "poisoned", checkpoint)
    return tmp_path / "poisoned"


@pytest.fixture
def scored_here(monkeypatch):
    """Chunks are scored in this process."""
    here = lambda config, shards, chunks: map(ScoringActor(config, shards, num_threads=1).score, chunks)  # noqa: E731
    monkeypatch.setattr("mmrm_fast.score.command.scored_chunks", here)


def strict(line):
    """JSON as the standard has it, without NaN."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_scorer_says_which_response_got_none_and_scores_its_neighbours(folder):
    scorer = Scorer.from_pretrained(folder, "cpu")
    with pytest.raises(RewardError, match=rf"records\[1\]: response 1: {REASON}"):
        scorer.score([{"prompt": "What?", "responses": ["two"]}, {"prompt": "What?", "responses": ["two", POISON]}])
    (alone,) = scorer.score([{"prompt": "What?", "responses": ["two"]}])
    assert alone == pytest.approx(
        Scorer.from_pretrained(folder, "cpu").score([{"prompt": "What?", "responses": ["two"]}])[0]
    )


@pytest.mark.usefixtures("scored_here")
@pytest.mark.parametrize(
    ("options", "columns"), [((), "response"), (("--best-of",), "response"), (("--to-pairs", "0"), "chosen")]
)
def test_scoring_writes_no_such_record_and_picks_nothing_of_it(folder, write_jsonl, tmp_path, capsys, options, columns):
    good = {"prompt": "What?", "responses": ["two red circles", "I think so."]}
    data = write_jsonl([good, {"prompt": "Which?", "responses": ["two", POISON, "cat"]}, good])
    out = tmp_path / "out.jsonl"
    assert main(["score", "--model", str(folder), "--data", str(data), "--out", str(out), *options]) == 3
    rows = [strict(line) for line in out.read_text().splitlines()]
    assert {row["record"] for row in rows} == {0, 2} and all(row[columns] for row in rows)
    (error,) = map(strict, (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines())
    assert (error["record"], error["field"], error["error"]) == (1, "response 1", "RewardError")
    printed = capsys.readouterr().out
    assert "2 of 3 records scored" in printed and f"records.jsonl:2: response 1: {REASON}" in printed


def test_the_server_answers_500_with_the_reason_and_logs_it_once(folder, caplog):
    with running(Scorer.from_pretrained(folder, "cpu")) as url:
        ask = lambda *texts: httpx.post(f"{url}/rerank", json={"query": "?", "documents": texts}, timeout=30)  # noqa: E731
        answers = [ask("two", POISON), ask("two", "cat"), ask(POISON), ask(POISON)]
    assert [answer.status_code for answer in answers] == [500, 200, 500, 500]
    assert all(REASON in answer.json()["error"]["message"] for answer in answers if answer.status_code == 500)
    assert answers[0].json()["error"]["param"] == "response 1"
    (logged,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert REASON in logged.getMessage()


def test_evaluation_names_the_item_and_leaves_it_out_of_the_figures(folder, write_jsonl, tmp_path, capsys):
    rows = [
        {"id": f"item {i}", "prompt": "?", "chosen": text, "rejected": "cat"} for i, text in enumerate(["two", POISON])
    ]
    data, out = write_jsonl(rows), tmp_path / "out"
    assert main(["evaluate", "--data", str(data), "--model", str(folder), "--output-dir", str(out)]) == 3
    results = strict((out / "results.json").read_text())
    assert results["metrics"]["all"]["pairs"] == 1 and [row["id"] for row in results["unscored"]] == ["item 1"]
    assert f"item 1: {data}:2: response 0: {REASON}" in capsys.readouterr().out


def test_training_names_the_pair_and_leaves_it_out_of_the_figures(make_config, folder, write_jsonl, capsys):
    rows = [{"prompt": "?", "chosen": text, "rejected": "cat"} for text in ("two", POISON)]
    some, none = write_jsonl(rows, "some.jsonl"), write_jsonl(rows[1:], "none.jsonl")
    options = {"eval": (f"some={some}", f"none={none}"), "eval_every": 1, "max_steps": 2}
    run = train(make_config("run", model=folder, **options))
    results = strict((run / "results.json").read_text())
    assert (results["some"]["pairs"], results["none"]["pairs"], results["none"]["accuracy"]) == (1, 0, None)
    assert [strict(line)["chosen"] for line in (run / "eval-some.jsonl").read_text().splitlines()] == [0]
    assert {row["source"] for row in read(run / "skipped.jsonl")} == {f"{some}:2", f"{none}:1"}
    printed = capsys.readouterr()
    assert f"{some}:2: responses 0 and 1, reward: {REASON}" in printed.err
    assert "none -\n" in printed.out
