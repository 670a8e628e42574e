"""Samples to packed batches: every shared prefix once, every distinct image once.

Shapes: T packed tokens, R responses, P pairs, I tiles, S pixels a tile side, N trie nodes, K gathered keys.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrm_fast.data.images import white_tile
from mmrm_fast.data.prompt import image_rows, place_images
from mmrm_fast.data.samples import Notes, Preparer, ProxyImage, Sample
from mmrm_fast.data.types import RecordError
from mmrm_fast.ops.pack_image_tokens import SourceIndex, source_index
from mmrm_fast.ops.plan_trie import TriePlan, attention_calls, plan_trie

MIN_SHARED = 32  # shorter shared runs are recomputed instead of becoming a node
REGIME_SHIFT = 40  # token keys are far below it


def map_tensors(value, function: Callable[[Tensor], Tensor]):
    """A dataclass with `function` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if not is_dataclass(value):
        return value
    return replace(value, **{field.name: map_tensors(getattr(value, field.name), function) for field in fields(value)})


class OnDevice:
    """A dataclass whose tensors move together."""

    def to(self, device: torch.device | str):
        """A copy with every tensor on `device`, without waiting for page-locked ones."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class TokenPlan(OnDevice):
    """Packed tokens of one branch: a forest of token tries."""

    source_T: Tensor  # int64: token id, or -1 - row of the batch's image features
    source_index: SourceIndex  # of source_T
    position_ids_T: Tensor  # int64
    cu_seqlens_q: Tensor  # [N + 1] int32
    kv_index: Tensor  # [K] int64
    cu_seqlens_k: Tensor  # [N + 1] int32
    last_index_R: Tensor  # int64: where each response's reward is read
    read_index: Tensor  # int64: the distinct ones among them, increasing
    read_row_R: Tensor  # int64: each response's row among those
    read_kv_index: Tensor  # int64: what each of the distinct ones attends over, one after another
    read_cu_seqlens_k: Tensor  # int32: their edges
    calls: Tensor  # int32, see `plan_trie.AttentionCalls`
    call_sizes: tuple[int, ...]
    read_calls: Tensor  # of the tokens that are read alone
    read_call_sizes: tuple[int, ...]
    max_seqlen_q: int
    max_seqlen_k: int
    num_tokens_unshared: int  # tokens of all sequences, as if nothing were shared
    rope_regimes_T: Tensor | None = None  # int64, of each token's sequence; None where all have the usual frequencies

    def rope_positions(self) -> Tensor:
        """Position ids [1, T], or [2, T] with `rope_regimes_T` below them, as `decoder.OwnLengthRope` takes them."""
        rows = [self.position_ids_T] if self.rope_regimes_T is None else [self.position_ids_T, self.rope_regimes_T]
        return torch.stack(rows)

    def attention_plan(self) -> dict[str, Tensor | int]:
        """The keyword arguments that the attention reads, the last layer's among them."""
        names = ("cu_seqlens_q", "kv_index", "cu_seqlens_k", "calls", "call_sizes", "max_seqlen_q", "max_seqlen_k")
        names += ("read_index", "read_kv_index", "read_cu_seqlens_k", "read_calls", "read_call_sizes")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PackedBatch(OnDevice):
    """One forward of the model. `num_responses` says how many rewards belong to each sample, in order."""

    main: TokenPlan
    text: TokenPlan | None
    tiles: Tensor  # [I, S, S, 3] uint8, each distinct image once
    text_tiles: Tensor | None  # [1, S, S, 3] uint8: the white tile that the text-only proxy has for every image
    chosen_P: Tensor  # int64, among the batch's responses
    rejected_P: Tensor  # int64
    margin_P: Tensor | None  # float32; None where no pair has a margin
    num_responses: tuple[int, ...]


def pack(
    samples: Sequence[Sample],
    images: Sequence[Sequence[np.ndarray]],
    *,
    tokens_per_tile: int,
    tile_size: int,
    with_text: bool = False,
    proxy_image: ProxyImage = "none",
    rope_regime: Callable[[int], int] | None = None,
) -> PackedBatch:
    """Pack samples and their images' uint8 tiles [I, S, S, 3] into one batch.

    Without samples it has one token, no pair and no weight, and still runs; without images one black tile, whose
    features nothing reads, so that every rank runs the same modules.

    Args:
        with_text: also plan the text-only proxy's tokens.
        proxy_image: `white` where the samples' `text` was encoded with white tiles.
        rope_regime: see `decoder.rope_regime`; only sequences of one regime share a prefix.
    """
    tiles, places = unique_tiles(images, tile_size)
    rows = [image_rows(own, tokens_per_tile) for own in places]
    sharing = zip(samples, rows, strict=True)
    main = [place_images(sequence, own) for sample, own in sharing for sequence in sample.main.sequences]
    text = [sequence for sample in samples for sequence in sample.text.sequences] if with_text else []
    is_white = with_text and proxy_image == "white"
    if is_white:  # every image is the same one of one tile
        text = [np.where(keys < 0, -1 - (-1 - keys) % tokens_per_tile, keys) for keys in text]
    chosen_P, rejected_P, margin_P = flatten_pairs(samples)
    return PackedBatch(
        main=plan_tokens(main, rope_regime),
        text=plan_tokens(text, rope_regime) if with_text else None,
        tiles=torch.from_numpy(tiles),
        text_tiles=torch.from_numpy(white_tile(tile_size)) if is_white else None,
        chosen_P=chosen_P,
        rejected_P=rejected_P,
        margin_P=margin_P,
        num_responses=tuple(len(sample.main.sequences) for sample in samples),
    )


