"""Prompt, images and responses to token keys, by the checkpoint's own chat template.

A sequence is `template(system, user: images + prompt, assistant: response)` up to and including the token that ends the
response; a conversation has more turns before the response. A system message replaces the template's own. Image
placeholder tokens become negative keys, -1 - row, `row` counting the image tokens of the record.

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
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mmrm_fast.data.images import Compat
from mmrm_fast.data.records import Message, Prompt

IMAGE = "<image>"
SPACE = "\u2581"  # what sentencepiece writes for a space
SLOT, MARGIN = "MMRM{}SLOT", " "


class PromptError(ValueError):
    """A record whose text cannot be encoded; `field` is the record's field at fault."""

    def __init__(self, field: str, reason: str):
        super().__init__(reason)
        self.field = field


@dataclass(frozen=True)
class Encoded:
    """One prompt with its responses as token keys (text ids >= 0, image rows -1 - row)."""

    sequences: tuple[np.ndarray, ...]  # int64, prefix and one response each
    prefix_length: int  # tokens before the responses
    truncated: tuple[bool, ...]  # responses cut to `max_length`


Turns = list[tuple[str, list[str]]]  # (role, the text around its image slots) of each message


def split_images(prompt: Prompt, num_images: int, compat: Compat = None) -> Turns:
    """The prompt's turns, each with the text around its image slots.

    `<image>` in users' turns is a slot if it occurs once an image; where there is none, slots are prepended to the
    first user's turn, each on a line (with `compat`, always).

    Raises:
        PromptError: any other number of `<image>`.
    """
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    turns = [(message.role, [message.content]) for message in messages]
    if not compat:
        split = [(role, pieces[0].split(IMAGE) if role == "user" else pieces) for role, pieces in turns]
        found = sum(len(pieces) - 1 for _, pieces in split)
        if found == num_images:
            return split
        if found:
            raise PromptError("prompt", f"has {found} {IMAGE} for {num_images} images; use one each, or none")
    if num_images:
        first = [role for role, _ in turns].index("user")
        turns[first] = ("user", [""] + ["\n"] * (num_images - 1) + ["\n" + turns[first][1][0]])
    return turns


def without_images(turns: Turns) -> Turns:
    """What the text-only proxy sees: no placeholder, and no newline after it."""
    return [(role, [first + "".join(piece.removeprefix("\n") for piece in rest)]) for role, (first, *rest) in turns]


def strip_ends(pieces: list[str]) -> list[str]:
    """The text around image slots, stripped where there is no slot beside the white space."""
    if len(pieces) == 1:
        return [pieces[0].strip()]
    return [pieces[0].lstrip(), *pieces[1:-1], pieces[-1].rstrip()]


@dataclass(frozen=True)
class Template:
    """A conversation rendered around its messages' contents, as text (str) and special token ids (int)."""

    before: tuple[list[str | int], ...]  # before each message of the prompt
    middle: list[str | int]  # between prompt and response
    tail: list[str | int]  # what ends the response
    trims: tuple[bool, ...]  # whether the white space around each message, and around the response, is dropped


