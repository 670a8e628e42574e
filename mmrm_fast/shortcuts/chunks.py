"""Chunks of records with features of their text alone: n-grams, or what a frozen language model makes of it.

Shapes: R responses, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrm_fast.data.images import opened
from mmrm_fast.data.mixture import record_key
from mmrm_fast.data.packing import TokenPlan, plan_tokens
from mmrm_fast.data.records import Records
from mmrm_fast.data.samples import Preparer, only_paired
from mmrm_fast.data.schedule import cut
from mmrm_fast.data.types import Group, RecordError, at
from mmrm_fast.data.workers import idle_workers, in_order
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.shortcuts.crossfit import CHUNK, Chunk
from mmrm_fast.shortcuts.features import response_features
from mmrm_fast.shortcuts.fit import Matrix

WORTH_WORKERS = 2_000 // CHUNK  # chunks; fewer are done before worker processes have started


def read_chunk(
    records: Records, numbers: np.ndarray, read: Callable[[Group], Any], features: Callable[[list], Matrix]
) -> Chunk:
    """Some records with the `features` of what `read` gives of each, and the errors of what cannot be read."""
    groups, keys, image_keys, found, errors = [], [], [], [], []
    for number in numbers:
        try:
            group = records.group(int(number))
            with opened(group.images) as images:
                seen = replace(group, images=images)
                key, image_key = record_key(seen), record_key(replace(seen, prompt="")) if images else 0
            group = only_paired(group)
            found.append(read(group))
        except RecordError as error:
            errors.append(error)
            continue
        groups.append(replace(group, images=()))
        keys.append(key)
        image_keys.append(image_key)
    hashes = (np.array(own, np.uint64) for own in (keys, image_keys))
    return Chunk(tuple(groups), *hashes, features(found), tuple(errors))


@dataclass(frozen=True)
class NgramFeatures:
    """Words, two words in a row, lengths, form, and how they go with the prompt; read by workers where it pays."""

    records: Records
    limit: int = 200_000_000

    def read(self, chunks: Sequence[np.ndarray]) -> Iterator[Chunk]:
        """A chunk for each lot of record numbers, in order."""
        num_workers = idle_workers() if len(chunks) > WORTH_WORKERS else 0
        return in_order(lambda place: self.chunk(chunks[place]), [range(len(chunks))], num_workers=num_workers, ahead=0)

    def chunk(self, numbers: np.ndarray) -> Chunk:
        """One lot of records."""
        return read_chunk(self.records, numbers, lambda group: group, response_features)


@dataclass(frozen=True)
class StateFeatures:
    """A language model's states at each response's end, of unit mean square, float32 [R, D]."""

    records: Records
    preparer: Preparer
    states: Callable[[TokenPlan], Tensor]  # [R, D] of the responses of a plan
    tokens: int  # of one forward
    most: Callable[[int], int] = int  # over all ranks, which all run as many forwards
    limit: int = 1 << 28

    def read(self, chunks: Sequence[np.ndarray]) -> Iterator[Chunk]:
        """A chunk for each lot of record numbers, in order."""
        return (read_chunk(self.records, numbers, self.sequences, self.run) for numbers in chunks)

    def sequences(self, group: Group) -> Sequence[np.ndarray]:
        """A record's token keys, without its images. Raises `RecordError`."""
        with at(group.source):
            encode = partial(self.preparer.encoder.encode, group.prompt, tools=group.tools, text_only=True)
            return self.preparer.with_images(encode, group, (1,) * len(group.images)).sequences

    @torch.no_grad()
    def run(self, sequences: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """The states of records' sequences, in forwards of about so many tokens each."""
        runs = cut([sum(map(len, own)) for own in sequences], self.tokens)
        lots = [[own for record in sequences[run.start : run.stop] for own in record] for run in runs]
        states = [self.forward(lot) for lot in lots + [[]] * (self.most(len(lots)) - len(lots))]
        return np.concatenate(states) if states else self.forward([])

    def forward(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """The states of some sequences; of none, what a token that stands in for them leaves nothing of."""
        plan = plan_tokens(sequences, self.preparer.encoder.rope_regime)
        states_RD = self.states(plan)[: len(sequences)].float()
        return (states_RD * states_RD.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()).cpu().numpy()


def states_of(model: RewardModel, device: torch.device) -> Callable[[TokenPlan], Tensor]:
    """What gives the states [R, D] of a plan's last tokens."""
    return lambda plan: model(plan.to(device), head=lambda hidden_TD, last_index_R: hidden_TD[last_index_R])