def unique_tiles(images: Sequence[Sequence[np.ndarray]], tile_size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tiles of the distinct images [I, S, S, 3] and, per sample, which of them its images' tiles are, int64."""
    first_tile: dict[bytes, int] = {}
    distinct, places, count = [], [], 0
    for sample_images in images:
        own = [np.zeros(0, np.int64)]
        for tiles in sample_images:
            key = hashlib.blake2b(tiles, digest_size=16).digest()
            if key not in first_tile:
                first_tile[key] = count
                distinct.append(tiles)
                count += len(tiles)
            own.append(first_tile[key] + np.arange(len(tiles)))
        places.append(np.concatenate(own))
    return np.concatenate(distinct or [np.zeros((1, tile_size, tile_size, 3), np.uint8)]), places


def plan_tokens(sequences: Sequence[np.ndarray], rope_regime: Callable[[int], int] | None = None) -> TokenPlan:
    """Plan one branch's sequences; none becomes a single sequence of one token."""
    sequences = sequences or [np.zeros(1, np.int64)]
    keys = np.concatenate(sequences)
    lengths = [*map(len, sequences)]
    regimes = np.repeat([rope_regime(length) if rope_regime else 0 for length in lengths], lengths).astype(np.int64)
    plan = plan_trie(keys + (regimes << REGIME_SHIFT), np.cumsum([0, *lengths]), min_shared=MIN_SHARED)
    source_T = torch.from_numpy(keys[plan.token_index])
    read_index, read_row = np.unique(plan.last_index, return_inverse=True)
    paths = [*map(partial(path, plan), read_index)]
    calls, read_calls = attention_calls(plan), attention_calls(plan, read_index)
    return TokenPlan(
        source_T=source_T,
        source_index=source_index(source_T),
        position_ids_T=torch.from_numpy(plan.position_ids),
        cu_seqlens_q=torch.from_numpy(plan.cu_seqlens_q),
        kv_index=torch.from_numpy(plan.kv_index),
        cu_seqlens_k=torch.from_numpy(plan.cu_seqlens_k),
        last_index_R=torch.from_numpy(plan.last_index),
        read_index=torch.from_numpy(read_index),
        read_row_R=torch.from_numpy(read_row),
        read_kv_index=torch.from_numpy(np.concatenate(paths)),
        read_cu_seqlens_k=torch.from_numpy(np.cumsum([0, *map(len, paths)], dtype=np.int32)),
        calls=torch.from_numpy(calls.edges),
        call_sizes=calls.sizes,
        read_calls=torch.from_numpy(read_calls.edges),
        read_call_sizes=read_calls.sizes,
        max_seqlen_q=int(np.diff(plan.cu_seqlens_q).max()),
        max_seqlen_k=int(np.diff(plan.cu_seqlens_k).max()),
        num_tokens_unshared=len(keys),
        rope_regimes_T=torch.from_numpy(regimes[plan.token_index]) if regimes.any() else None,
    )


def path(plan: TriePlan, token: int) -> np.ndarray:
    """What a packed token attends over: its ancestors and itself, int64."""
    node = np.searchsorted(plan.cu_seqlens_q, token, side="right") - 1
    unseen = plan.cu_seqlens_q[node + 1] - 1 - token
    return plan.kv_index[plan.cu_seqlens_k[node] : plan.cu_seqlens_k[node + 1] - unseen]


def flatten_pairs(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The samples' pairs over the batch's responses, chosen and rejected [P], and their margins where any has one."""
    firsts = np.cumsum([0, *(len(sample.main.sequences) for sample in samples)])
    pairs = [sample.group.pairs for sample in samples]
    ends = np.concatenate(
        [np.zeros((0, 2), np.int64), *(first + own.ends for first, own in zip(firsts, pairs, strict=False))]
    )
    margin_P = np.concatenate([np.zeros(0), *(own.margins for own in pairs)])
    chosen_P, rejected_P = (torch.from_numpy(np.ascontiguousarray(column)) for column in ends.T)
    return chosen_P, rejected_P, torch.from_numpy(margin_P).float() if margin_P.any() else None


@dataclass(frozen=True)
class Step:
    """One step of the schedule, the same on every rank."""

    consumed: int  # records of the order used up when it is done
    records: int  # that it scores, over all ranks
    imbalance: float  # max over mean cost of the ranks
    notes: Notes  # on the records from the step before to `consumed`


@dataclass(frozen=True)
class MicroBatch:
    """Samples that share a forward, as indices of a data set."""

    samples: tuple[int, ...]
    step: Step | None = None  # the step that it ends


@dataclass(frozen=True)
class Packed:
    """A micro-batch ready for the model; items that could not be prepared are in `errors` instead."""

    batch: PackedBatch
    samples: tuple[Sample, ...]
    errors: dict[int, RecordError]  # by the item's place in the micro-batch
    step: Step | None = None

    def pin_memory(self) -> "Packed":
        """The same in page-locked memory; a DataLoader calls it."""
        return replace(self, batch=map_tensors(self.batch, Tensor.pin_memory))


def pack_items(
    preparer: Preparer,
    items: Sequence,
    prepare: Callable[[Any], tuple[Sample, list[np.ndarray]]],
    step: Step | None = None,
) -> Packed:
    """One batch of what `prepare` makes of the items, with the options of `preparer`."""
    samples, images, errors = [], [], {}
    for place, item in enumerate(items):
        try:
            sample, tiles = prepare(item)
            samples.append(sample)
            images.append(tiles)
        except RecordError as error:
            errors[place] = error
    batch = pack(
        samples,
        images,
        tokens_per_tile=preparer.encoder.tokens_per_tile,
        tile_size=preparer.tiling.tile_size,
        with_text=preparer.with_text,
        proxy_image=preparer.proxy_image,
        rope_regime=preparer.encoder.rope_regime,
    )
    return Packed(batch, tuple(samples), errors, step)
