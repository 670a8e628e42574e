"""Samples to packed batches: every shared prefix once, every distinct image once; and which samples share a batch.

Shapes: T packed tokens, R responses, P pairs, I tiles, S pixels a tile side, N trie nodes, K gathered keys.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from mmrm_fast.dataset import GroupDataset, ProxyImage, Sample
from mmrm_fast.images import white_tile
from mmrm_fast.ops.pack_image_tokens import SourceIndex, source_index
from mmrm_fast.ops.pair_loss import PairIndex, pair_index
from mmrm_fast.ops.plan_trie import plan_trie
from mmrm_fast.records import RecordError

MIN_SHARED = 32
WINDOW = 4096


class OnDevice:
    """A dataclass whose tensors move together."""

    def to(self, device: torch.device | str):
        """A copy with every tensor on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")})


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
    max_seqlen_q: int
    max_seqlen_k: int
    num_tokens_unshared: int  # tokens of all sequences, as if nothing were shared

    def attention_plan(self) -> dict[str, Tensor | int]:
        """The keyword arguments that the attention reads."""
        names = ("cu_seqlens_q", "kv_index", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PackedBatch(OnDevice):
    """One forward of the model. `num_responses` says how many rewards belong to each sample, in order."""

    main: TokenPlan
    text: TokenPlan | None
    tiles: Tensor  # [I, S, S, 3] uint8, each distinct image once
    text_tiles: Tensor | None  # [1, S, S, 3] uint8: the white tile that the text-only proxy has for every image
    pairs: PairIndex
    margin_P: Tensor | None  # float32; None where no pair has a margin
    num_responses: tuple[int, ...]


def pack(
    samples: Sequence[Sample],
    images: Sequence[Sequence[np.ndarray]],
    *,
    tokens_per_tile: int,
    tile_size: int,
    min_shared: int = MIN_SHARED,
    with_text: bool = False,
    proxy_image: ProxyImage = "none",
) -> PackedBatch:
    """Pack samples and their images' tiles into one batch.

    Args:
        samples: the groups; none gives a batch of one token, no pair and no weight, which still runs.
        images: each sample's images as uint8 tiles [I, S, S, 3].
        tokens_per_tile: image tokens of a tile.
        tile_size: S, for a batch without images: one black tile stands in, whose features nothing reads, so that
            every rank runs the same modules.
        min_shared: shorter shared runs are recomputed instead of becoming a node.
        with_text: also plan the text-only proxy's tokens.
        proxy_image: `white` where the samples' `text` was encoded with white tiles.
    """
    tiles, bases = unique_tiles(images, tile_size)
    main = [
        place_images(sequence, rows)
        for sample, rows in zip(samples, image_rows(bases, images, tokens_per_tile), strict=True)
        for sequence in sample.main.sequences
    ]
    white = with_text and proxy_image == "white"
    text = [
        white_images(sequence, tokens_per_tile) if white else sequence
        for sample in samples
        for sequence in (sample.text.sequences if with_text else ())
    ]
    pairs, margin_P = flatten_pairs(samples)
    return PackedBatch(
        main=plan_tokens(main, min_shared),
        text=plan_tokens(text, min_shared) if with_text else None,
        tiles=torch.from_numpy(tiles),
        text_tiles=torch.from_numpy(white_tile(tile_size)) if white else None,
        pairs=pairs,
        margin_P=margin_P,
        num_responses=tuple(len(sample.main.sequences) for sample in samples),
    )


def unique_tiles(images: Sequence[Sequence[np.ndarray]], tile_size: int) -> tuple[np.ndarray, list[list[int]]]:
    """Tiles of the distinct images [I, S, S, 3] and, per sample and image, the row of its first tile."""
    first_tile: dict[bytes, int] = {}
    distinct, bases, count = [], [], 0
    for sample_images in images:
        bases.append([])
        for tiles in sample_images:
            key = hashlib.blake2b(tiles, digest_size=16).digest()
            if key not in first_tile:
                first_tile[key] = count
                distinct.append(tiles)
                count += len(tiles)
            bases[-1].append(first_tile[key])
    if not distinct:
        return np.zeros((1, tile_size, tile_size, 3), np.uint8), bases
    return np.concatenate(distinct), bases


def image_rows(bases, images, tokens_per_tile: int) -> list[np.ndarray]:
    """Per sample, the batch's feature row of each of the sample's image tokens, int64."""
    rows = []
    for sample_bases, sample_images in zip(bases, images, strict=True):
        spans = [np.arange(base, base + len(tiles)) for base, tiles in zip(sample_bases, sample_images, strict=True)]
        tile_rows = np.concatenate([np.zeros(0, np.int64), *spans])
        rows.append((tile_rows[:, None] * tokens_per_tile + np.arange(tokens_per_tile)).reshape(-1))
    return rows


def place_images(sequence: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A sequence's keys with its image rows counted over the batch instead of over the record."""
    is_image = sequence < 0
    placed = sequence.copy()
    placed[is_image] = -1 - rows[-1 - sequence[is_image]]
    return placed


def white_images(sequence: np.ndarray, tokens_per_tile: int) -> np.ndarray:
    """A sequence's keys with every image of one tile being the same."""
    return np.where(sequence < 0, -1 - (-1 - sequence) % tokens_per_tile, sequence)


def plan_tokens(sequences: Sequence[np.ndarray], min_shared: int) -> TokenPlan:
    """Plan one branch's sequences; none becomes a single sequence of one token."""
    sequences = sequences or [np.zeros(1, np.int64)]
    keys = np.concatenate(sequences)
    plan = plan_trie(keys, np.cumsum([0, *map(len, sequences)]), min_shared=min_shared)
    source_T = torch.from_numpy(keys[plan.token_index])
    return TokenPlan(
        source_T=source_T,
        source_index=source_index(source_T),
        position_ids_T=torch.from_numpy(plan.position_ids),
        cu_seqlens_q=torch.from_numpy(plan.cu_seqlens_q),
        kv_index=torch.from_numpy(plan.kv_index),
        cu_seqlens_k=torch.from_numpy(plan.cu_seqlens_k),
        last_index_R=torch.from_numpy(plan.last_index),
        max_seqlen_q=int(np.diff(plan.cu_seqlens_q).max()),
        max_seqlen_k=int(np.diff(plan.cu_seqlens_k).max()),
        num_tokens_unshared=len(keys),
    )


def flatten_pairs(samples: Sequence[Sample]) -> tuple[PairIndex, Tensor | None]:
    """The samples' pairs over the batch's responses, and their margins [P] where there are any."""
    chosen, rejected, margin, first = [], [], [], 0
    for sample in samples:
        chosen += [first + pair.chosen for pair in sample.group.pairs]
        rejected += [first + pair.rejected for pair in sample.group.pairs]
        margin += [pair.margin for pair in sample.group.pairs]
        first += len(sample.main.sequences)
    index = pair_index(
        torch.tensor(chosen, dtype=torch.int64), torch.tensor(rejected, dtype=torch.int64), max(first, 1)
    )
    return index, torch.tensor(margin, dtype=torch.float32) if any(margin) else None


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward, and its place in the schedule."""

    samples: tuple[Sample, ...]
    ends_step: bool = True
    consumed: int = 0  # records of the order used up when this step is done


@dataclass(frozen=True)
class Packed:
    """A micro-batch ready for the model; samples whose images cannot be decoded are in `errors` instead."""

    batch: PackedBatch
    samples: tuple[Sample, ...]
    errors: dict[int, RecordError]  # by the sample's place in the micro-batch
    ends_step: bool
    consumed: int


class Packer:
    """Decodes and packs micro-batches; as a torch map-style data set its index is the `MicroBatch` itself.

    Args:
        dataset: where the samples come from.
        with_text: also plan the text-only proxy's tokens.
        min_shared: see `pack`.
    """

    def __init__(self, dataset: GroupDataset, *, with_text: bool = False, min_shared: int = MIN_SHARED):
        self.dataset, self.with_text, self.min_shared = dataset, with_text, min_shared

    def __getitem__(self, micro: MicroBatch) -> Packed:
        samples, images, errors = [], [], {}
        for place, sample in enumerate(micro.samples):
            try:
                images.append(self.dataset.load(sample))
                samples.append(sample)
            except RecordError as error:
                errors[place] = error
        batch = pack(
            samples,
            images,
            tokens_per_tile=self.dataset.encoder.tokens_per_tile,
            tile_size=self.dataset.tiling.tile_size,
            min_shared=self.min_shared,
            with_text=self.with_text,
            proxy_image=self.dataset.proxy_image,
        )
        return Packed(batch, tuple(samples), errors, micro.ends_step, micro.consumed)


def schedule(
    dataset: GroupDataset,
    order: Sequence[int],
    *,
    tokens_per_batch: int,
    tokens_per_micro_batch: int,
    on_error: Callable[[RecordError], None],
    on_sample: Callable[[Sample], None] = lambda sample: None,
    rank: int = 0,
    num_ranks: int = 1,
    window: int = WINDOW,
) -> Iterator[MicroBatch]:
    """One rank's micro-batches over the records of `order`; which records make a step depends on no rank.

    Records are encoded `window` at a time, cut into steps of at most `tokens_per_batch` work, and each step is
    balanced over the ranks in micro-batches of at most `tokens_per_micro_batch`; every rank gets equally many.
    Every encoded record is shown to `on_sample`, and passed over if it has no response to score; one that cannot be
    encoded goes to `on_error`.
    """
    tokens_per_tile = dataset.encoder.tokens_per_tile
    pending: list[tuple[int, Sample]] = []
    for start in range(0, len(order), window):
        stop = min(start + window, len(order))
        pending += encode_window(dataset, order, range(start, stop), on_error, on_sample)
        costs = [sample.cost(tokens_per_tile) for _, sample in pending]
        steps = cut(costs, tokens_per_batch)
        rest = steps.pop() if stop < len(order) and steps else range(0)
        for step in steps:
            done = len(order) if step.stop == len(pending) else pending[step.stop - 1][0] + 1
            bins = balance([costs[item] for item in step], tokens_per_micro_batch, num_ranks)[rank::num_ranks]
            for number, items in enumerate(bins):
                samples = tuple(pending[step.start + item][1] for item in items)
                yield MicroBatch(samples, number == len(bins) - 1, done)
        pending = [pending[item] for item in rest]


def encode_window(dataset, order, positions: range, on_error, on_sample) -> list[tuple[int, Sample]]:
    """The samples at `positions` of the order that have something to score, with their positions."""
    samples = []
    for position in positions:
        try:
            sample = dataset[int(order[position])]
        except RecordError as error:
            on_error(error)
            continue
        on_sample(sample)
        if sample.main.sequences:
            samples.append((position, sample))
    return samples


def cut(costs: Sequence[int], budget: int) -> list[range]:
    """Consecutive runs of items whose costs sum to at most `budget`; an item over it stands alone."""
    runs, start, total = [], 0, 0
    for index, cost in enumerate(costs):
        if index > start and total + cost > budget:
            runs.append(range(start, index))
            start, total = index, 0
        total += cost
    return [*runs, range(start, len(costs))] if costs else []


def balance(costs: Sequence[int], limit: int, num_ranks: int) -> list[list[int]]:
    """Deal items into a multiple of `num_ranks` bins of at most `limit` each (an item over it stands alone).

    Largest first into the emptiest bin; bins may be empty. Items keep their order inside a bin. Rank r takes
    `bins[r::num_ranks]`.
    """
    num_bins = -(-max(1, -(-sum(costs) // limit)) // num_ranks) * num_ranks
    while True:
        bins = deal(costs, num_bins)
        if all(len(items) <= 1 or sum(costs[item] for item in items) <= limit for items in bins):
            return bins
        num_bins += num_ranks


def deal(costs: Sequence[int], num_bins: int) -> list[list[int]]:
    """Each item, largest first, into the emptiest of `num_bins`."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + costs[item], number))
        bins[number].append(item)
    return [sorted(items) for items in bins]
