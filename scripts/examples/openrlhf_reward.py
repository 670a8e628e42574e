"""OpenRLHF's reward file: `--remote_rm_url scripts/examples/openrlhf_reward.py`, with `mmrm-fast serve` running.

`--remote_rm_url http://127.0.0.1:8000/get_reward` speaks to the server directly, and asks five times what it refuses;
with this file the trainer's log says once why. OpenRLHF 0.11 goes on without that reward in both cases.

OpenRLHF sends no pictures. `--label_key` names a column that says which belong to a prompt, as JSON with paths under
the server's `--image-root`, `{"images": ["cat.png"]}`, or as an id of its `--image-index`. A text that shows pictures
without that is refused. So is a prompt that was cut on its left, of which nobody can say what it asked: raise
`--prompt_max_len`.
"""

import os

import torch

from mmrm_fast.client import RewardClient

CLIENT = RewardClient(os.environ.get("REWARD_SERVER", "http://127.0.0.1:8000"))


def reward_func(queries: list[str], prompts: list[str], labels: list, **columns) -> dict:
    """Rewards [B] float32 of whole decoded queries; `images`, where the trainer hands them over, are sent along."""
    answer = CLIENT.get_reward(queries, prompts, columns.get("images"), labels)
    logs = {name: torch.tensor(values) for name, values in answer["extra_logs"].items()}
    return {"rewards": torch.tensor(answer["rewards"]), "scores": torch.tensor(answer["scores"]), "extra_logs": logs}
