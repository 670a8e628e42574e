"""pair_loss, forward and backward, against the eager torch formula of the robust loss.

The eager side computes the loss and its gradients only; the op also returns what training logs.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import robust_loss
from benchmarks.harness import Check, Options, Row, interleaved, make_row, relative_error
from mmrm_fast.ops.pair_loss import pair_index, pair_loss

NUM_PAIRS = (64, 4096, 100_000)
BOUND = 1e-5
BASELINE = "eager"


def rows(options: Options) -> Iterator[Row]:
    """One row a number of pairs."""
    for num_pairs in NUM_PAIRS:
        sides = make_sides(num_pairs)
        ours, theirs = interleaved(list(sides.values()), repeats=options.repeats)
        yield make_row(
            "ops", f"pair_loss P={num_pairs:,}", "float32", ours=ours, baseline=BASELINE, theirs=theirs,
            checks=checks(sides),
        )  # fmt: skip


def make_sides(num_pairs: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Both implementations on the same rewards; each returns the loss and the gradients of both branches."""
    generator = torch.Generator().manual_seed(0)
    rewards, proxy = (torch.randn(2 * num_pairs, generator=generator, requires_grad=True) for _ in range(2))
    chosen, rejected = torch.arange(2 * num_pairs).view(num_pairs, 2).T.contiguous()
    pairs = pair_index(chosen, rejected, len(rewards))

    def ours() -> tuple[Tensor, ...]:
        loss = pair_loss(rewards, proxy, pairs, mode="paper")
        return total_and_gradients(loss.main + loss.proxy)

    def eager() -> tuple[Tensor, ...]:
        return total_and_gradients(robust_loss(rewards, proxy, chosen, rejected))

    def total_and_gradients(total: Tensor) -> tuple[Tensor, ...]:
        return total.detach(), *torch.autograd.grad(total, (rewards, proxy))

    return {"ours": ours, BASELINE: eager}


def checks(sides: dict[str, Callable[[], tuple[Tensor, ...]]]) -> list[Check]:
    """Errors of our loss and gradients."""
    results = zip(sides["ours"](), sides[BASELINE](), strict=True)
    return [Check(relative_error(result, expected), BOUND) for result, expected in results]


@pytest.mark.parametrize("side", ["ours", BASELINE])
@pytest.mark.parametrize("num_pairs", NUM_PAIRS)
def test_pair_loss(benchmark, num_pairs, side):
    sides = make_sides(num_pairs)
    assert all(check.passed for check in checks(sides))
    benchmark.group = f"pair_loss P={num_pairs:,}"
    benchmark(sides[side])
