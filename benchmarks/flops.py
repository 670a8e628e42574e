"""Exact FLOPs of a forward or a step, as matrix products, and the rate at which this machine multiplies those shapes.

FLOPs are 2 x rows x inner x columns of every product, and 4 x head size x query heads for every (query, key) pair that
attention computes (twice that and a half again in its backward). Element-wise work is not counted: it is what a bound
leaves out.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.baselines import PaddedBatch
from benchmarks.harness import Bound
from mmrm_fast.data.packing import PackedBatch, TokenPlan

ATTENTION_BACKWARD = 2.5  # five products where the forward has two


class Product(NamedTuple):
    """[rows, inner] x [inner, columns]."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass
class Work:
    """Matrix products, each so many times, and what attention multiplies."""

    products: Counter[Product]
    attention_flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.products + other.products, self.attention_flops + other.attention_flops)

    @property
    def linear_flops(self) -> int:
        return sum(product.flops * count for product, count in self.products.items())

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops


def linear(rows: int, inner: int, columns: int, *, times: int = 1, trained: bool) -> Counter[Product]:
    """A linear layer's forward and, where it is trained, the gradients of its input and of its weight."""
    counts = Counter({Product(rows, inner, columns): times})
    if trained:
        counts += Counter({Product(rows, columns, inner): times}) + Counter({Product(columns, rows, inner): times})
    return counts


@dataclass(frozen=True)
class Sizes:
    """Of an InternVL: a vision tower, its projector and a language model."""

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
    patches: int = 1024  # of a tile
    patch_values: int = 3 * 14 * 14

    @classmethod
    def of(cls, config) -> "Sizes":
        """The sizes of transformers' `InternVLConfig`."""
        vision, text = config.vision_config, config.text_config
        patch = vision.patch_size[0]
        return cls(
            vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size, text.hidden_size,
            text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, text.intermediate_size,
            text.vocab_size, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            (vision.image_size[0] // patch) ** 2, 3 * patch**2,
        )  # fmt: skip

    @property
    def tokens_per_tile(self) -> int:
        return self.patches // 4

    @property
    def text_parameters(self) -> int:
        """Of the decoder's layers and the embedding."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + self.vocab * self.hidden

    @property
    def vision_parameters(self) -> int:
        return self.vision_layers * (4 * self.vision_hidden**2 + 2 * self.vision_hidden * self.vision_mlp)


def vision_work(sizes: Sizes, tiles: int, *, trained: bool) -> Work:
    """A frozen vision tower and, `trained`, its projector on `tiles` tiles."""
    rows, width = tiles * (sizes.patches + 1), sizes.vision_hidden
    products = linear(tiles * sizes.patches, sizes.patch_values, width, trained=False)
    products += linear(rows, width, width, times=4 * sizes.vision_layers, trained=False)
    products += linear(rows, width, sizes.vision_mlp, times=sizes.vision_layers, trained=False)
    products += linear(rows, sizes.vision_mlp, width, times=sizes.vision_layers, trained=False)
    tokens = tiles * sizes.tokens_per_tile
    products += linear(tokens, 4 * width, sizes.hidden, trained=trained)
    products += linear(tokens, sizes.hidden, sizes.hidden, trained=trained)
    return Work(products, 4.0 * width * sizes.vision_layers * tiles * (sizes.patches + 1) ** 2)


def text_work(
    sizes: Sizes,
    tokens: int,
    pairs: float,
    *,
    read: int | None = None,
    read_pairs: float = 0,
    head_tokens: int = 0,
    trained: bool,
) -> Work:
    """A decoder on `tokens` tokens whose attention computes `pairs` (query, key) pairs a layer.

    Args:
        read: tokens of the last layer whose queries and MLP run; None for all.
        read_pairs: (query, key) pairs that they make.
        head_tokens: tokens that a vocabulary head runs on, forward alone: nothing reads its logits.
    """
    queries, keys = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    products: Counter[Product] = Counter()
    products += linear(tokens, sizes.hidden, keys, times=2 * sizes.layers, trained=trained)
    for rows, layers in ((tokens, sizes.layers - 1), (tokens if read is None else read, 1)):
        products += linear(rows, sizes.hidden, queries, times=layers, trained=trained)
        products += linear(rows, queries, sizes.hidden, times=layers, trained=trained)
        products += linear(rows, sizes.hidden, sizes.mlp, times=2 * layers, trained=trained)
        products += linear(rows, sizes.mlp, sizes.hidden, times=layers, trained=trained)
    if head_tokens:
        products += linear(head_tokens, sizes.hidden, sizes.vocab, trained=False)
    factor = 1 + ATTENTION_BACKWARD * trained
    computed = (sizes.layers - 1) * pairs + (pairs if read is None else read_pairs)
    return Work(products, factor * 4.0 * queries * computed)


def triangle(length: int) -> float:
    """(query, key) pairs of a causal sequence."""
    return length * (length + 1) / 2


def visible_pairs(plan: TokenPlan) -> float:
    """(query, key) pairs that a packed plan's attention computes: causal, bottom-right."""
    queries, keys = plan.cu_seqlens_q.diff().double(), plan.cu_seqlens_k.diff().double()
    return float((queries * (keys - queries) + queries * (queries + 1) / 2).sum())


def batch_work(sizes: Sizes, batch: PackedBatch, *, trained: bool) -> Work:
    """What a packed batch needs: both branches, where there is a proxy."""
    work = vision_work(sizes, len(batch.tiles), trained=trained)
    if batch.text_tiles is not None:
        work += vision_work(sizes, len(batch.text_tiles), trained=trained)
    for plan in (batch.main, batch.text):
        if plan is not None:
            work += text_work(
                sizes, len(plan.source_T), visible_pairs(plan), read=len(plan.read_index),
                read_pairs=len(plan.read_kv_index), trained=trained,
            )  # fmt: skip
    return work


def padded_work(sizes: Sizes, batch: PaddedBatch, *, head: bool) -> Work:
    """What a training step on padded sequences computes, SDPA leaving out what a causal mask hides.

    Args:
        head: with a vocabulary head on all tokens.
    """
    rows, length = batch.input_ids_RL.shape
    work = text_work(sizes, rows * length, rows * triangle(length), head_tokens=rows * length * head, trained=True)
    return work if batch.pixels_ICSS is None else work + vision_work(sizes, len(batch.pixels_ICSS), trained=True)


def work_bound(work: Work, dtype: torch.dtype, device: torch.device) -> Bound:
    """The least time that the work can take here: its matrix products by themselves, attention at their mean rate."""
    operands = [
        (
            torch.randn(rows, inner, device=device).to(dtype),
            torch.randn(inner, columns, device=device).to(dtype),
            torch.empty(rows, columns, device=device, dtype=dtype),
            count,
        )
        for (rows, inner, columns), count in work.products.items()
    ]

    def run() -> None:
        for left, right, out, count in operands:
            for _ in range(count):
                torch.mm(left, right, out=out)

    return Bound(run, "matrix products", scale=work.flops / work.linear_flops)


def total(works: Iterable[Work]) -> Work:
    """The sum of several."""
    result = Work(Counter())
    for work in works:
        result += work
    return result
