"""A model and records to score, and a scoring without Ray."""

import pytest

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.score.command import ScoringActor


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


def in_this_process(config, shards, chunks):
    """The counts of chunks, scored without Ray."""
    return map(ScoringActor(config, shards, num_threads=1).score, chunks)


@pytest.fixture
def without_ray(monkeypatch):
    """Chunks are scored in this process: for what is written, not for who writes it."""
    monkeypatch.setattr("mmrm_fast.score.command.scored_chunks", in_this_process)
