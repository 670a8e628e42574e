"""Prompt, images and responses to token keys, by the checkpoint's own chat template.

A sequence is `template(system, user: images + prompt, assistant: response)` up to and including the token that a reward
is read at, the one that ends the response or the template's last (`RewardToken`); a conversation has more turns before
the response. A system message replaces the template's own. Image placeholder tokens become negative keys, -1 - row,
`row` counting the image tokens of the record.

`compat="reference"` takes over the habits of the public reference implementation (for pictures see `images`):

| | default | `compat="reference"` |
| --- | --- | --- |
| special tokens typed in a text | literal: `<|im_end|>` is six ordinary tokens | special tokens |
| `<image>` in a user's turn | a slot if there are as many as images, an error if not | literal |
| slots | prepended where the prompt has none | always prepended |
| `<image>` in a response | literal | literal |
| prefix over `max_length` | an error | cut on the right |
| response over `max_length` | cut, its end token kept; or `--overlong` | cut on the right, no end token |
| empty response | its end token alone | the generation prompt, no end token |

White space around a text stays, unless the chat template trims it (as `internlm2-chat` does).
"""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mmrm_fast.data.chat import ChatTemplate, Item, Rendered, Turn, Turns
from mmrm_fast.data.images import Compat
from mmrm_fast.data.types import FieldError, Message, Prompt

IMAGE = "<image>"
IMAGE_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")  # what opens an image, stands for it and closes it
PLAIN = "texts as they are: `{% for turn in messages %}{{ turn['content'] }}{% endfor %}{{ eos_token }}`"
SPACE = "\u2581"  # what sentencepiece writes for a space

RewardToken = Literal["end", "last"]  # the token that ends the response, or the last of the rendered conversation


@dataclass(frozen=True)
class Encoded:
    """One prompt with its responses as token keys (text ids >= 0, image rows -1 - row)."""

    sequences: tuple[np.ndarray, ...]  # int64, prefix and one response each
    prefix_length: int  # tokens before the responses
    truncated: tuple[bool, ...]  # responses cut to `max_length`

    @property
    def num_tokens(self) -> int:
        """Tokens with the prefix once."""
        return sum(map(len, self.sequences)) - self.prefix_length * (len(self.sequences) - 1)


def split_images(prompt: Prompt, num_images: int, compat: Compat = None) -> Turns:
    """The prompt's turns, each with the text around its image slots.

    `<image>` in users' turns is a slot if it occurs once an image; where there is none, slots are prepended to the
    first user's turn, each on a line (with `compat`, always).

    Raises:
        FieldError: any other number of `<image>`.
    """
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    turns = [*map(Turn.of, messages)]
    if not compat:
        split = [turn._replace(pieces=turn.pieces[0].split(IMAGE)) if turn.role == "user" else turn for turn in turns]
        found = sum(len(turn.pieces) - 1 for turn in split)
        if found == num_images:
            return split
        if found:
            raise FieldError("prompt", f"has {found} {IMAGE} for {num_images} images; use one each, or none")
    if num_images:
        first = [turn.role for turn in turns].index("user")
        pieces = [""] + ["\n"] * (num_images - 1) + ["\n" + turns[first].pieces[0]]
        turns[first] = turns[first]._replace(pieces=pieces)
    return turns


def without_images(turns: Turns) -> Turns:
    """What the text-only proxy sees: no placeholder, and no newline after it."""
    joined = lambda first, *rest: first + "".join(piece.removeprefix("\n") for piece in rest)  # noqa: E731
    return [turn._replace(pieces=[joined(*turn.pieces)]) for turn in turns]


