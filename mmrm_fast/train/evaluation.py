"""Test sets through the model and the proxy of a training."""

import torch

from mmrm_fast.data.packing import Packed
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.pairs import PairRow, pair_rows


@torch.no_grad()  # not inference_mode: sharded weights must stay trainable
def batch_rows(model: RewardModel, proxy: RewardModel | None, packed: Packed, device: torch.device) -> list[PairRow]:
    """Rows of one packed batch, scored by the main model and, where there is one, the proxy."""
    batch = packed.batch.to(device)
    count = sum(batch.num_responses)
    rewards = model(batch.main, batch.tiles)[:count].tolist()
    proxy_rewards = None if proxy is None else proxy(batch.text, batch.text_tiles)[:count].tolist()
    rows, first = [], 0
    for sample, number in zip(packed.samples, batch.num_responses, strict=True):
        own = slice(first, first + number)
        rows.extend(pair_rows(sample.group, rewards[own], proxy_rewards and proxy_rewards[own]))
        first += number
    return rows
