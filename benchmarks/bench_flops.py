"""Computed, nothing timed: a robust step of InternVL2 at the paper's batch, ours and the reference implementation's.

128 pairs, as in the paper, taken as alike: 7 tiles (6 and a thumbnail), 70 text tokens before responses of 150, so that
padding wastes nothing. Both train the language model and the projector, keep the vision tower frozen, recompute every
decoder layer in the backward (activation checkpointing) and compute in bf16. The reference runs chosen and rejected
apart, a vocabulary head on all tokens, the vision tower each time, and a proxy of the same size that sees a white tile,
4 pairs a forward; ours shares what `packing` shares, 4 pairs a forward, with the text-only proxy.

Activations: inputs kept of every decoder layer, all hidden states again and bf16 logits of the reference, one decoder
layer's inner values while it is recomputed. Weights: bytes read in forward, recomputation and both products of the
backward, over all forwards of the step. Published sizes of InternVL2 are written from memory.
"""

from collections.abc import Iterator
from functools import partial

from benchmarks.flops import Sizes, Work, text_work, total, triangle, vision_work
from benchmarks.harness import Case, Options, Row

SMALL_TOWER, LARGE_TOWER = (1024, 24, 4096), (3200, 45, 12800)
MODELS = {
    "InternVL2-1B": Sizes(*SMALL_TOWER, 896, 24, 14, 2, 4864, 151_655, 64),
    "InternVL2-2B": Sizes(*SMALL_TOWER, 2048, 24, 16, 8, 8192, 92_553, 128),
    "InternVL2-4B": Sizes(*SMALL_TOWER, 3072, 32, 32, 32, 8192, 32_020, 96),
    "InternVL2-8B": Sizes(*SMALL_TOWER, 4096, 32, 32, 8, 14_336, 92_553, 128),
    "InternVL2-26B": Sizes(*LARGE_TOWER, 6144, 48, 48, 8, 16_384, 92_553, 128),
}
PAIRS, PAIRS_PER_FORWARD, TILES, TEXT, RESPONSE = 128, 4, 7, 70, 150
H100_FLOPS, MFU = 989e12, 0.4  # dense bf16; model FLOPs utilisation, assumed
BF16 = 2  # bytes
WEIGHT_PASSES = 4  # forward, recomputation, two products of the backward


def cases(options: Options) -> Iterator[Case]:
    """One case a model."""
    for name, sizes in MODELS.items():
        yield Case(name, partial(rows, name, sizes))


def rows(name: str, sizes: Sizes) -> Iterator[Row]:
    """Predicted time of a step on one H100, and what it is computed from."""
    ours, theirs = our_step(sizes), reference_step(sizes)
    seconds, baseline_seconds = (work.flops / (MFU * H100_FLOPS) for work in (ours, theirs))
    yield Row(
        "flops", f"step of {name}", "H100", "bfloat16", seconds, "reference", baseline_seconds,
        baseline_seconds / seconds, computed=True, details={
            "TFLOP": ours.flops / 1e12, "reference TFLOP": theirs.flops / 1e12,
            "activation GB": activation_bytes(sizes, shared_tokens(sizes), False) / 1e9,
            "reference activation GB": activation_bytes(sizes, padded_tokens(sizes), True) / 1e9,
            "weight traffic GB": weight_bytes(sizes, passes=1, towers=1) / 1e9,
            "reference weight traffic GB": weight_bytes(sizes, passes=2, towers=2) / 1e9,
            "assumed MFU": MFU,
        },
    )  # fmt: skip


def prefix(sizes: Sizes, tiles: int) -> int:
    """Tokens before a response."""
    return tiles * sizes.tokens_per_tile + TEXT


def our_step(sizes: Sizes) -> Work:
    """Every prefix and image once; the proxy has no image."""
    works = [vision_work(sizes, PAIRS * TILES, trained=True)]
    for tiles in (TILES, 0):
        start = prefix(sizes, tiles)
        tokens, pairs = PAIRS * (start + 2 * RESPONSE), PAIRS * (triangle(start) + 2 * appended(start))
        works += decoder(sizes, tokens, pairs, read=2 * PAIRS, read_pairs=2 * PAIRS * (start + RESPONSE))
    return total(works)


def reference_step(sizes: Sizes) -> Work:
    """Chosen and rejected apart; the proxy sees a white tile in each."""
    works = []
    for tiles in (TILES, 1):
        length, sequences = prefix(sizes, tiles) + RESPONSE, 2 * PAIRS
        works.append(vision_work(sizes, sequences * tiles, trained=True))
        works += decoder(sizes, sequences * length, sequences * triangle(length), head_tokens=sequences * length)
    return total(works)


def decoder(sizes: Sizes, tokens: int, pairs: float, *, head_tokens: int = 0, **read) -> list[Work]:
    """A language model's step, its forward twice: activations are recomputed."""
    step = text_work(sizes, tokens, pairs, head_tokens=head_tokens, **read, trained=True)
    return [step, text_work(sizes, tokens, pairs, **read, trained=False)]


def appended(start: int) -> float:
    """(query, key) pairs of a response behind `start` tokens."""
    return RESPONSE * start + triangle(RESPONSE)


def shared_tokens(sizes: Sizes) -> int:
    """Packed tokens of one forward, main model."""
    return PAIRS_PER_FORWARD * (prefix(sizes, TILES) + 2 * RESPONSE)


def padded_tokens(sizes: Sizes) -> int:
    """Tokens of one forward of the reference and, both being kept for the loss, of the other."""
    return PAIRS_PER_FORWARD * 2 * (prefix(sizes, TILES) + RESPONSE)


def activation_bytes(sizes: Sizes, tokens: int, reference: bool) -> int:
    """Peak of the main model's forward and backward, see the module's docstring."""
    kept = sizes.layers * sizes.hidden * (2 if reference else 1) + sizes.vocab * reference
    attention = sizes.head_size * (2 * sizes.heads + 2 * sizes.kv_heads)
    inner_tokens = tokens // 2 if reference else tokens  # one of its two passes at a time
    return BF16 * (tokens * kept + inner_tokens * (4 * sizes.hidden + attention + 4 * sizes.mlp))


def weight_bytes(sizes: Sizes, *, passes: int, towers: int) -> float:
    """Bytes of weights that a step reads: `passes` over both language models, `towers` vision towers a pass."""
    forwards = PAIRS / PAIRS_PER_FORWARD
    vision = sizes.vision_parameters * passes * towers
    return BF16 * forwards * (2 * WEIGHT_PASSES * passes * sizes.text_parameters + vision)
