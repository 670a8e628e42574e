"""Test sets through the model and the proxy of a training, and the figures that come of them."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from mmrm_fast.data.mixture import PreferenceDataset
from mmrm_fast.data.packing import Packed
from mmrm_fast.pairs import EvalSet, PairRow, judged_accuracy, pair_rows, reward_stats, summarize
from mmrm_fast.train import sharding
from mmrm_fast.train.proxy import Branch, train_mode


class Evaluation:
    """The test sets of a run and what they are scored by.

    Args:
        sets, datasets: one of each a test set.
        branches: the model and, where it is one, the proxy.
        device: where they are.
    """

    def __init__(
        self,
        sets: list[EvalSet],
        datasets: list[PreferenceDataset],
        branches: list[Branch],
        device: torch.device,
    ):
        self.sets, self.datasets, self.branches, self.device = sets, datasets, branches, device
        self.kinds = {eval_set.name: eval_set.kind for eval_set in sets}

    def rows(self, batches: Callable[[PreferenceDataset, str], Iterable[Packed]]) -> dict[str, list[PairRow]]:
        """Every pair of every test set by the set's name, on every rank, in the order of its file.

        Args:
            batches: this rank's packed batches of a test set and its name.
        """
        for branch in self.branches:
            branch.root.eval()
        rows = {}
        for eval_set, dataset in zip(self.sets, self.datasets, strict=True):
            own = [row for packed in batches(dataset, eval_set.name) for row in self.batch_rows(packed)]
            everyones = sharding.gather_lists(own)
            rows[eval_set.name] = sorted(everyones, key=lambda row: (row.record, row.chosen, row.rejected))
        for branch in self.branches:
            train_mode(branch.root)
        return rows

    @torch.no_grad()  # not inference_mode: sharded weights must stay trainable
    def batch_rows(self, packed: Packed) -> list[PairRow]:
        """The rows of one packed batch."""
        batch = packed.batch.to(self.device)
        count = sum(batch.num_responses)
        main, *proxies = self.branches
        rewards = main(batch.main, batch.tiles)[:count].tolist()
        proxy_rewards = [proxy(batch.text, batch.text_tiles)[:count].tolist() for proxy in proxies]
        rows, first = [], 0
        for sample, number in zip(packed.samples, batch.num_responses, strict=True):
            own = slice(first, first + number)
            rows.extend(pair_rows(sample.group, rewards[own], proxy_rewards[0][own] if proxy_rewards else None))
            first += number
        return rows

    def figures(self, rows: dict[str, list[PairRow]]) -> dict[str, dict]:
        """The kind and the figures of every test set, by its name."""
        return {name: {"kind": self.kinds[name], **summarize(own)} for name, own in rows.items()}

    def reward_stats(self, rows: dict[str, list[PairRow]]) -> dict:
        """What rewards can be normalised by."""
        return reward_stats(rows, self.kinds)


def best_figure(results: dict[str, dict], name: str | None) -> float | None:
    """What the best weights have most of: SET.FIGURE (of `sfd` the least), or the mean o.o.d. accuracy, else of all."""
    if name is not None:
        test_set, _, figure = name.rpartition(".")
        if figure not in results.get(test_set, {}):
            raise ValueError(f"--best {name}: expected SET.FIGURE, such as {next(iter(results), 'iid')}.accuracy")
        value = results[test_set][figure]
        return None if math.isnan(value) else -value if figure == "sfd" else value
    judged = [figures for figures in results.values() if figures["kind"] == "ood"] or list(results.values())
    return float(np.mean([judged_accuracy(figures) for figures in judged])) if judged else None
