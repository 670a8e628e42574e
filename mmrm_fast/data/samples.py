"""Records to samples: groups encoded as token keys, images sized from their headers, tiles decoded when packed."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmrm_fast.data.images import ImageError, Tiling, image_size, load_tiles, white_tile
from mmrm_fast.data.prompt import Encoded, PromptEncoder, PromptError
from mmrm_fast.data.records import Group, Pairs, Prompt, RecordError, RecordFile

ProxyImage = Literal["none", "white"]
Inputs = Literal["all", "text", "image"]
KEYS_PER_TOKEN = 8  # gathered keys and values that cost about as much as one token


@dataclass(frozen=True)
class Sample:
    """One group ready to be packed, all but the pixels."""

    group: Group
    tiles_per_image: tuple[int, ...]
    main: Encoded
    text: Encoded | None = None  # the same group as the text-only proxy sees it
    dropped: tuple[RecordError, ...] = ()  # one note a response whose pairs were left out
    places: tuple[int, ...] | None = None  # of its responses among all that pairs name, where some were left out
    position: int | None = None  # where the dataset finds encoded images again, which are not carried along

    @property
    def num_tokens_unshared(self) -> int:
        """Tokens of all sequences, as if nothing were shared."""
        return sum(map(len, self.main.sequences))

    def cost(self, tokens_per_tile: int) -> int:
        """Work in tokens after sharing: tokens + gathered keys / `KEYS_PER_TOKEN` + image tokens encoded."""
        prefix = self.main.prefix_length
        tokens = prefix + sum(len(sequence) - prefix for sequence in self.main.sequences)
        keys = prefix + self.num_tokens_unshared
        return tokens + keys // KEYS_PER_TOKEN + sum(self.tiles_per_image) * tokens_per_tile


class GroupDataset:
    """The records of one or several files as samples, `dataset[i]`.

    Args:
        files: record files, concatenated.
        encoder: the checkpoint's prompt encoder.
        tiling: how its images become tiles.
        overlong: a response that does not fit into the encoder's `max_length`: `skip` drops the pairs with it,
            `truncate` cuts it, `error` raises; with the encoder's `compat` it is always cut.
        with_text: also encode the text-only proxy's sequences.
        proxy_image: what the proxy has in place of each image: `none`, no placeholder either, or `white`, the tokens of
            one white tile, as in the reference implementation.
        inputs: what the model sees of a record, for ablations: `all`; `text`, one white tile in place of each image; or
            `image`, an empty question.
    """

    def __init__(
        self,
        files: Sequence[RecordFile],
        encoder: PromptEncoder,
        tiling: Tiling,
        *,
        overlong: Literal["skip", "truncate", "error"] = "truncate",
        with_text: bool = False,
        proxy_image: ProxyImage = "none",
        inputs: Inputs = "all",
    ):
        self.files, self.encoder, self.tiling = tuple(files), encoder, tiling
        self.overlong, self.with_text = overlong, with_text
        self.proxy_image, self.inputs = proxy_image, inputs
        self.edges = np.cumsum([0, *map(len, self.files)])
        self.records: np.ndarray | None = None  # those selected, in order, as positions over all files

    def __len__(self) -> int:
        return int(self.edges[-1]) if self.records is None else len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Encode record `index`. Raises `RecordError`."""
        group = self.group(index)
        sample = self.encode(group)
        if not any(isinstance(image, bytes) for image in group.images):
            return sample
        return replace(sample, group=replace(sample.group, images=()), position=self.position(index))

    def position(self, index: int) -> int:
        """Where record `index` stands among all records of the files."""
        return int(index if self.records is None else self.records[index])

    def group(self, index: int) -> Group:
        """Parse record `index`. Raises `RecordError`."""
        return self.read(self.position(index))

    def read(self, position: int) -> Group:
        """Parse the record at this position of the files. Raises `RecordError`."""
        file = int(np.searchsorted(self.edges, position, side="right")) - 1
        return self.files[file].group(int(position - self.edges[file]))

    def select(self, records: np.ndarray):
        """The same data set with only these of its records (increasing indices)."""
        selected = copy(self)
        selected.records = records if self.records is None else self.records[records]
        return selected

    def records_per_file(self) -> list[int]:
        """How many of the records come from each file, which follow each other."""
        edges = self.edges if self.records is None else np.searchsorted(self.records, self.edges)
        return np.diff(edges).tolist()

    def encode(self, group: Group) -> Sample:
        """Encode one group. Raises `RecordError` naming the field that cannot be encoded."""
        try:
            tiles_per_image = tuple(map(self.num_tiles, group.images))
            sample = self.encode_sized(group, tiles_per_image)
        except ImageError as error:
            raise RecordError(group.source, "img_path", str(error)) from None
        except PromptError as error:
            raise RecordError(group.source, error.field, str(error)) from None
        if self.overlong == "truncate" or self.encoder.compat or not any(sample.main.truncated):
            return sample
        return self.without_overlong(sample)

    def encode_sized(self, group: Group, tiles_per_image: tuple[int, ...]) -> Sample:
        """Encode one group whose images have `tiles_per_image` tiles."""
        main = self.encoder.encode(self.prompt(group), group.responses, tiles_per_image)
        text = self.encode_text(group) if self.with_text else None
        return Sample(group, tiles_per_image, main, text)

    def prompt(self, group: Group) -> Prompt:
        """The question that the model sees."""
        return "" if self.inputs == "image" else group.prompt

    def encode_text(self, group: Group) -> Encoded:
        """Encode one group as the text-only proxy sees it."""
        if self.proxy_image == "white":
            return self.encoder.encode(self.prompt(group), group.responses, (1,) * len(group.images))
        return self.encoder.encode_text_only(self.prompt(group), group.responses, len(group.images))

    def num_tiles(self, image: str | bytes) -> int:
        """Tiles that an image becomes, from its header. Raises `ImageError`."""
        if self.inputs == "text":
            return 1
        return self.tiling.num_tiles(*image_size(image, self.tiling.compat))

    def without_overlong(self, sample: Sample) -> Sample:
        """Drop the pairs whose response was cut, each noted in `dropped`; raise where the policy is `error`."""
        group, cut = sample.group, sample.main.truncated
        reason = f"does not fit into --max-length {self.encoder.max_length} behind its prompt"
        notes = tuple(RecordError(group.source, f"response {i}", reason) for i, is_cut in enumerate(cut) if is_cut)
        if self.overlong == "error":
            raise notes[0]
        group = replace(group, pairs=group.pairs[~np.array(cut)[group.pairs.ends].any(axis=1)])
        fitting = self.encode_sized(only_paired(group), sample.tiles_per_image)
        return replace(fitting, dropped=notes, places=paired(group))

    def load(self, sample: Sample) -> list[np.ndarray]:
        """Decode a sample's images: uint8 `[I, S, S, 3]` each. Raises `RecordError`."""
        if self.inputs == "text":
            return [white_tile(self.tiling.tile_size) for _ in sample.tiles_per_image]
        group = sample.group if sample.position is None else self.read(sample.position)
        try:
            return [load_tiles(image, self.tiling) for image in group.images]
        except ImageError as error:
            raise RecordError(sample.group.source, "img_path", str(error)) from None


