"""Rewards of the public reference implementation, reproduced from its own checkpoints on its own records."""

import json
from pathlib import Path

import pytest

from mmrm_fast.scorer import Scorer

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("InternLM2ForCausalLM", "Qwen2ForCausalLM")
EXPECTED = {4096: "expected.json", 512: "expected_maxlen512.json"}
BOUND = 2e-5


def load(folder, **options):
    return Scorer.from_pretrained(folder, device="cpu", dtype="float32", compat="reference", **options)


def records(name):
    lines = (GOLDEN / name / "records.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "img_path": str(GOLDEN / name / row["img_path"])} for row in rows]


@pytest.mark.parametrize("max_length", EXPECTED)
@pytest.mark.parametrize("checkpoint", ["checkpoint", "robust_checkpoint"])
@pytest.mark.parametrize("name", MODELS)
def test_rewards_are_those_of_the_reference(name, checkpoint, max_length):
    rewards = load(GOLDEN / name / checkpoint, max_length=max_length).score(records(name))
    items = json.loads((GOLDEN / name / EXPECTED[max_length]).read_text())["items"]
    assert len(items) == 17 == sum(map(len, rewards))
    for item in items:
        assert rewards[item["record"]][item["response"]] == pytest.approx(item["reward"], abs=BOUND)
