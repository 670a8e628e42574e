"""A standard training step at the widths and depths of InternVL3, by difference: what one more layer takes.

A whole step is one with a single layer of each kind, and for every further layer what two layers take longer than one.
In bf16, with the pairs of `train-step`, verified as there on the single layer. What one more layer of the vision tower
takes is timed beside a small language model.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from statistics import median

import torch

from benchmarks.bench_train_step import baseline, exact_side, make_sides
from benchmarks.harness import MODEL_REPEATS, Case, Options, Row, interleaved, verdict
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
    """Predicted seconds of ours and of each baseline."""
    text, layers = MODELS[name]
    one = replace(geometry(options), vision=TOWER, text=text, vocab_size=VOCABULARY)
    one = replace(one, vision_layers=1, text_layers=1)
    tower = more_seconds(replace(one, text=FULL.text, vocab_size=FULL.vocab_size), "vision_layers", options)
    decoder, names = more_seconds(one, "text_layers", options), ("padded", "reference")
    single = timed(one, options)
    ours, *others = [
        first + (layers - 1) * layer + (TOWER_LAYERS - 1) * tile_layer
        for first, layer, tile_layer in zip(single, decoder, tower, strict=True)
    ]
    checks = verified(one, options.device)
    for other, seconds, layer in zip(names, others, decoder[1:], strict=True):
        details = {"decoder layer seconds": decoder[0], "baseline decoder layer seconds": layer}
        yield Row(
            "depth", f"train-step {name}, by difference", options.device.type, "bfloat16", ours, other, seconds,
            seconds / ours, None, None, *verdict(checks[other]), details=details,
        )  # fmt: skip


@cache
def more_seconds(one: Geometry, kind: str, options: Options) -> list[float]:
    """What a second layer of a kind adds to a step of ours, `padded` and `reference`."""
    both = timed(one, options), timed(replace(one, **{kind: 2}), options)
    return [second - first for first, second in zip(*both, strict=True)]


@cache
def timed(sizes: Geometry, options: Options) -> list[float]:
    """Seconds of a step of ours, `padded` and `reference`."""
    sides = make_sides(make_records(sizes, PROBE), None, torch.bfloat16, options.device)
    samples = interleaved([side.step for side in sides], repeats=min(options.repeats, MODEL_REPEATS), min_seconds=0)
    return list(map(median, samples))


def verified(sizes: Geometry, device: torch.device) -> dict[str, list]:
    """The checks of each baseline, as in `train-step`."""
    records = make_records(sizes, PROBE)
    ours, *others = make_sides(records, None, torch.bfloat16, device)
    exact = exact_side(ours, records, None, device).result()
    result = ours.result()
    return {side.name: baseline(side, result, exact).checks for side in others}