class PreferenceDataset(GroupDataset):
    """Groups for training and evaluation: responses that are in no pair are left out."""

    max_pairs: int | None = None  # more pairs of a record are left out, at random
    seed = 0
    pair_of: np.ndarray | None = None  # where every pair is a sample: which pair of its record, by sample

    def sampled(self, max_pairs: int, seed: int) -> "PreferenceDataset":
        """The same data set with at most `max_pairs` random pairs a record, for a seed always the same."""
        fewer = copy(self)
        fewer.max_pairs, fewer.seed = max_pairs, seed
        return fewer

    def expanded(self, num_pairs: np.ndarray) -> "PreferenceDataset":
        """The same data set with every pair a sample: `num_pairs` of each record, 0 where it has none."""
        counts = np.maximum(num_pairs, 1)  # a record without pairs stays, to be counted
        indices = np.repeat(np.arange(len(self)), counts)
        pairs = self.select(indices)
        pairs.pair_of = np.arange(len(indices)) - np.repeat(np.cumsum(counts) - counts, counts)
        return pairs

    def group(self, index: int) -> Group:
        """Parse record `index` with the pairs that are used of it. Raises `RecordError`."""
        group = super().group(index)
        if self.pair_of is not None:
            first = int(self.pair_of[index])
            return replace(group, pairs=group.pairs[first : first + 1])
        if self.max_pairs is not None and len(group.pairs) > self.max_pairs:
            chosen = np.random.default_rng((self.seed, index)).choice(len(group.pairs), self.max_pairs, replace=False)
            return replace(group, pairs=group.pairs[np.sort(chosen)])
        return group

    def num_pairs(self, index: int) -> int:
        """Pairs of record `index`, 0 where it cannot be parsed."""
        try:
            return len(self.group(index).pairs)
        except RecordError:
            return 0

    def encode(self, group: Group) -> Sample:
        """Encode one group's paired responses. Raises `RecordError`."""
        return super().encode(only_paired(group))


def paired(group: Group) -> tuple[int, ...]:
    """The responses that pairs name."""
    return tuple(np.unique(group.pairs.ends).tolist())


def only_paired(group: Group) -> Group:
    """The group without the responses that no pair names."""
    kept = paired(group)
    if len(kept) == len(group.responses):
        return group
    return replace(
        group,
        responses=tuple(group.responses[index] for index in kept),
        pairs=Pairs(np.searchsorted(kept, group.pairs.ends).astype(np.int32), group.pairs.margins),
        truth=None if group.truth is None else tuple(group.truth[index] for index in kept),
    )


def fault(dataset: GroupDataset, index: int, *, decode: bool) -> RecordError | None:
    """Why record `index` cannot be used, None if it can: syntax, fields, image headers (`decode`: pixels), lengths."""
    try:
        sample = dataset[index]
        if decode:
            dataset.load(sample)
    except RecordError as error:
        return error
    return None