class PromptEncoder:
    """Encodes records with one tokenizer, chat template and image layout.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        tokens_per_tile: image tokens of a tile (256 for 448-pixel InternVL tiles).
        max_length: tokens of prefix plus one response; the prefix is never cut.
        image_tokens: the tokens that open an image, stand for it and close it.
        compat: `reference` takes over the habits of the reference implementation (table above).
        rope_regime: which RoPE frequencies a sequence of so many tokens has (`rope.RopeRegime`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens_per_tile: int,
        max_length: int,
        image_tokens: tuple[str, str, str] = ("<img>", "<IMG_CONTEXT>", "</img>"),
        compat: Compat = None,
        rope_regime: Callable[[int], int] | None = None,
    ):
        self.tokenizer, self.tokens_per_tile, self.max_length = tokenizer, tokens_per_tile, max_length
        self.compat, self.rope_regime = compat, rope_regime
        fields = text_fields(tokenizer, image_tokens)
        spaceless = without_first_space(fields)
        self.first = self.backend = text_backend(fields, literal=compat is None)
        if spaceless != fields:
            self.backend = text_backend(spaceless, literal=compat is None)
        self.writes_spaces = writes_spaces(fields)
        start, _, end = (self.backend.token_to_id(token) for token in image_tokens)
        if start is None or end is None:
            raise ValueError(f"the tokenizer lacks the image tokens {image_tokens}")
        self.image_start, self.image_end = start, end
        added = tokenizer.added_tokens_decoder
        self.swallows_right = {id for id, token in added.items() if token.special and token.rstrip}
        self.swallows_left = {id for id, token in added.items() if token.special and token.lstrip}
        self.specials = {token.content: id for id, token in added.items() if token.special}
        self.single_turn = self.template(("user",))

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        for backend in (self.backend, self.first):
            backend.encode_special_tokens = self.compat is None  # tokenizers does not pickle it

    def encode(self, prompt: Prompt, responses: tuple[str, ...], tiles_per_image: tuple[int, ...] = ()) -> Encoded:
        """Encode one prompt, its images (`tiles_per_image` in slot order) and all its responses.

        Raises:
            PromptError: the prefix alone does not fit, `<image>` does not match the images, or the chat template does
                not take these turns.
        """
        return self.encode_turns(split_images(prompt, len(tiles_per_image), self.compat), responses, tiles_per_image)

    def encode_text_only(self, prompt: Prompt, responses: tuple[str, ...], num_images: int) -> Encoded:
        """Encode as the text-only proxy sees it: without the images. Raises as `encode`."""
        return self.encode_turns(without_images(split_images(prompt, num_images, self.compat)), responses, ())

    def encode_turns(self, turns: Turns, responses: tuple[str, ...], tiles_per_image: tuple[int, ...]) -> Encoded:
        """Encode a prompt given as turns."""
        roles = tuple(role for role, _ in turns)
        if self.writes_spaces:
            turns = [(role, [piece.replace(SPACE, " ") for piece in pieces]) for role, pieces in turns]
            responses = tuple(response.replace(SPACE, " ") for response in responses)
        template = self.single_turn if roles == ("user",) else self.template(roles)
        if template.trims[-1]:
            responses = tuple(response.strip() for response in responses)
        *whole, (_, opening) = self.runs(template, turns, tiles_per_image)
        prefix = self.encode_items(whole)
        before, after = whole[-1][1] if whole else None, template.tail[-1]
        opening_length = len(self.ids(self.swallow(opening, before, None)))
        tail_text, *tail = template.tail if isinstance(template.tail[0], str) else ["", *template.tail]
        texts = [self.swallow(opening + text + tail_text, before, after) for text in responses]
        bodies = [body.ids for body in self.backend.encode_batch(texts, add_special_tokens=False)]
        if self.compat:
            empty = self.unanswered(roles, turns, tiles_per_image) if "" in responses else []
            sequences = [prefix + body + tail if text else empty for text, body in zip(responses, bodies, strict=True)]
            return cut_right(sequences, len(prefix) + opening_length, self.max_length)
        return self.cut_responses(prefix, bodies, tail, len(prefix) + opening_length)

    def cut_responses(self, prefix: list[int], bodies: list[list[int]], tail: list[int], prefix_length: int) -> Encoded:
        """Sequences of at most `max_length`, each with its end token."""
        if prefix_length + len(tail) >= self.max_length:
            raise PromptError("prompt", f"is {prefix_length} tokens with its images; --max-length is {self.max_length}")
        room = self.max_length - len(prefix) - len(tail)
        sequences = [np.array(prefix + body[:room] + tail, np.int64) for body in bodies]
        return Encoded(tuple(sequences), prefix_length, tuple(len(body) > room for body in bodies))

    def unanswered(self, roles: tuple[str, ...], turns: Turns, tiles_per_image: tuple[int, ...]) -> list[int]:
        """The sequence of an empty response in the reference: the prompt up to where generation would begin."""
        template = self.template(roles, answered=False)
        return self.encode_items(self.runs(template, turns, tiles_per_image))

    def template(self, roles: tuple[str, ...], *, answered: bool = True) -> Template:
        """The chat template around a prompt of these turns. Raises `PromptError` where it does not take them."""
        slots = [SLOT.format(index) for index in range(len(roles) + answered)]
        names = (*roles, "assistant") if answered else roles
        messages = [{"role": role, "content": MARGIN + slot + MARGIN} for role, slot in zip(names, slots, strict=True)]
        try:
            rest = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
        except TemplateError as error:
            turns = ", ".join(roles)
            raise PromptError("prompt", f"the chat template does not take the turns {turns}: {error}") from None
        parts, trims = [], []
        for slot in slots:
            trims.append(MARGIN + slot + MARGIN not in rest)
            part, found, rest = rest.partition(slot if trims[-1] else MARGIN + slot + MARGIN)
            if not found:
                raise ValueError(f"the chat template does not render the text of {', '.join(names)} as given")
            parts.append(split_specials(part, self.specials))
        rest = split_specials(rest, self.specials)
        if not answered:
            return Template(tuple(parts), rest, [], tuple(trims))
        *before, middle = parts
        return Template(tuple(before), middle, up_to_end_token(rest), tuple(trims))

    def runs(self, template: Template, turns: Turns, tiles_per_image: tuple[int, ...]) -> list[tuple[str, object]]:
        """Everything before the response as ("text", run), ("id", token) and ("image", tiles) items.

        Text that meets no special token is one run, so that it is tokenised as in the rendered template; the last
        item is the run that the response continues.
        """
        items: list[tuple[str, object]] = [("text", "")]
        tiles = iter(tiles_per_image)

        def add(part: str | int) -> None:
            if isinstance(part, int):
                items.extend([("id", part), ("text", "")])
            else:
                items[-1] = ("text", items[-1][1] + part)

        for before, trims, (_, pieces) in zip(template.before, template.trims, turns, strict=False):
            first, *rest = strip_ends(pieces) if trims else pieces
            for part in (*before, first):
                add(part)
            for piece in rest:
                image = ("image", next(tiles))
                items.extend([("id", self.image_start), image, ("id", self.image_end), ("text", piece)])
        for part in template.middle:
            add(part)
        return items

    def encode_items(self, items: list[tuple[str, object]]) -> list[int]:
        """Token keys of `runs`' items."""
        keys: list[int] = []
        row, backend = 0, self.first
        neighbours = [None, *(value if kind == "id" else None for kind, value in items), None]
        for (kind, value), before, after in zip(items, neighbours, neighbours[2:], strict=False):
            if kind == "image":
                count = value * self.tokens_per_tile
                keys.extend(range(-1 - row, -1 - row - count, -1))
                row += count
            else:
                keys.extend(self.ids(self.swallow(value, before, after), backend) if kind == "text" else [value])
            backend = self.backend
        return keys

    def swallow(self, text: str, before: int | None, after: int | None) -> str:
        """A run of text without the white space that the special tokens around it swallow (Phi-3's do)."""
        text = text.lstrip() if before in self.swallows_right else text
        return text.rstrip() if after in self.swallows_left else text

    def ids(self, text: str, backend: Tokenizer | None = None) -> list[int]:
        """Token ids of text."""
        return (backend or self.backend).encode(text, add_special_tokens=False).ids if text else []


