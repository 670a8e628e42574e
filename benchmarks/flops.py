"""FLOPs of a forward or a step, counted while it runs, and the rate at which this machine multiplies those shapes.

FLOPs are 2 x rows x inner x columns of every product, and 4 x head size x query heads for every (query, key) pair that
attention must compute, two and a half times that in its backward: what a causal mask hides is not counted.
Element-wise work is not counted either: it is what a bound leaves out.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import mmrm_fast.ops.trie_attention  # noqa: F401 registers the op
from benchmarks.harness import Bound

ATTENTION_BACKWARD = 2.5  # five products where the forward has two
ATTENTION = (
    torch.ops.mmrm_fast.trie_attention_fwd,
    torch.ops.mmrm_fast.trie_attention_bwd,
    *(
        getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{direction}")
        for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
        for direction in ("", "_backward")
    ),
)
Product = tuple[int, int, int]  # [rows, inner] x [inner, columns]


class Work(NamedTuple):
    """Matrix products, each so many times, their FLOPs and those of everything."""

    products: Counter[Product]
    linear_flops: int
    flops: float


def counted(function: Callable[[], object]) -> tuple[object, Work]:
    """What a function returns, and the work that it does."""
    products: Counter[Product] = Counter()

    def multiply(left: torch.Size, right: torch.Size, *_, **__) -> int:
        product = (*left, right[1])
        products[product] += 1
        return 2 * math.prod(product)

    formulas = {torch.ops.aten.mm: multiply, torch.ops.aten.addmm: lambda _, *rest, **__: multiply(*rest)}
    formulas |= {op: attention_formula(op) for op in ATTENTION}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        result = function()
    linear_flops = sum(2 * math.prod(product) * count for product, count in products.items())
    return result, Work(products, linear_flops, counter.get_total_flops())


def attention_formula(op: torch._ops.OpOverloadPacket) -> Callable[..., float]:
    """FLOPs of a call of one attention op."""
    names = [argument.name for argument in op.default._schema.arguments]

    def flops(*args, out_val: object, **kwargs) -> float:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query = given.get("q", given.get("query"))
        heads, head_size = query.shape[-2:] if "q" in given else (query.shape[1], query.shape[-1])
        factor = ATTENTION_BACKWARD if op.__name__.endswith(("bwd", "backward")) else 1
        return factor * 4.0 * heads * head_size * visible_pairs(given)

    flops._get_raw = True  # the counter passes tensors, not their shapes
    return flops


def visible_pairs(given: dict) -> float:
    """(query, key) pairs of an attention's arguments, causal ones aligned bottom-right."""
    if "q" in given:
        queries, keys = given["cu_seqlens_q"].diff().double(), given["cu_seqlens_k"].diff().double()
        is_causal, number, window = given.get("causal", True), 1, given.get("window")
    else:
        number = given["query"].shape[0]
        queries, keys = (torch.tensor(float(given[name].shape[2])) for name in ("query", "key"))
        is_causal, window = given.get("is_causal", False), None
    hidden = queries * (queries - 1) / 2 if is_causal else 0
    if window is not None:  # the last query does not see the first keys - window, the one before it one less
        unseen = [(count - window).clamp(min=0) for count in (keys, keys - queries)]
        hidden = hidden + (unseen[0] * (unseen[0] + 1) - unseen[1] * (unseen[1] + 1)) / 2
    return number * float((queries * keys - hidden).sum())


def work_bound(work: Work, dtype: torch.dtype, device: torch.device) -> Bound:
    """The least time that the work can take here: its matrix products by themselves, the rest at their mean rate."""
    on = {"device": device, "dtype": dtype}
    operands = [
        (torch.randn(rows, inner, **on), torch.randn(inner, columns, **on), torch.empty(rows, columns, **on), count)
        for (rows, inner, columns), count in work.products.items()
    ]

    def run() -> None:
        for left, right, out, count in operands:
            for _ in range(count):
                torch.mm(left, right, out=out)

    return Bound(run, "matrix products", scale=work.flops / work.linear_flops)
