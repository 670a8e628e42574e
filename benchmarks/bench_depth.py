"""A standard training step at the widths and depths of InternVL3, by difference: what one more layer takes.

A whole step is one with a single layer of each kind, and for every further layer what two layers take longer than one.
In bf16, with the pairs of `train-step`, verified as there on the single layer. What one more layer of the vision tower
takes is timed beside a small language model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from statistics import median

import numpy as np
import torch

from benchmarks.bench_train_step import baseline, exact_side, make_sides
from benchmarks.flops import counted
from benchmarks.harness import MODEL_REPEATS, Case, Check, Options, Row, interleaved, verdict
from benchmarks.models import FULL, PROBE, Geometry, geometry, make_records

TOWER, TOWER_LAYERS, VOCABULARY = (1024, 16, 4096), 24, 151_674
MODELS = {  # hidden size, heads, key and value heads, MLP; layers
    "InternVL3-1B": ((896, 14, 2, 4864), 24),
    "InternVL3-2B": ((1536, 12, 2, 8960), 28),
    "InternVL3-8B": ((3584, 28, 4, 18_944), 28),
}


def cases(options: Options) -> Iterator[Case]:
    """One case a model; `--quick` takes the smallest alone."""
    for name in list(MODELS)[: 1 if options.quick else None]:
        yield Case(name, partial(rows, name, options))


def rows(name: str, options: Options) -> Iterator[Row]:
    """Predicted seconds and FLOPs of ours and of each baseline."""
    text, layers = MODELS[name]
    one = replace(geometry(options), vision=TOWER, text=text, vocab_size=VOCABULARY, vision_layers=1, text_layers=1)
    small = replace(one, text=FULL.text, vocab_size=FULL.vocab_size)
    layer, tile_layer = added(one, "text_layers", options), added(small, "vision_layers", options)
    (ours, *others), (flops, *other_flops) = cost(one, options) + (layers - 1) * layer + (TOWER_LAYERS - 1) * tile_layer
    for (other, checks), seconds, baseline_flops in zip(verified(one, options), others, other_flops, strict=True):
        details = {"ratio of FLOP": baseline_flops / flops, "decoder layer seconds": layer[0, 0]}
        yield Row(
            "depth", f"train-step {name}, by difference", options.device.type, "bfloat16", ours, other, seconds,
            seconds / ours, None, None, *verdict(checks), details=details,
        )  # fmt: skip


@cache
def added(one: Geometry, kind: str, options: Options) -> np.ndarray:
    """What a second layer of a kind adds to the cost of a step."""
    return cost(replace(one, **{kind: 2}), options) - cost(one, options)


@cache
def cost(sizes: Geometry, options: Options) -> np.ndarray:
    """Seconds and FLOPs of a step of ours, `padded` and `reference` [2, 3]."""
    sides = make_sides(make_records(sizes, PROBE), None, torch.bfloat16, options.device)
    flops = [counted(side.step)[1].flops for side in sides]
    samples = interleaved([side.step for side in sides], repeats=min(options.repeats, MODEL_REPEATS), min_seconds=0)
    return np.array([list(map(median, samples)), flops])


def verified(sizes: Geometry, options: Options) -> Iterator[tuple[str, Sequence[Check]]]:
    """The checks of each baseline, as in `train-step`."""
    records = make_records(sizes, PROBE)
    ours, *others = make_sides(records, None, torch.bfloat16, options.device)
    exact, result = exact_side(ours, records, None, options.device).result(), ours.result()
    for side in others:
        yield side.name, baseline(side, result, exact).checks
