"""verl's custom reward function: rewards of messages with their pictures, with `mmrm-fast serve` running.

    python -m verl.trainer.main_ppo reward.custom_reward_function.path=scripts/examples/verl_reward.py ...

verl's own reward models are sent a text without pictures; here every row of the training data has its conversation in
`extra_info["messages"]` and its pictures, paths under the server's `--image-root` or data URLs, in
`extra_info["images"]`. Requests of many rollouts wait for each other in the server, which batches them; one that is
busy is asked again.
"""

import asyncio
import os

from mmrm_fast.client import RewardClient

CLIENT = RewardClient(os.environ.get("REWARD_SERVER", "http://127.0.0.1:8000").split(","))


async def compute_score(data_source: str, solution_str: str, ground_truth: object, extra_info: dict, **_) -> float:
    """The reward of a response. Raises `ValueError` where a row lacks its messages, or for what the server refuses."""
    messages, images = extra_info.get("messages"), extra_info.get("images")
    if messages is None:
        raise ValueError(f"a row of {data_source} has no extra_info['messages']: write its conversation there")
    (reward,) = await asyncio.to_thread(CLIENT.score, list(messages), [solution_str], [] if images is None else images)
    return reward
