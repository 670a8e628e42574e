"""What other programs' reward clients sent, sent again: `scripts/peers/check_clients.py --record` wrote it down.

OpenRLHF 0.11.2 (/get_reward), verl 0.9.1 (/classify, /v1/embeddings and its reward file), TRL 1.16 (/score, /classify).
"""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from reward_server import running

from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train.command import TINY_CHECKPOINT

EXCHANGES = [json.loads(line) for line in Path(__file__).with_name("exchanges.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A server of the model and the pictures that the clients were checked with."""
    root, tiny = tmp_path_factory.mktemp("exchanges"), CheckpointFolder(TINY_CHECKPOINT).load()
    with torch.no_grad():
        tiny.model.score.weight.copy_(torch.linspace(-2, 2, tiny.model.score.weight.numel())[None])
    save_checkpoint(root / "model", tiny)
    for name, width, height in (("a.png", 56, 56), ("b.png", 120, 60)):
        colours = np.random.default_rng(width).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(colours.repeat(height // 4, 0).repeat(width // 4, 1)).save(root / name)
    scorer = Scorer.from_pretrained(root / "model", "cpu", max_length=2048)
    with running(scorer, image_root=root, index={"17": {"images": ["a.png"]}}) as url, httpx.Client() as client:
        client.base_url = url
        yield client


def numbers(value):
    """Every number in an answer, in order."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, float) else [number for item in items for number in numbers(item)]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda own: f"{own['path']} {own['status']}")
def test_a_request_of_another_programs_client_is_answered_as_it_was(client, exchange):
    answer = client.post(exchange["path"], json=exchange["body"])
    assert answer.status_code == exchange["status"], answer.text
    found = {name: answer.json()[name] for name in exchange["answer"]}
    assert numbers(found) == pytest.approx(numbers(exchange["answer"]), abs=1e-4)
