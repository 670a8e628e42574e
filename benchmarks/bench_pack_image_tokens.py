"""pack_image_tokens against embedding + masked_scatter, as transformers does it; forward, and forward and backward.

The bound is a copy of the stream into new memory. Our outputs ask for huge pages, as the bound does; torch's do with
THP_MEM_ALLOC_ENABLE=1.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from benchmarks.harness import (
    Check,
    Options,
    Row,
    bandwidth,
    bounded,
    fresh_memory,
    interleaved,
    make_row,
    relative_error,
)
from mmrm_fast.ops.pack_image_tokens import pack_image_tokens, source_index

NUM_TOKENS, NUM_FEATURES, NUM_EMBEDDINGS, WIDTH = 8192, 7168, 32_768, 2048  # 28 tiles of 256 tokens
DTYPE = torch.bfloat16
CASES = ("forward", "forward+backward, frozen table", "forward+backward")
BOUND = 2**-7
BASELINE = "masked_scatter"


def rows(options: Options) -> Iterator[Row]:
    """One row a case."""
    for case in CASES:
        sides = make_sides(case)
        ours, theirs, copy = interleaved([*sides.values(), make_copy()], repeats=options.repeats)
        what = f"copy at {bandwidth(2 * NUM_TOKENS * WIDTH * DTYPE.itemsize, copy.median)}"
        bound = bounded(ours, copy.median, what) if case == "forward" else {}
        yield make_row(
            "ops", title(case), "bfloat16", ours=ours, baseline=BASELINE, theirs=theirs, checks=checks(sides), **bound
        )


def title(case: str) -> str:
    """The row's name."""
    return f"pack_image_tokens {NUM_TOKENS:,} x {WIDTH:,}, {case}"


def make_copy() -> Callable[[], Tensor]:
    """The bound: a stream read and a stream written."""
    source = torch.ones(NUM_TOKENS, WIDTH, dtype=DTYPE)
    return lambda: fresh_memory(NUM_TOKENS, WIDTH, dtype=DTYPE).copy_(source)


def make_sides(case: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Both implementations on the same tokens; each returns the stream, or the gradients of what trains."""
    generator = torch.Generator().manual_seed(0)
    table, features = (torch.randn(n, WIDTH, generator=generator).to(DTYPE) for n in (NUM_EMBEDDINGS, NUM_FEATURES))
    ids = torch.randint(NUM_EMBEDDINGS, (NUM_TOKENS,), generator=generator)
    is_image = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    is_image[NUM_TOKENS - NUM_FEATURES - 100 : -100] = True
    source = torch.where(is_image, -is_image.cumsum(0), ids)
    index, grad = source_index(source), torch.randn(NUM_TOKENS, WIDTH, generator=generator).to(DTYPE)
    trained = [t.requires_grad_() for t in ([features] if "frozen" in case else [table, features])]

    def ours() -> Tensor:
        return pack_image_tokens(table, features, source, index)

    def scattered() -> Tensor:
        stream = embedding(ids, table)
        return stream.masked_scatter(is_image[:, None].expand_as(stream), features)

    def run(function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        if case == "forward":
            with torch.no_grad():
                return (function(),)
        return torch.autograd.grad(function(), trained, grad)

    return {"ours": lambda: run(ours), BASELINE: lambda: run(scattered)}


def checks(sides: dict[str, Callable[[], tuple[Tensor, ...]]]) -> list[Check]:
    """Errors of our stream or gradients."""
    results = zip(sides["ours"](), sides[BASELINE](), strict=True)
    return [Check(relative_error(result, expected), BOUND) for result, expected in results]


@pytest.mark.parametrize("side", ["ours", BASELINE])
@pytest.mark.parametrize("case", CASES)
def test_pack_image_tokens(benchmark, case, side):
    sides = make_sides(case)
    assert all(check.passed for check in checks(sides))
    benchmark.group = title(case)
    benchmark(sides[side])
