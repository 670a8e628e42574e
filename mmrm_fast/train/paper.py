"""A micro-batch's time on H100s on paper: counted work over assumed rates, nothing timed.

Of the language model alone. Products are those of `rates`; what is done element by element is counted as the bytes that
a forward and a backward pass of a block read and write, run on the meta device. Gathering weights and adding up
gradients go on beside them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrm_fast.train.memory import count, run_decoder
from mmrm_fast.train.rates import PEAK_FLOPS, pass_flops

PEAK, PRODUCTS = PEAK_FLOPS["H100"], 0.65  # dense bf16, and the share of it that large products reach, assumed
ATTENTION = {"FlashAttention-2": 0.4, "FlashAttention-3": 0.65}  # of the peak, forward and backward, assumed
MEMORY, LINK = 0.85 * 3.35e12, 350e9  # bytes a second that copies and NVLink's collectives reach, assumed
KEYS = 1_000  # that a query sees, in the mean of records of 7 tiles
STEP = 8  # micro-batches whose gradients are added up over GPUs once


class Way(NamedTuple):
    """How a step is computed."""

    name: str
    recomputed: bool
    compiled: bool
    attention: str
    tokens: int
    reductions: float = 1.0  # of gradients, a micro-batch


def ways(tokens: int) -> list[Way]:
    """From what takes the least memory to what takes the least time."""
    return [
        Way("all recomputed", True, False, "FlashAttention-2", tokens),
        Way("nothing recomputed", False, False, "FlashAttention-2", tokens),
        Way("and compiled", False, True, "FlashAttention-2", tokens),
        Way("and FlashAttention-3, 32k, gradients held", False, True, "FlashAttention-3", 32_768, 1 / STEP),
    ]


def paper_rows(models: dict[int, nn.Module], num_gpus: int, tokens: int) -> Iterator[tuple[str, ...]]:
    """Milliseconds of a micro-batch and of its parts, tokens a second, model FLOPs utilisation, by `ways`.

    Args:
        models: the language model on the meta device, by its number of blocks: of 1, of 2 and of all.
    """
    one, two, whole = (models[number] for number in (1, 2, max(models)))
    block = [after - before for before, after in zip(traffic(one), traffic(two), strict=True)]
    layers, config = len(whole.layers), whole.config
    for way in ways(tokens):
        flops = way.tokens * pass_flops(whole.layers)
        passes = 2 + way.recomputed  # in forwards, with a backward of twice or two and a half times as much
        forward = way.tokens * 2 * sum(p.numel() for p in whole.layers.parameters() if p.ndim > 1)
        products = (flops + forward * way.recomputed) / (PRODUCTS * PEAK)
        pairs = 4 * config.num_attention_heads * whole.layers[0].self_attn.head_dim * KEYS * way.tokens * layers
        attention = pairs * (passes - 1 + 2.5) / (ATTENTION[way.attention] * PEAK)
        kept, again = (block[1], 0) if way.compiled else (block[0], block[2] * way.recomputed)
        elements = way.tokens * layers * (kept + again) / MEMORY
        moved = (2 * 2 * count(whole) + 4 * count(whole, True) * way.reductions) * (1 - 1 / num_gpus)
        seconds = max(products + attention + elements, moved / LINK)
        parts = (f"{1e3 * part:.0f}" for part in (seconds, products, attention, elements, moved / LINK))
        yield way.name, *parts, f"{way.tokens / seconds:,.0f}", f"{flops / PEAK / seconds:.0%}"


def traffic(decoder: nn.Module, tokens: int = 1024) -> tuple[float, float, float]:
    """Bytes a token of a forward and a backward: operation by operation, fused, and of the forward alone."""
    with Traffic() as seen:
        hidden = run_decoder(decoder, tokens)
        forward = seen.eager
        hidden.sum().backward()
    decoder.zero_grad()
    return seen.eager / tokens, seen.fused / tokens, forward / tokens


class Traffic(TorchDispatchMode):
    """Bytes that are read and written beside products and attention: by each operation, or `fused` between products.

    Fused, a value that is used before the next product alone is never written; another is written once, and read by
    each run of operations that uses it.
    """

    def __init__(self):
        super().__init__()
        self.eager = self.fused = self.run = 0
        self.made: dict[int, tuple] = {}  # by storage: the run that made it, whether it is written; and the storage
        self.read: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        inputs, outputs = (
            {x.untyped_storage()._cdata: x for x in tree_leaves(values) if isinstance(x, Tensor)}
            for values in ((args, kwargs), out)
        )
        if not outputs or (outputs.keys() <= inputs.keys() and not op._schema.is_mutable):  # a view
            return out
        is_product = any(part in op.name() for part in ("mm", "attention", "convolution"))
        self.run += is_product
        for key, x in inputs.items():
            self.use(key, min(x.nbytes, x.untyped_storage().nbytes()), is_product)
        self.eager += 0 if is_product else sum(x.nbytes for x in (*inputs.values(), *outputs.values()))
        for key, x in outputs.items():
            self.made[key] = (None if is_product else self.run, is_product, x.untyped_storage())
        self.run += is_product
        return out

    def use(self, key: int, nbytes: int, by_product: bool) -> None:
        run, is_written, storage = self.made.get(key, (None, True, None))
        if run == self.run and not by_product:
            return
        self.fused += 0 if is_written else nbytes
        self.made[key] = run, True, storage
        if not by_product and (key, self.run) not in self.read:
            self.fused += nbytes
            self.read.add((key, self.run))
