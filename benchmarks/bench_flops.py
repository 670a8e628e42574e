"""Computed, nothing timed: a robust step of InternVL2 at the paper's batch, ours and the reference implementation's.

128 pairs, as in the paper, taken as alike: 7 tiles (6 and a thumbnail), 70 text tokens before responses of 150, so that
padding wastes nothing. Both train the language model and the projector, keep the vision tower frozen, recompute every
decoder layer in the backward (activation checkpointing) and compute in bf16. The reference runs chosen and rejected
apart, a vocabulary head on all tokens, the vision tower each time, and a proxy of the same size that sees a white tile,
ours shares what `packing` shares, with the text-only proxy. Memory is the dry run's to predict. Published sizes of
InternVL2 are written from memory.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from benchmarks.flops import ATTENTION_BACKWARD
from benchmarks.harness import Case, Options, Row


class Sizes(NamedTuple):
    """Of an InternVL: a vision tower on tiles of 448 pixels and a language model."""

    vision_hidden: int
    vision_layers: int
    vision_mlp: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    head_size: int


SMALL_TOWER, LARGE_TOWER = (1024, 24, 4096), (3200, 45, 12800)
MODELS = {
    "InternVL2-1B": Sizes(*SMALL_TOWER, 896, 24, 14, 2, 4864, 151_655, 64),
    "InternVL2-2B": Sizes(*SMALL_TOWER, 2048, 24, 16, 8, 8192, 92_553, 128),
    "InternVL2-4B": Sizes(*SMALL_TOWER, 3072, 32, 32, 32, 8192, 32_020, 96),
    "InternVL2-8B": Sizes(*SMALL_TOWER, 4096, 32, 32, 8, 14_336, 92_553, 128),
    "InternVL2-26B": Sizes(*LARGE_TOWER, 6144, 48, 48, 8, 16_384, 92_553, 128),
}
PAIRS, TILES, TEXT, RESPONSE = 128, 7, 70, 150
PATCHES, PATCH_VALUES, TOKENS_PER_TILE = 1024, 3 * 14 * 14, 256  # of a tile, of a patch
H100_FLOPS, MFU = 989e12, 0.4  # dense bf16; model FLOPs utilisation, assumed


def cases(options: Options) -> Iterator[Case]:
    """One case a model."""
    for name, sizes in MODELS.items():
        yield Case(name, partial(rows, name, sizes))


def rows(name: str, sizes: Sizes) -> Iterator[Row]:
    """Predicted time of a step on one H100, and what it is computed from."""
    ours, theirs = our_flops(sizes), reference_flops(sizes)
    details = {"TFLOP": ours / 1e12, "reference TFLOP": theirs / 1e12, "assumed MFU": MFU}
    seconds, baseline_seconds = ours / (MFU * H100_FLOPS), theirs / (MFU * H100_FLOPS)
    yield Row(
        "flops", f"step of {name}", "H100", "bfloat16", seconds, "reference", baseline_seconds, theirs / ours,
        computed=True, details=details,
    )  # fmt: skip


def triangle(length: int) -> float:
    """(query, key) pairs of a causal sequence."""
    return length * (length + 1) / 2


def our_flops(sizes: Sizes) -> float:
    """Every prefix and image once; the proxy has no image; the last layer runs on what is read."""
    flops = vision_flops(sizes, PAIRS * TILES)
    for tiles in (TILES, 0):
        start = tiles * TOKENS_PER_TILE + TEXT
        pairs = triangle(start) + 2 * (RESPONSE * start + triangle(RESPONSE))
        read_pairs = 2 * (start + RESPONSE)
        flops += PAIRS * decoder_flops(sizes, start + 2 * RESPONSE, pairs, read=2, read_pairs=read_pairs)
    return flops


def reference_flops(sizes: Sizes) -> float:
    """Chosen and rejected apart; the proxy sees a white tile in each; a vocabulary head on all tokens."""
    flops = 0.0
    for tiles in (TILES, 1):
        length = tiles * TOKENS_PER_TILE + TEXT + RESPONSE
        decoder = decoder_flops(sizes, length, triangle(length), read=length, read_pairs=triangle(length))
        head = 2 * length * sizes.hidden * sizes.vocab
        flops += 2 * PAIRS * (decoder + head) + vision_flops(sizes, 2 * PAIRS * tiles)
    return flops


def decoder_flops(sizes: Sizes, tokens: int, pairs: float, *, read: int, read_pairs: float, forwards: int = 2) -> float:
    """A language model's step, by default its forward twice.

    `pairs` (query, key) pairs a layer, `read_pairs` in the last one, which runs on `read` tokens.
    """
    before = sizes.layers - 1
    kv_weights = 2 * sizes.hidden * sizes.kv_heads * sizes.head_size  # that every token passes in every layer
    other_weights = 2 * sizes.hidden * sizes.heads * sizes.head_size + 3 * sizes.hidden * sizes.mlp
    weights = sizes.layers * kv_weights * tokens + other_weights * (before * tokens + read)
    attention = 4 * sizes.heads * sizes.head_size * (before * pairs + read_pairs)
    return 2 * (forwards + 2) * weights + (forwards + ATTENTION_BACKWARD) * attention


def vision_flops(sizes: Sizes, tiles: int) -> float:
    """A frozen tower's forward and a trained projector's step."""
    width, rows = sizes.vision_hidden, PATCHES + 1
    layer = 2 * rows * (4 * width**2 + 2 * width * sizes.vision_mlp) + 4 * width * rows**2
    projector = TOKENS_PER_TILE * (4 * width * sizes.hidden + sizes.hidden**2)
    return tiles * (2 * PATCHES * PATCH_VALUES * width + sizes.vision_layers * layer + 3 * 2 * projector)