def cut_right(sequences: list[list[int]], prefix_length: int, max_length: int) -> Encoded:
    """Sequences cut after `max_length` tokens, whatever stands there."""
    cut = tuple(np.array(sequence[:max_length], np.int64) for sequence in sequences)
    return Encoded(cut, min(prefix_length, max_length), tuple(len(sequence) > max_length for sequence in sequences))


def text_fields(tokenizer: PreTrainedTokenizerBase, image_tokens: tuple[str, ...]) -> dict:
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


def text_backend(fields: dict, *, literal: bool) -> Tokenizer:
    """A backend from its JSON; `literal` reads special and image tokens in text as ordinary text."""
    backend = Tokenizer.from_str(json.dumps(fields))
    backend.encode_special_tokens = literal
    return backend


def split_specials(text: str, specials: dict[str, int]) -> list[str | int]:
    """Template text as ordinary text (str) and special token ids (int), in order, without empty text."""
    if not specials:
        return [text] if text else []
    longest_first = sorted(specials, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    return [specials.get(part, part) for part in parts if part]


def up_to_end_token(tail: list[str | int]) -> list[str | int]:
    """What ends a response: the template's tail up to its first special token."""
    for index, part in enumerate(tail):
        if isinstance(part, int):
            return tail[: index + 1]
    raise ValueError("the chat template puts no special token after the response; a reward needs an end token")
