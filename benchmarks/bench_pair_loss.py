"""pair_loss, forward and backward, against the same results in eager torch and under torch.compile.

All sides compute the loss, its gradients and what training logs: the mean SFC and both accuracies. The bound is an
empty op of the same signature with the same kind of autograd plus a copy of as many bytes as pass through memory; the
empty op has a row too, whose ratio is the most that any op could reach at P = 64. At P = 100,000 the copy is not a
tight bound: two fifths of the native time are arithmetic (two exponentials, two logarithms and five divisions a pair),
the rest are loads by index.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import robust_loss_and_logs
from benchmarks.harness import Check, Options, Row, bandwidth, bounded, interleaved, make_row, relative_error
from mmrm_fast.ops.pair_loss import pair_index, pair_loss

NUM_PAIRS = (64, 4096, 100_000)
BOUND = 1e-5
# Of 4 bytes: 12 of 2 indices, 2 ends and 2 row starts; 4 rewards; 4 gradients at the ends written and read; the SFC;
# 4 gradients written, read by the backward and written again.
FLOATS_PER_PAIR = 12 + 4 + 8 + 1 + 4 + 8
BASELINES = {"eager": robust_loss_and_logs, "torch.compile": torch.compile(robust_loss_and_logs, dynamic=False)}

library = torch.library.Library("mmrm_fast_bench", "FRAGMENT")
library.define(str(torch.ops.mmrm_fast.pair_loss_fwd.default._schema).replace("mmrm_fast::pair_loss_fwd", "empty_fwd"))
library.impl("empty_fwd", lambda rewards, *_: tuple(rewards.new_empty(n) for n in (7, 1, 2, 2)), "CPU")


class EmptyFunction(torch.autograd.Function):
    """Autograd of the empty op, as `pair_loss` has it."""

    @staticmethod
    def forward(ctx, rewards, proxy_rewards, *rest):
        sums, *_ = torch.ops.mmrm_fast_bench.empty_fwd.default(rewards, proxy_rewards, *rest)
        ctx.save_for_backward(rewards, proxy_rewards)
        return sums[0]

    @staticmethod
    def backward(ctx, grad):
        return *ctx.saved_tensors, *[None] * 11


def rows(options: Options) -> Iterator[Row]:
    """A row a number of pairs and baseline, and one of the overhead."""
    for num_pairs in NUM_PAIRS:
        sides = make_sides(num_pairs)
        functions = [*sides.values(), *make_bounds(num_pairs)]
        ours, *theirs, empty, copy = interleaved(functions, repeats=options.repeats)
        what = f"empty op, copy at {bandwidth(4 * FLOATS_PER_PAIR * num_pairs, copy.median)}"
        for baseline, timing in zip(BASELINES, theirs, strict=True):
            yield make_row(
                "ops", f"pair_loss P={num_pairs:,}", "float32", ours=ours, baseline=baseline, theirs=timing,
                checks=checks(sides, baseline), **bounded(ours, empty.median + copy.median, what),
            )  # fmt: skip
        if num_pairs == NUM_PAIRS[0]:
            case = f"an empty op with autograd, P={num_pairs}"
            yield make_row("ops", case, "float32", ours=empty, baseline="eager", theirs=theirs[0], checks=[])


def make_bounds(num_pairs: int) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], Tensor]]:
    """An op that computes nothing, forward and backward on two rewards; a copy of what `pair_loss` reads and writes."""
    rewards, proxy = (torch.zeros(2, requires_grad=True) for _ in range(2))
    pairs = pair_index(torch.tensor([0]), torch.tensor([1]), 2)

    def empty() -> tuple[Tensor, ...]:
        tensors = (pairs.chosen, pairs.rejected, None, None, pairs.row_ptr, pairs.row_entry)
        total = EmptyFunction.apply(rewards, proxy, *tensors, "paper", 0.0, 0.0, False, 0.0)
        return torch.autograd.grad(total, (rewards, proxy))

    floats = torch.ones(num_pairs * FLOATS_PER_PAIR // 2)  # a copy reads and writes each
    target = torch.empty_like(floats)
    return empty, lambda: target.copy_(floats)


def make_sides(num_pairs: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """All sides on the same rewards; each returns the loss, what is logged and the gradients of both branches."""
    generator = torch.Generator().manual_seed(0)
    rewards, proxy = (torch.randn(2 * num_pairs, generator=generator, requires_grad=True) for _ in range(2))
    chosen, rejected = torch.arange(2 * num_pairs).view(num_pairs, 2).T.contiguous()
    pairs = pair_index(chosen, rejected, len(rewards))

    def ours() -> tuple[Tensor, ...]:
        loss = pair_loss(rewards, proxy, pairs, mode="paper")
        return with_gradients(loss.main + loss.proxy, loss.weighted_sfc, loss.main_correct, loss.proxy_correct)

    def baseline(function: Callable) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: with_gradients(*function(rewards, proxy, chosen, rejected))

    def with_gradients(total: Tensor, *logged: Tensor) -> tuple[Tensor, ...]:
        return total.detach(), *logged, *torch.autograd.grad(total, (rewards, proxy))

    return {"ours": ours, **{name: baseline(function) for name, function in BASELINES.items()}}


def checks(sides: dict[str, Callable[[], tuple[Tensor, ...]]], baseline: str) -> list[Check]:
    """Errors of our loss, logged figures and gradients."""
    results = zip(sides["ours"](), sides[baseline](), strict=True)
    return [Check(relative_error(result, expected), BOUND) for result, expected in results]


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("num_pairs", NUM_PAIRS)
def test_pair_loss(benchmark, num_pairs, side):
    sides = make_sides(num_pairs)
    assert all(check.passed for check in checks(sides, "eager"))
    benchmark.group = f"pair_loss P={num_pairs:,}"
    benchmark(sides[side])