class PromptEncoder:
    """Encodes records with one fast tokenizer, its chat template and an image layout.

    Args:
        tokens_per_tile: image tokens of a tile (256 for 448-pixel InternVL tiles); 0 for a model of text alone.
        max_length: tokens of prefix plus one response; the prefix is never cut.
        image_tokens: the tokens that open an image, stand for it and close it.
        compat: `reference` takes over the habits of the reference implementation (table above).
        unread: a token that is never read, as padding is by sequence classifiers: sequences end before it.
        rope_regime: which RoPE frequencies a sequence of so many tokens has (`decoder.rope_regime`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens_per_tile: int,
        max_length: int,
        image_tokens: tuple[str, str, str] = IMAGE_TOKENS,
        compat: Compat = None,
        reward_token: RewardToken = "end",
        unread: int | None = None,
        rope_regime: Callable[[int], int] | None = None,
    ):
        self.tokenizer, self.tokens_per_tile, self.max_length = tokenizer, tokens_per_tile, max_length
        self.compat, self.unread, self.rope_regime = compat, unread, rope_regime
        image_tokens = image_tokens if tokens_per_tile else ()
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer has no chat template, write one to chat_template.jinja; {PLAIN}")
        fields = backend_fields(tokenizer, image_tokens)
        spaceless = without_first_space(fields)
        self.first = self.backend = Tokenizer.from_str(json.dumps(fields))
        if spaceless != fields:
            self.backend = Tokenizer.from_str(json.dumps(spaceless))
        self.set_literal()
        self.writes_spaces = writes_spaces(fields)
        marks = [self.backend.token_to_id(token) for token in image_tokens[::2]]
        if None in marks:
            raise ValueError(f"the tokenizer lacks the image tokens {image_tokens}")
        hidden = {*image_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)}
        self.chat = ChatTemplate(tokenizer, hidden, marks, whole=reward_token == "last")

    def set_literal(self) -> None:
        """Read special and image tokens in text as ordinary text, but with `compat`."""
        for backend in (self.backend, self.first):
            backend.encode_special_tokens = self.compat is None

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self.set_literal()  # tokenizers does not pickle it

    def encode(
        self,
        prompt: Prompt,
        responses: Sequence[str | Message],
        tiles_per_image: tuple[int, ...] = (),
        *,
        tools: Sequence[str] = (),
        text_only: bool = False,
    ) -> Encoded:
        """Encode one prompt, its images (`tiles_per_image` in slot order) and all its responses.

        `tools` is the JSON of each; `text_only` leaves the images out, as the text-only proxy sees it.

        Raises:
            FieldError: the prefix alone does not fit, `<image>` does not match the images, or the chat template does
                not take these turns.
        """
        turns = split_images(prompt, len(tiles_per_image), self.compat)
        if text_only:
            turns, tiles_per_image = without_images(turns), ()
        answers = [*map(Turn.of, responses)]
        if self.writes_spaces:
            turns, answers = ([turn.replaced(SPACE, " ") for turn in own] for own in (turns, answers))
        tools = [*map(json.loads, tools)]
        rendered = self.chat.render(turns, answers, tiles_per_image, tools)
        sequences, shared = self.sequences(rendered)
        if self.compat:
            empty = self.encode_items(self.chat.unanswered(turns, tiles_per_image, tools))
            says = [answer.pieces != [""] or answer.extra for answer in answers]
            sequences = [keys if said else empty for said, keys in zip(says, sequences, strict=True)]
            return self.cut(sequences, shared, [])
        closing = self.encode_items(rendered.closing)
        if self.unread is not None:
            sequences, closing = [self.without_unread(keys) for keys in sequences], self.without_unread(closing)
        if shared + len(closing) >= self.max_length:
            raise FieldError("prompt", f"is {shared} tokens with its images; --max-length is {self.max_length}")
        return self.cut(sequences, shared, closing)

    def sequences(self, rendered: Rendered) -> tuple[list[list[int]], int]:
        """Token keys of every response behind the prompt, and how many of them come before all responses.

        The prompt's own are computed once for all responses behind which the template leaves it as it is.
        """
        *head, (_, opening) = rendered.prefix
        place, backend, prefix = len(head), self.backend if head else self.first, self.encode_items(head)
        opened = prefix + self.ids(opening, backend)
        runs = [items[place][1] for items in rendered.responses if items[:place] == head]
        bodies = iter(backend.encode_batch(runs, add_special_tokens=False))
        sequences, shared = [], len(opened)
        for items in rendered.responses:
            if items[:place] == head:
                sequences.append(prefix + next(bodies).ids + self.encode_items(items[place + 1 :]))
            else:
                sequences.append(self.encode_items(items))
            if not (place < len(items) and items[place][1].startswith(opening)):
                shared = min(shared, common_length(opened, sequences[-1]))
        return sequences, shared

    def cut(self, sequences: list[list[int]], prefix_length: int, closing: list[int]) -> Encoded:
        """Sequences of at most `max_length`; one that is cut ends in `closing`: its end token and what follows it."""
        most = self.max_length
        kept = (keys if len(keys) <= most else keys[: most - len(closing)] + closing for keys in sequences)
        arrays = tuple(np.array(keys, np.int64) for keys in kept)
        return Encoded(arrays, min(prefix_length, most), tuple(len(keys) > most for keys in sequences))

    def without_unread(self, keys: list[int]) -> list[int]:
        """Token keys up to the last that may be read."""
        return keys[: next((end for end in range(len(keys), 0, -1) if keys[end - 1] != self.unread), 0)]

    def encode_items(self, items: list[Item]) -> list[int]:
        """Token keys of items."""
        keys: list[int] = []
        row, backend = 0, self.first
        for kind, value in items:
            if kind == "image":
                count = value * self.tokens_per_tile
                keys.extend(range(-1 - row, -1 - row - count, -1))
                row += count
            else:
                keys.extend(self.ids(value, backend) if kind == "text" else [value])
            backend = self.backend
        return keys

    def ids(self, text: str, backend: Tokenizer) -> list[int]:
        """Token ids of text."""
        return backend.encode(text, add_special_tokens=False).ids if text else []


def image_rows(tiles: np.ndarray, tokens_per_tile: int) -> np.ndarray:
    """The rows of these tiles' tokens, int64 [tiles * tokens_per_tile]."""
    return (tiles[:, None] * tokens_per_tile + np.arange(tokens_per_tile)).reshape(-1)


def place_images(sequence: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A sequence's keys with its own image rows, counted from 0, being these."""
    is_image = sequence < 0
    placed = sequence.copy()
    placed[is_image] = -1 - rows[-1 - sequence[is_image]]
    return placed


def backend_fields(tokenizer: PreTrainedTokenizerBase, image_tokens: tuple[str, ...]) -> dict:
    """The tokenizer's backend as JSON, for runs of text between special tokens, which the image tokens are."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in fields["added_tokens"]:
        token["special"] = token["special"] or token["content"] in image_tokens
    return fields | {"truncation": None, "padding": None}


def without_first_space(fields: dict) -> dict:
    """The same backend for runs that do not begin a text, where it puts a space before the first word of a text."""
    fields = deepcopy(fields)
    pre_tokenizer = fields["pre_tokenizer"] or {}
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return fields


def writes_spaces(fields: dict) -> bool:
    """Whether a `SPACE` typed in a text is a space, as for slow Llama tokenizers with `legacy` off.

    It is the same token everywhere, but special tokens that swallow white space would otherwise leave it.
    """
    steps = (fields["normalizer"] or {}).get("normalizers", ())
    return [(step["type"], step.get("content")) for step in steps] == [("Replace", SPACE)]


def common_length(keys: Sequence[int], others: Sequence[int]) -> int:
    """How many keys two sequences begin with alike."""
    shorter = min(len(keys), len(others))
    return next((place for place in range(shorter) if keys[place] != others[place]), shorter)
