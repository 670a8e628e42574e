"""Batch scoring on Ray: every line of input ends as scores or as a named error, once, in order."""

import json

import pytest

from mmrm_fast.cli import main
from mmrm_fast.scorer import Scorer
from mmrm_fast.weights import save_checkpoint


@pytest.fixture
def scoring(make_checkpoint, pictures, write_jsonl, tmp_path):
    """A model folder and a JSONL of good and bad lines; the good ones by line position."""
    save_checkpoint(tmp_path / "model", make_checkpoint(max_length=256))
    (tmp_path / "empty.png").write_bytes(b"")
    good = {
        0: {
            "id": "a",
            "prompt": "What is this?",
            "img_path": "photo.png",
            "responses": ["two", "", "two", "long " * 300],
        },
        3: {"prompt": "No picture", "responses": ["naïve 图 😀"]},
        4: {"id": 7, "prompt": "Pairs score too", "img_path": "wide.png", "chosen": "x", "rejected": "y"},
    }
    lines = [good[0], "{", {"prompt": "no image", "img_path": "empty.png", "responses": ["a"]}, good[3], good[4]]
    return tmp_path, write_jsonl(lines), good


def test_scoring_a_file(scoring, capsys):
    folder, data, good = scoring
    out = folder / "out.jsonl"
    arguments = ["--model", str(folder / "model"), "--data", str(data), "--out", str(out), "--actors", "1"]
    assert main(["score", *arguments]) == 3
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["record"], row["response_index"]) for row in rows] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (3, 0),
        (4, 0),
        (4, 1),
    ]
    assert list(rows[0]) == ["id", "record", "response_index", "prompt", "img_path", "response", "score", "truncated"]
    assert [row["id"] for row in rows] == ["a"] * 4 + [None] + ["7"] * 2
    assert [row["truncated"] for row in rows] == [False, False, False, True, False, False, False]
    assert rows[0]["img_path"] == "photo.png" and rows[4]["response"] == "naïve 图 😀"
    assert rows[0]["score"] == rows[2]["score"] != rows[1]["score"]

    record = {**good[0], "img_path": str(folder / "photo.png")}
    (rewards,) = Scorer.from_pretrained(folder / "model", device="cpu").score([record])
    assert [row["score"] for row in rows[:4]] == pytest.approx(rewards, abs=1e-5)

    errors = [json.loads(line) for line in (folder / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [error["source"].rsplit(":")[-1] for error in errors] == ["2", "3"]
    printed = capsys.readouterr().out
    assert "3 of 5 records scored" in printed and "records.jsonl:2" in printed and "empty.png" in printed


def test_a_model_that_is_not_one_is_refused_at_once(scoring, capsys):
    folder, data, _ = scoring
    assert main(["score", "--model", str(folder), "--data", str(data), "--out", str(folder / "out.jsonl")]) == 2
    assert "config.json" in capsys.readouterr().err
