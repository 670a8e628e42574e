"""Chunks of records with what a frozen language model makes of their text alone: its state at each response's end.

Shapes: R responses, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mmrm_fast.data.packing import TokenPlan, plan_tokens
from mmrm_fast.data.records import Records
from mmrm_fast.data.samples import Preparer
from mmrm_fast.data.schedule import cut
from mmrm_fast.data.types import RecordError, at
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.shortcuts.crossfit import Chunk
from mmrm_fast.shortcuts.ngrams import usable


@dataclass(frozen=True)
class StateFeatures:
    """States of unit mean square, float32 [R, D]."""

    records: Records
    preparer: Preparer
    states: Callable[[TokenPlan], Tensor]  # [R, D] of the responses of a plan
    tokens: int  # of one forward
    most: Callable[[int], int] = int  # over all ranks, which all run as many forwards
    limit: int = 1 << 28

    def read(self, chunks: Sequence[np.ndarray]) -> Iterator[Chunk]:
        """A chunk for each lot of record numbers, in order."""
        return map(self.chunk, chunks)

    def chunk(self, numbers: np.ndarray) -> Chunk:
        """One lot of records."""
        found, sequences, kept, errors = usable(self.records, numbers), [], [], []
        for group, num_images in zip(found.groups, found.num_images, strict=True):
            try:
                with at(group.source):
                    encode = partial(self.preparer.encoder.encode, group.prompt, tools=group.tools, text_only=True)
                    encoded = self.preparer.with_images(encode, group, (1,) * num_images)
            except RecordError as error:
                errors.append(error)
                kept.append(False)
            else:
                sequences.append(encoded.sequences)
                kept.append(True)
        kept_N = np.array(kept, bool)
        groups = tuple(group for group, is_kept in zip(found.groups, kept, strict=True) if is_kept)
        states_RD = self.run(sequences)
        return Chunk(groups, found.key_N[kept_N], found.image_N[kept_N], states_RD, (*found.errors, *errors))

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
    """What gives the states of a plan's last tokens."""
    return lambda plan: model(plan.to(device), head=last_states)


def last_states(hidden_TD: Tensor, last_index_R: Tensor) -> Tensor:
    """The states [R, D] of last tokens."""
    return hidden_TD[last_index_R]
