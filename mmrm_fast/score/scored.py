"""The rewards of one record, whatever computed them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmrm_fast.data.records import Group, RecordError
from mmrm_fast.data.types import RewardError


@dataclass(frozen=True)
class Scored:
    """One group with the reward of each response; `truncated` marks responses cut to `max_length`."""

    group: Group
    rewards: tuple[float, ...]
    truncated: tuple[bool, ...]
    identical: tuple[bool, ...] = ()  # of the group's pairs: whose two sides have the same tokens
    num_tokens: int = 0  # that it took, images included, the prompt once
    num_tokens_unshared: int = 0  # as if each response were scored by itself


def join(group: Group, parts: Sequence[Scored | RecordError], identical: tuple[bool, ...] = ()) -> Scored | RecordError:
    """The outcome of a group that was scored in parts; an error where one of its rewards is no number."""
    for part in parts:
        if isinstance(part, RecordError):
            return part
    rewards = tuple(reward for part in parts for reward in part.rewards)
    for response, reward in enumerate(rewards):
        if not math.isfinite(reward):
            return RewardError.of(group.source, f"response {response}", reward)
    return Scored(
        group,
        rewards,
        tuple(cut for part in parts for cut in part.truncated),
        identical,
        sum(part.num_tokens for part in parts),
        sum(part.num_tokens_unshared for part in parts),
    )
