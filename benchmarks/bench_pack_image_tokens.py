"""pack_image_tokens against embedding + masked_scatter, as transformers does it; forward, and forward and backward.

The bound is a copy of the stream into new memory. `index seconds` is what `source_index` takes: packing builds it once
a micro-batch, in the loader's workers, so no step waits for it.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

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
from mmrm_fast.ops.pack_image_tokens import pack_image_tokens, source_index

NUM_TOKENS, NUM_FEATURES, NUM_EMBEDDINGS, WIDTH = 8192, 7168, 32_768, 2048  # 28 tiles of 256 tokens
DTYPE = torch.bfloat16
CASES = (("forward",), ("forward+backward, frozen table",), ("forward+backward",))
BOUND = 2**-7
BASELINE = "masked_scatter"


def rows(options: Options) -> Iterator[Row]:
    """One row a case."""
    for (case,) in CASES:
        sides = make_sides(case, device=options.device)
        copied = torch.ones(NUM_TOKENS, WIDTH, dtype=DTYPE, device=options.device)
        functions = [*sides.values(), copied.clone, partial(source_index, make_sources()[-1])]
        ours, theirs, copy, index = interleaved(functions, repeats=options.repeats)
        what, details = f"copy at {bandwidth(2 * copied.nbytes, copy.median)}", {"index seconds": index.median}
        bound = bounded(ours, copy.median, what, details) if case == "forward" else {"details": details}
        yield make_row(
            "ops", title(case), "bfloat16", ours=ours, baseline=BASELINE, theirs=theirs, checks=checks(sides),
            device=options.device.type, **bound,
        )  # fmt: skip


def title(case: str) -> str:
    """The row's name."""
    return f"pack_image_tokens {NUM_TOKENS:,} x {WIDTH:,}, {case}"


def make_sources() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, where the image tokens are, and the stream's sources [T]."""
    ids = torch.randint(NUM_EMBEDDINGS, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    is_image = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    is_image[NUM_TOKENS - NUM_FEATURES - 100 : -100] = True
    return ids, is_image, torch.where(is_image, -is_image.cumsum(0), ids)


def make_sides(case: str, *, device: torch.device = CPU) -> Sides:
    """Both implementations on the same tokens; each returns the stream, or the gradients of what trains."""
    generator = torch.Generator().manual_seed(0)
    table, features, grad = (
        torch.randn(n, WIDTH, generator=generator).to(device, DTYPE) for n in (NUM_EMBEDDINGS, NUM_FEATURES, NUM_TOKENS)
    )
    sources = make_sources()
    index, (ids, is_image, source) = source_index(sources[-1]).to(device), (x.to(device) for x in sources)
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


def checks(sides: Sides) -> list[Check]:
    """Errors of our stream or gradients."""
    results = zip(sides["ours"](), sides[BASELINE](), strict=True)
    return [Check(relative_error(result, expected), BOUND) for result, expected in results]
