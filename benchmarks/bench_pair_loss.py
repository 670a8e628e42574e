"""pair_loss, forward and backward, against the same results in eager torch and under torch.compile.

All sides compute the loss, its gradients and what training logs: the mean SFC and both accuracies. The bound is an
empty op of the same signature with the same kind of autograd plus a copy of as many bytes as pass through memory; the
empty op has a row too, whose ratio is the most that any op could reach at P = 64. At P = 100,000 the copy is not a
tight bound: there are two exponentials, two logarithms and five divisions a pair.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.baselines import robust_loss_and_logs
from benchmarks.harness import (
    CPU,
    Check,
    Options,
    Row,
    Sides,
    bandwidth,
    bounded,
    interleaved,
    make_row,
    relative_error,
)
from mmrm_fast.ops.pair_loss import pair_loss

CASES = ((64,), (4096,), (100_000,))  # pairs
BOUND = 1e-5
FLOATS_PER_PAIR = 2 + 1 + 2 + 4  # margins, SFC, gradient factors written, read by the backward and written again
BASELINE = "eager"
BASELINES = {BASELINE: robust_loss_and_logs, "torch.compile": torch.compile(robust_loss_and_logs, dynamic=False)}

library = torch.library.Library("mmrm_fast_bench", "FRAGMENT")
library.define(str(torch.ops.mmrm_fast.pair_loss_fwd.default._schema).replace("mmrm_fast::pair_loss_fwd", "empty_fwd"))
library.impl(
    "empty_fwd", lambda margin, *_: tuple(margin.new_empty(n) for n in (7, 1, 1, 1)), "CompositeExplicitAutograd"
)


class EmptyFunction(torch.autograd.Function):
    """Autograd of the empty op, as `pair_loss` has it."""

    @staticmethod
    def forward(ctx, margin, proxy_margin, *rest):
        sums, *_ = torch.ops.mmrm_fast_bench.empty_fwd.default(margin, proxy_margin, *rest)
        ctx.save_for_backward(margin, proxy_margin)
        return sums[0]

    @staticmethod
    def backward(ctx, grad):
        return *ctx.saved_tensors, *[None] * 4


def rows(options: Options) -> Iterator[Row]:
    """A row a number of pairs and baseline, and one of the overhead."""
    for (num_pairs,) in CASES:
        sides = that_run(make_sides(num_pairs, device=options.device))
        functions = [*sides.values(), *make_bounds(num_pairs, options.device)]
        ours, *theirs, empty, copy = interleaved(functions, repeats=options.repeats)
        what = f"empty op, copy at {bandwidth(4 * FLOATS_PER_PAIR * num_pairs, copy.median)}"
        bound = bounded(ours, empty.median + copy.median, what)
        for baseline, timing in zip(list(sides)[1:], theirs, strict=True):
            yield make_row(
                "ops", title(num_pairs), "float32", ours=ours, baseline=baseline, theirs=timing,
                checks=checks(sides, baseline), device=options.device.type, **bound,
            )  # fmt: skip
        if (num_pairs,) == CASES[0]:
            yield make_row(
                "ops", f"an empty op with autograd, P={num_pairs}", "float32", ours=empty, baseline=BASELINE,
                theirs=theirs[0], checks=[], device=options.device.type,
            )  # fmt: skip


def title(num_pairs: int) -> str:
    """The row's name."""
    return f"pair_loss P={num_pairs:,}"


def that_run(sides: Sides) -> Sides:
    """The sides without those of torch.compile where it finds no C++ compiler, which is said."""
    runnable = {}
    for name, side in sides.items():
        try:
            side()
        except RuntimeError as error:
            if name != "torch.compile":
                raise
            reason = str(error).partition("\n")[0]
            tqdm.write(f"pair_loss: no row against torch.compile, {reason}")
        else:
            runnable[name] = side
    return runnable


def make_bounds(num_pairs: int, device: torch.device) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], Tensor]]:
    """An op that computes nothing, forward and backward on one pair; a copy of what `pair_loss` reads and writes."""
    margins = [torch.zeros(1, device=device, requires_grad=True) for _ in range(2)]

    def empty() -> tuple[Tensor, ...]:
        return torch.autograd.grad(EmptyFunction.apply(*margins, None, None, "paper", 0.0), margins)

    floats = torch.ones(num_pairs * FLOATS_PER_PAIR // 2, device=device)  # a copy reads and writes each
    target = torch.empty_like(floats)
    return empty, lambda: target.copy_(floats)


def make_sides(num_pairs: int, *, device: torch.device = CPU) -> Sides:
    """All sides on the same margins; each returns the loss, what is logged and the gradients of both branches."""
    generator = torch.Generator().manual_seed(0)
    margins = [torch.randn(num_pairs, generator=generator).to(device).requires_grad_() for _ in range(2)]

    def ours() -> tuple[Tensor, ...]:
        loss = pair_loss(*margins, mode="paper")
        return with_gradients(loss.main + loss.proxy, loss.weighted_sfc, loss.main_correct, loss.proxy_correct)

    def baseline(function: Callable) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: with_gradients(*function(*margins))

    def with_gradients(total: Tensor, *logged: Tensor) -> tuple[Tensor, ...]:
        return total.detach(), *logged, *torch.autograd.grad(total, margins)

    return {"ours": ours, **{name: baseline(function) for name, function in BASELINES.items()}}


def checks(sides: Sides, baseline: str = BASELINE) -> list[Check]:
    """Errors of our loss, logged figures and gradients."""
    results = zip(sides["ours"](), sides[baseline](), strict=True)
    return [Check(relative_error(result, expected), BOUND) for result, expected in results]
