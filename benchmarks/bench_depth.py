"""A standard training step at the widths and depths of InternVL3, by difference: what one more layer takes.

A whole step is one with a single layer of each kind, and for every further layer what two layers take longer than one.
The pairs are those of `train-step`, and the single layer is verified as there. That and the differences, of the fastest
of three steps, are of models with a small vocabulary, the tower's beside a small language model. Details say of one
more decoder layer of ours how much of its time is matrix products, attention and all else, by torch's profiler, and how
near it is to its products alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from torch.profiler import profile

from benchmarks.bench_train_step import Side, compared, make_sides
from benchmarks.flops import counted, work_bound
from benchmarks.harness import MODEL_REPEATS, Case, Options, Row, interleaved, verdict
from benchmarks.models import FULL, PROBE, Geometry, geometry, make_records

TOWER, TOWER_LAYERS, VOCABULARY = (1024, 16, 4096), 24, 151_674
MODELS = {  # hidden size, heads, key and value heads, MLP; layers
    "InternVL3-1B": ((896, 14, 2, 4864), 24),
    "InternVL3-2B": ((1536, 12, 2, 8960), 28),
    "InternVL3-8B": ((3584, 28, 4, 18_944), 28),
}
PRODUCTS, KINDS = ("aten::mm", "aten::addmm", "aten::bmm"), ("products", "attention", "else")


def cases(options: Options) -> Iterator[Case]:
    """One case a model and dtype; `--quick` takes the smallest in bf16."""
    both = [(name, dtype) for dtype in (torch.bfloat16, torch.float32) for name in MODELS]
    for name, dtype in both[: 1 if options.quick else None]:
        yield Case(f"{name}, {dtype}", partial(rows, name, dtype, options))


def rows(name: str, dtype: torch.dtype, options: Options) -> Iterator[Row]:
    """Predicted seconds of ours and of each baseline."""
    text, layers = MODELS[name]
    base = replace(geometry(options), vision=TOWER, text=text, vision_layers=1, text_layers=1)
    one, small = replace(base, vocab_size=VOCABULARY), replace(base, text=FULL.text)
    layer, tile_layer = added(base, "text_layers", dtype, options), added(small, "vision_layers", dtype, options)
    seconds, kinds = layer[0, 0], layer[3] / layer[3].sum()
    whole = cost(one, dtype, options) + (layers - 1) * layer + (TOWER_LAYERS - 1) * tile_layer
    of_layer = {f"a layer's {kind}": f"{share:.0%}" for kind, share in zip(KINDS, kinds, strict=True)}
    of_layer |= {"decoder layer seconds": seconds, "decoder layer of its bound": layer[2, 0] / seconds}
    _, _, baselines = compared(make_records(base, PROBE), None, dtype, options.device)
    for place, (other, theirs) in enumerate(baselines.items(), start=1):
        yield Row(
            "depth", f"train-step {name}, by difference", options.device.type, str(dtype).removeprefix("torch."),
            whole[0, 0], other, whole[0, place], whole[0, place] / whole[0, 0], None, None, *verdict(theirs.checks),
            details={"ratio of FLOP": whole[1, place] / whole[1, 0], **of_layer},
        )  # fmt: skip


@cache
def added(one: Geometry, kind: str, dtype: torch.dtype, options: Options) -> np.ndarray:
    """What a second layer of a kind adds to the cost of a step."""
    return cost(replace(one, **{kind: 2}), dtype, options) - cost(one, dtype, options)


@cache
def cost(sizes: Geometry, dtype: torch.dtype, options: Options) -> np.ndarray:
    """Of a step of ours, `padded` and `reference`: seconds, FLOPs; of ours: its bound, seconds by kind [4, 3]."""
    sides = make_sides(make_records(sizes, PROBE), None, dtype, options.device)
    steps = [partial(step_alone, side) for side in sides]
    work = [counted(step)[1] for step in steps]
    bound = work_bound(work[0], dtype, options.device)
    samples = interleaved([*steps, bound.run], repeats=min(options.repeats, MODEL_REPEATS), min_seconds=0)
    *seconds, products = map(min, samples)
    return np.array([seconds, [own.flops for own in work], [bound.scale * products, 0, 0], seconds_by_kind(steps[0])])


def step_alone(side: Side) -> None:
    """A step that leaves no gradients: those of all sides at once do not fit beside the largest model."""
    side.step()
    side.modules.zero_grad(set_to_none=True)


def seconds_by_kind(step: Callable[[], object]) -> list[float]:
    """Of a call: in matrix products, in attention, in all else."""
    with profile() as profiler:
        step()
    clock = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"  # microseconds
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        kind = "products" if event.key in PRODUCTS else "attention" if "attention" in event.key else "else"
        spent[kind] += getattr(event, clock) / 1e6
    return list(spent.values())
