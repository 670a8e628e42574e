"""reward_head against the head on all tokens, then index; forward, and forward and backward.

The bound of the latter is zero-filling the gradient of the hidden states in new memory.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

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
from mmrm_fast.ops.reward_head import reward_head

NUM_TOKENS, NUM_RESPONSES, WIDTH = 8192, 16, 2048
DTYPE = torch.bfloat16
CASES = (("forward",), ("forward+backward",))
BOUND = 2**-6  # the baseline's head is in bfloat16
BASELINE = "all tokens"


def rows(options: Options) -> Iterator[Row]:
    """One row a case."""
    for (case,) in CASES:
        sides = make_sides(case, device=options.device)
        new = partial(torch.empty, NUM_TOKENS, WIDTH, dtype=DTYPE, device=options.device)
        functions = [*sides.values(), lambda new=new: new().zero_()]
        ours, theirs, zeros = interleaved(functions, repeats=options.repeats)
        what = f"zeros at {bandwidth(NUM_TOKENS * WIDTH * DTYPE.itemsize, zeros.median)}"
        bound = {} if case == "forward" else bounded(ours, zeros.median, what)
        yield make_row(
            "ops", title(case), "bfloat16", ours=ours, baseline=BASELINE, theirs=theirs, checks=checks(sides),
            device=options.device.type, **bound,
        )  # fmt: skip


def title(case: str) -> str:
    """The row's name."""
    return f"reward_head {NUM_RESPONSES} of {NUM_TOKENS:,} x {WIDTH:,}, {case}"


def make_sides(case: str, *, device: torch.device = CPU) -> Sides:
    """Both implementations on the same states; each returns the rewards, or the gradients of both inputs."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=generator).to(device, DTYPE).requires_grad_()
    weight = (torch.randn(WIDTH, generator=generator) / WIDTH).to(device, DTYPE)
    exact = weight.float().requires_grad_()
    weight.requires_grad_()
    last_index = torch.randperm(NUM_TOKENS, generator=generator)[:NUM_RESPONSES].sort().values.to(device)
    grad = torch.randn(NUM_RESPONSES, generator=generator).to(device, DTYPE)

    def ours() -> Tensor:
        return reward_head(hidden, last_index, exact)

    def every() -> Tensor:
        return linear(hidden, weight[None])[:, 0][last_index]

    def run(function: Callable[[], Tensor], head: Tensor) -> tuple[Tensor, ...]:
        if case == "forward":
            with torch.no_grad():
                return (function(),)
        return torch.autograd.grad(function(), (hidden, head), grad.to(head.dtype))

    return {"ours": lambda: run(ours, exact), BASELINE: lambda: run(every, weight)}


def checks(sides: Sides) -> list[Check]:
    """Errors of our rewards or gradients."""
    results = zip(sides["ours"](), sides[BASELINE](), strict=True)
    return [Check(relative_error(result.float(), expected.float()), BOUND) for result, expected in results]
