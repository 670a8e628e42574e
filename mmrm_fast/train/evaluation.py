"""Test sets through the model and the proxy of a training, and the figures that come of them."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch

from mmrm_fast.data.packing import Packed
from mmrm_fast.data.types import RewardError
from mmrm_fast.pairs import PairRow, judged_accuracy, pair_rows, without_numbers
from mmrm_fast.train import sharding
from mmrm_fast.train.branch import Branch, train_mode
from mmrm_fast.train.proxy import Proxy


def evaluate(
    branches: list[Branch], proxy: Proxy, batches: dict[str, Iterable[Packed]], device: torch.device
) -> tuple[dict[str, list[PairRow]], list[RewardError]]:
    """Every pair of every test set by the set's name, on every rank, in the order of its file; and those left out.

    A pair is left out where a reward of it is no number, which is neither right nor wrong.

    Args:
        branches: the model and, where it is one, the proxy; in training again when this returns.
        proxy: what gives the proxy's margins.
        batches: this rank's, by the name of the test set.
    """
    for branch in branches:
        branch.root.eval()
    rows, errors = {}, []
    for name, packed in batches.items():
        own = [row for batch in packed for row in batch_rows(name, branches, proxy, batch, device)]
        everyones = sharding.gather_lists(own)
        in_order = sorted(everyones, key=lambda row: (row.record, row.chosen, row.rejected))
        bad = without_numbers(in_order)
        rows[name] = [row for row in in_order if row not in bad]
        errors += bad.values()
    for branch in branches:
        train_mode(branch.root)
    return rows, errors


@torch.no_grad()  # not inference_mode: sharded weights must stay trainable
def batch_rows(
    name: str, branches: list[Branch], proxy: Proxy, packed: Packed, device: torch.device
) -> Iterator[PairRow]:
    """The rows of one packed batch of a test set."""
    batch, sizes = packed.batch.to(device), packed.batch.num_responses
    rewards = branches[0](batch.main, batch.tiles)[: sum(sizes)].cpu().split(sizes)
    proxy_margin_P = proxy.test_margins(name, branches, packed, batch)
    left = None if proxy_margin_P is None else iter(proxy_margin_P.tolist())
    for sample, own in zip(packed.samples, rewards, strict=False):
        of_proxy = None if left is None else list(islice(left, len(sample.group.pairs)))
        yield from pair_rows(sample.group, own.tolist(), of_proxy)


def best_figure(results: dict[str, dict], name: str | None) -> float | None:
    """What the best weights have most of: SET.FIGURE (of `sfd` the least), or the mean o.o.d. accuracy, else of all."""
    if name is not None:
        test_set, _, figure = name.rpartition(".")
        if figure not in results.get(test_set, {}):
            raise ValueError(f"--best {name}: expected SET.FIGURE, such as {next(iter(results), 'iid')}.accuracy")
        value = results[test_set][figure]
        return None if math.isnan(value) else -value if figure == "sfd" else value
    judged = [own for own in results.values() if own["kind"] == "ood"] or list(results.values())
    value = float(np.mean([judged_accuracy(own) for own in judged])) if judged else math.nan
    return None if math.isnan(value) else value
