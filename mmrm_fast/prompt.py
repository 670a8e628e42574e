"""Prompt, images and responses to token keys, by the checkpoint's own chat template.

A sequence is `template(user: images + prompt, assistant: response)` up to and including the token that ends the
response. Text of the user is always literal: a `<|im_end|>` typed in a prompt is six ordinary tokens. Image
placeholder tokens become negative keys, -1 - row, `row` counting the image tokens of the record.
"""

import json
import re
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
PROMPT_SLOT, RESPONSE_SLOT = "MMRMPROMPTSLOT", "MMRMRESPONSESLOT"


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
    truncated: tuple[bool, ...]  # responses cut to `max_length`, their end token kept


def split_images(prompt: str, num_images: int) -> list[str]:
    """The prompt's text around its image slots: `num_images + 1` pieces.

    `<image>` is a slot if it occurs once an image; a prompt without any gets its slots prepended, each on a line.

    Raises:
        PromptError: any other number of `<image>`.
    """
    pieces = prompt.split(IMAGE)
    if len(pieces) == num_images + 1:
        return pieces
    if len(pieces) > 1:
        raise PromptError("prompt", f"has {len(pieces) - 1} {IMAGE} for {num_images} images; use one each, or none")
    return [""] + ["\n"] * (num_images - 1) + ["\n" + prompt]


def without_images(prompt: str, num_images: int) -> str:
    """The text-only proxy's prompt: no placeholder, and no newline after it."""
    first, *rest = split_images(prompt, num_images)
    return first + "".join(piece.removeprefix("\n") for piece in rest)


class PromptEncoder:
    """Encodes records with one tokenizer, chat template and image layout.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        tokens_per_tile: image tokens of a tile (256 for 448-pixel InternVL tiles).
        max_length: tokens of prefix plus one response; the prefix is never cut.
        image_tokens: the tokens that open an image, stand for it and close it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens_per_tile: int,
        max_length: int,
        image_tokens: tuple[str, str, str] = ("<img>", "<IMG_CONTEXT>", "</img>"),
    ):
        self.tokens_per_tile, self.max_length = tokens_per_tile, max_length
        self.literal = literal_tokenizer(tokenizer, image_tokens)
        start, _, end = (self.literal.token_to_id(token) for token in image_tokens)
        if start is None or end is None:
            raise ValueError(f"the tokenizer lacks the image tokens {image_tokens}")
        self.image_start, self.image_end = start, end
        head, middle, tail = template_parts(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.swallows_right = {id for id, token in added.items() if token.special and token.rstrip}
        self.swallows_left = {id for id, token in added.items() if token.special and token.lstrip}
        specials = {token.content: id for id, token in added.items() if token.special}
        self.head = split_specials(head, specials)
        self.middle = split_specials(middle, specials)
        self.tail = up_to_end_token(split_specials(tail, specials))

    def encode(self, prompt: str, responses: tuple[str, ...], tiles_per_image: tuple[int, ...] = ()) -> Encoded:
        """Encode one prompt, its images (`tiles_per_image` in slot order) and all its responses.

        Raises:
            PromptError: the prefix alone does not fit, or `<image>` does not match the images.
        """
        return self.encode_pieces(split_images(prompt, len(tiles_per_image)), responses, tiles_per_image)

    def encode_text_only(self, prompt: str, responses: tuple[str, ...], num_images: int) -> Encoded:
        """Encode as the text-only proxy sees it: without the images. Raises as `encode`."""
        return self.encode_pieces([without_images(prompt, num_images)], responses, ())

    def encode_pieces(self, pieces: list[str], responses: tuple[str, ...], tiles_per_image: tuple[int, ...]) -> Encoded:
        """Encode a prompt given as the text around its image slots."""
        *whole, (_, opening) = self.runs(pieces, tiles_per_image)
        prefix = self.encode_items(whole)
        before, after = whole[-1][1] if whole else None, self.tail[-1]
        prefix_length = len(prefix) + len(self.ids(self.swallow(opening, before, None)))
        tail_text, *tail = self.tail if isinstance(self.tail[0], str) else ["", *self.tail]
        room = self.max_length - len(prefix) - len(tail)
        if prefix_length + len(tail) >= self.max_length:
            raise PromptError("prompt", f"is {prefix_length} tokens with its images; --max-length is {self.max_length}")
        texts = [self.swallow(opening + text + tail_text, before, after) for text in responses]
        bodies = self.literal.encode_batch(texts, add_special_tokens=False)
        sequences = [np.array(prefix + body.ids[:room] + tail, np.int64) for body in bodies]
        return Encoded(tuple(sequences), prefix_length, tuple(len(body.ids) > room for body in bodies))

    def runs(self, pieces: list[str], tiles_per_image: tuple[int, ...]) -> list[tuple[str, object]]:
        """Everything before the response as ("text", run), ("id", token) and ("image", tiles) items.

        Text that meets no special token is one run, so that it is tokenised as in the rendered template; the last
        item is the run that the response continues.
        """
        items: list[tuple[str, object]] = [("text", "")]

        def add(part: str | int) -> None:
            if isinstance(part, int):
                items.extend([("id", part), ("text", "")])
            else:
                items[-1] = ("text", items[-1][1] + part)

        first, *pieces = pieces
        for part in (*self.head, first):
            add(part)
        for tiles, piece in zip(tiles_per_image, pieces, strict=True):
            items.extend([("id", self.image_start), ("image", tiles), ("id", self.image_end), ("text", piece)])
        for part in self.middle:
            add(part)
        return items

    def encode_items(self, items: list[tuple[str, object]]) -> list[int]:
        """Token keys of `runs`' items."""
        keys: list[int] = []
        row = 0
        neighbours = [None, *(value if kind == "id" else None for kind, value in items), None]
        for (kind, value), before, after in zip(items, neighbours, neighbours[2:], strict=False):
            if kind == "image":
                count = value * self.tokens_per_tile
                keys.extend(range(-1 - row, -1 - row - count, -1))
                row += count
            else:
                keys.extend(self.ids(self.swallow(value, before, after)) if kind == "text" else [value])
        return keys

    def swallow(self, text: str, before: int | None, after: int | None) -> str:
        """A run of text without the white space that the special tokens around it swallow (Phi-3's do)."""
        text = text.lstrip() if before in self.swallows_right else text
        return text.rstrip() if after in self.swallows_left else text

    def ids(self, text: str) -> list[int]:
        """Token ids of literal text."""
        return self.literal.encode(text, add_special_tokens=False).ids if text else []


def literal_tokenizer(tokenizer: PreTrainedTokenizerBase, image_tokens: tuple[str, ...]) -> Tokenizer:
    """A copy of the tokenizer's backend that reads special and image tokens in text as ordinary text."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in fields["added_tokens"]:
        token["special"] = token["special"] or token["content"] in image_tokens
    fields["truncation"] = fields["padding"] = None
    literal = Tokenizer.from_str(json.dumps(fields))
    literal.encode_special_tokens = True
    return literal


def template_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The chat template's text before the prompt, between prompt and response, and after the response."""
    messages = [{"role": "user", "content": PROMPT_SLOT}, {"role": "assistant", "content": RESPONSE_SLOT}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    head, found, rest = rendered.partition(PROMPT_SLOT)
    middle, found_response, tail = rest.partition(RESPONSE_SLOT)
    if not (found and found_response):
        raise ValueError("the chat template does not render the user's and the assistant's text as given")
    return head, middle, tail


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
