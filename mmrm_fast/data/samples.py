"""Groups to samples: token keys of one checkpoint's prompt, pictures sized by their headers; and pictures to tiles."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from mmrm_fast.data.images import ImageError, Source, Tiling, described, image_size, load_tiles, opened, white_tile
from mmrm_fast.data.prompt import Encoded, PromptEncoder, common_length, image_rows, place_images
from mmrm_fast.data.types import Group, Message, Pairs, RecordError, at, drawn
from mmrm_fast.data.workers import within

Overlong = Literal["skip", "truncate", "error"]
ProxyImage = Literal["none", "white"]
Inputs = Literal["all", "text", "image"]
Encode = Callable[[tuple[Message, ...], tuple[int, ...]], Encoded]  # responses with images of so many tiles
UsedPairs = Literal["all", "expand"] | int | None
KEYS_PER_TOKEN = 8  # gathered keys and values that cost about as much as one token


@dataclass(frozen=True)
class Sample:
    """One group ready to be packed, all but the pixels."""

    group: Group
    tiles_per_image: tuple[int, ...]
    main: Encoded
    text: Encoded | None = None  # the same group as the text-only proxy sees it
    dropped: tuple[RecordError, ...] = ()  # notes on pairs that were left out
    num_identical: int = 0  # pairs left out because their two sides are the same

    @property
    def num_tokens_unshared(self) -> int:
        """Tokens of all sequences, as if nothing were shared."""
        return sum(map(len, self.main.sequences))

    def cost(self, tokens_per_tile: int) -> int:
        """Work in tokens after sharing: tokens + gathered keys / `KEYS_PER_TOKEN` + image tokens encoded."""
        tokens, keys = self.main.num_tokens, self.main.prefix_length + self.num_tokens_unshared
        return tokens + keys // KEYS_PER_TOKEN + sum(self.tiles_per_image) * tokens_per_tile


@dataclass(frozen=True)
class Notes:
    """What some records have that is not trained on; adds up."""

    errors: tuple[RecordError, ...] = ()  # records that cannot be used
    dropped: tuple[RecordError, ...] = ()  # responses and records whose pairs were left out
    unrated: int = 0  # responses whose rating is not a finite number
    undrawn: int = 0  # pairs over the most that a record may have
    unpaired: int = 0  # records without a preference
    identical: int = 0  # pairs left out because their two sides are the same

    def __add__(self, other: "Notes") -> "Notes":
        return Notes(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Size(NamedTuple):
    """What the schedule knows of a sample."""

    cost: int = 0  # work in tokens, see `Sample.cost`; 0 where there is nothing to score
    pairs: int = 0
    notes: Notes | None = None  # where there are any

    @classmethod
    def of_error(cls, error: RecordError) -> "Size":
        """Of a record that cannot be used."""
        return cls(notes=Notes(errors=(error,)))


@dataclass(frozen=True)
class Preparer:
    """How groups become samples and their pictures tiles: one checkpoint's prompt and tiling, with a run's options.

    Args:
        overlong: `truncate` cuts a response that does not fit into `max_length`, as the encoder's `compat` always does;
            `skip` drops the pairs with it, `error` raises.
        with_text: also encode the text-only proxy's sequences.
        proxy_image: what that has for each image: nothing, or the tokens of one white tile, as the reference has it.
        inputs: for ablations; `text` has a white tile for each image, `image` an empty question.
        pairs: the preferences that are used: `all` in one sample; `expand`, a sample a pair; or so many, drawn by
            `seed`. Responses in none are left out. None: preferences do not matter and every response is scored.
        seconds: how long reading an image from a disk may take.
    """

    encoder: PromptEncoder
    tiling: Tiling
    overlong: Overlong = "truncate"
    with_text: bool = False
    proxy_image: ProxyImage = "none"
    inputs: Inputs = "all"
    pairs: UsedPairs = None
    seed: int = 0
    seconds: float | None = None

    def parts(self, group: Group) -> Iterator[Group]:
        """What a record's samples are made of."""
        count = len(group.pairs) if self.pairs == "expand" else 1
        return (self.part(group, number) for number in range(max(1, count)))

    def part(self, group: Group, number: int) -> Group:
        """What sample `number` of a record is made of."""
        pairs = group.pairs
        if self.pairs is None:
            return group
        if self.pairs == "expand":
            pairs = pairs[number : number + 1]
        elif self.pairs != "all":
            pairs = pairs[drawn(len(pairs), self.pairs, (self.seed, group.record))]
        counts = {"num_unrated": 0, "num_undrawn": 0} if number else {}  # once a record
        return only_paired(replace(group, pairs=pairs, **counts))

    def sample(self, group: Group) -> Sample:
        """Encode one group. Raises `RecordError` naming the field that cannot be encoded."""
        with at(group.source):
            sample = self.encode(group, tuple(map(self.num_tiles, group.images)))
        return sample if self.pairs is None else self.without_useless_pairs(sample)

    def tiles(self, group: Group) -> list[np.ndarray]:
        """Decode a group's pictures: uint8 `[I, S, S, 3]` each. Raises `RecordError`."""
        if self.inputs == "text":
            return [white_tile(self.tiling.tile_size) for _ in group.images]
        with at(group.source):
            return [self.in_time(load_tiles, image, self.tiling) for image in group.images]

    def whole(self, group: Group) -> tuple[Sample, list[np.ndarray]]:
        """A group's sample, without its pictures, and their tiles; each is opened once. Raises `RecordError`."""
        with opened(group.images) as images:
            seen = replace(group, images=images)
            sample, tiles = self.sample(seen), self.tiles(seen)
        return replace(sample, group=replace(sample.group, images=())), tiles

    def sizes(self, group: Group, *, decode: bool = False) -> list[Size]:
        """The size of every sample of a record, or the one of a record that cannot be used, which says why."""
        try:
            sizes = [self.size(self.sample(part)) for part in self.parts(group)]
            if decode:
                self.tiles(group)
        except RecordError as error:
            return [Size.of_error(error)]
        return sizes

    def size(self, sample: Sample) -> Size:
        """The size of a sample."""
        group, pairs = sample.group, len(sample.group.pairs)
        unpaired = int(not pairs and not sample.dropped)
        found = Notes((), sample.dropped, group.num_unrated, group.num_undrawn, unpaired, sample.num_identical)
        notes = None if found == Notes() else found
        if not sample.main.sequences:
            return Size(notes=notes)
        return Size(sample.cost(self.encoder.tokens_per_tile), pairs, notes)

    def encode(self, group: Group, tiles_per_image: tuple[int, ...]) -> Sample:
        """Encode one group whose images have `tiles_per_image` tiles."""
        prompt, tools = ("", ()) if self.inputs == "image" else (group.prompt, group.tools)
        encode = partial(self.encoder.encode, prompt, tools=tools)
        main, text = self.with_images(encode, group, tiles_per_image), None
        if self.with_text:
            encode = partial(encode, text_only=self.proxy_image == "none")
            text = self.with_images(encode, group, (1,) * len(group.images))
        return Sample(group, tiles_per_image, main, text)

    def with_images(self, encode: Encode, group: Group, tiles_per_image: tuple[int, ...]) -> Encoded:
        """All responses, each with the images that it is shown with, their rows counted over all of the group's."""
        if group.seen is None:
            return encode(group.replies, tiles_per_image)
        tiles = np.split(np.arange(sum(tiles_per_image)), np.cumsum(tiles_per_image)[:-1])
        sequences, prefixes, truncated = [], [], []
        for reply, place in zip(group.replies, group.places, strict=True):
            own = group.seen[place]
            alone = encode((reply,), tuple(tiles_per_image[image] for image in own))
            rows = [image_rows(tiles[image], self.encoder.tokens_per_tile) for image in own]
            sequences.append(place_images(alone.sequences[0], np.concatenate([np.zeros(0, np.int64), *rows])))
            prefixes.append(alone.prefix_length)
            truncated += alone.truncated
        shared = [common_length(sequences[0], sequence) for sequence in sequences]
        return Encoded(tuple(sequences), min([*prefixes, *shared], default=0), tuple(truncated))

    def num_tiles(self, image: Source) -> int:
        """Tiles that an image becomes, from its header. Raises `ImageError`."""
        if not self.encoder.tokens_per_tile:
            raise ImageError("the model reads text alone: leave pictures out, or take one with a vision tower")
        if self.inputs == "text":
            return 1
        return self.tiling.num_tiles(*self.in_time(image_size, image, self.tiling.compat))

    def in_time(self, read: Callable, image: Source, how: Any) -> Any:
        """What reading an image gives. Raises `ImageError`, also where a disk does not answer within `seconds`."""
        if self.seconds is None or isinstance(image, bytes):
            return read(image, how)
        try:
            return within(self.seconds, partial(read, image, how))
        except TimeoutError:
            raise ImageError(f"{described(image)}: not read within {self.seconds:g} seconds") from None

    def without_useless_pairs(self, sample: Sample) -> Sample:
        """The sample without pairs of which one side was cut, unless that is the policy, or both are the same.

        What is left out is noted in `dropped`; an overlong response is an error where the policy is `error`.
        """
        group, ends = sample.group, sample.group.pairs.ends
        kept_cut = self.overlong == "truncate" or self.encoder.compat
        cut = [] if kept_cut else np.flatnonzero(sample.main.truncated).tolist()
        reason = f"does not fit into --max-length {self.encoder.max_length} behind its prompt"
        notes = [RecordError(group.source, f"response {i}", reason) for i in cut]
        if notes and self.overlong == "error":
            raise notes[0]
        same = same_sides(sample.main.sequences, ends)
        if not cut and not same.any():
            return sample
        overlong = np.isin(ends, cut).any(axis=1)
        useless, identical = overlong | same, int((same & ~overlong).sum())
        if identical:
            reason = f"{identical} of {len(ends)} pairs have two sides of the same tokens"
            notes.append(RecordError(group.source, "", reason))
        fitting = only_paired(replace(group, pairs=group.pairs[~useless]))
        return replace(self.encode(fitting, sample.tiles_per_image), dropped=tuple(notes), num_identical=identical)


def same_sides(sequences: Sequence[np.ndarray], ends: np.ndarray) -> np.ndarray:
    """Which pairs [P, 2] are of two sequences with the same token keys, bool [P]: their rewards cannot differ."""
    first: dict[bytes, int] = {}
    digests = (hashlib.blake2b(sequence, digest_size=16).digest() for sequence in sequences)
    number = np.array([first.setdefault(digest, len(first)) for digest in digests], int)
    return number[ends[:, 0]] == number[ends[:, 1]]


def only_paired(group: Group) -> Group:
    """The group without the responses that no pair names."""
    kept = np.unique(group.pairs.ends).tolist()
    if len(kept) == len(group.responses):
        return group
    return replace(
        group,
        responses=tuple(group.responses[index] for index in kept),
        pairs=Pairs(np.searchsorted(kept, group.pairs.ends).astype(np.int32), group.pairs.margins),
        truth=None if group.truth is None else tuple(group.truth[index] for index in kept),
        kept=tuple(group.places[index] for index in kept),
    )
