"""Conversations rendered by a checkpoint's own chat template, as items: runs of text, special tokens, images.

The template sees every text as it is, since templates of reasoning models look at what they render. Only what would be
taken for the template's own is hidden from it: special tokens typed in a text, and the places of the images, each one
character of a private plane while it renders.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mmrm_fast.data.time_limit import Overtime, TimeLimit
from mmrm_fast.data.types import FieldError, Message

IMAGE, SLOT = "\U000f0000", "\U000f0001"  # where an image stands, and what stands for a response
PRIVATE, FIRST_HIDDEN, MAX_HIDDEN = "[\U000f0000-\U000ffffd]", 0xF0002, 0xFFF0

RENDERING = TimeLimit(10.0)  # of one conversation, which takes half a millisecond
MAX_CHARS = 1 << 26
SHOWN = ("tool_calls", "reasoning_content")  # of a message, which a template must not drop


class Turn(NamedTuple):
    """One message as a template takes it."""

    role: str
    pieces: list[str]  # the text around its image slots
    extra: Mapping = MappingProxyType({})  # its other fields

    @classmethod
    def of(cls, message: Message | str) -> "Turn":
        """A message, or a response as its text."""
        if isinstance(message, str):
            return cls("assistant", [message])
        return cls(message.role, [message.content], json.loads(message.extra) if message.extra else {})

    def as_json(self) -> dict:
        """The message that the template sees, image slots as `IMAGE`."""
        return {"role": self.role, "content": IMAGE.join(self.pieces), **self.extra}

    def replaced(self, old: str, new: str) -> "Turn":
        """The same with another text for one."""
        return self._replace(pieces=[piece.replace(old, new) for piece in self.pieces])

    def without(self, name: str) -> "Turn":
        """The same without one of its other fields."""
        return self._replace(extra={key: value for key, value in self.extra.items() if key != name})


Turns = list[Turn]
Item = tuple[str, str | int]  # ("text", run), ("id", token) or ("image", tiles)


@dataclass
class Hidden:
    """Texts hidden behind private characters while a template renders them."""

    pattern: re.Pattern
    texts: list[str] = field(default_factory=list)

    def hide(self, value: Any) -> Any:
        """A value of JSON, in its texts each special token and each private character behind one character."""
        if isinstance(value, str):
            return self.pattern.sub(self.stand_in, value)
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return value

    def turns(self, turns: Sequence[Turn]) -> Turns:
        """Turns with all of their texts so."""
        return [Turn(*self.hide(turn)) for turn in turns]

    def stand_in(self, match: re.Match) -> str:
        """The character that stands for what was matched."""
        if match[0] not in self.texts:
            self.texts.append(match[0])
        index = self.texts.index(match[0])
        if index >= MAX_HIDDEN:
            raise FieldError("prompt", f"has more than {MAX_HIDDEN} different characters of a private plane")
        return chr(FIRST_HIDDEN + index)

    def show(self, text: str) -> str:
        """The text as it was."""
        return re.sub(PRIVATE, lambda match: self.texts[ord(match[0]) - FIRST_HIDDEN], text)


@dataclass(frozen=True)
class Rendered:
    """One prompt rendered with its responses; items up to and including the token that is read."""

    prefix: list[Item]  # what stands before the response; its last item is a run of text that the response goes on with
    closing: list[Item]  # what ends every response: its end token and, where that is read, what is behind it
    responses: tuple[list[Item], ...]  # the whole of each


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        hidden: tokens that are ordinary text where a text has them: all special ones and those of images.
        marks: the tokens that open and close an image, where there can be any.
        whole: render responses to the end of the template instead of to their end token.

    Raises:
        ValueError: the template drops a text, or puts no special token after a response.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, hidden: Sequence[str], marks: Sequence[int], *, whole: bool = False
    ):
        self.tokenizer, self.marks, self.whole = tokenizer, marks, whole
        added = tokenizer.added_tokens_decoder
        self.specials = {token.content: id for id, token in added.items() if token.special}
        self.swallows_right = {id for id in self.specials.values() if added[id].rstrip}  # white space, as Phi-3's do
        self.swallows_left = {id for id in self.specials.values() if added[id].lstrip}
        self.pattern = re.compile("|".join([*escaped(hidden), PRIVATE]))
        self.splitter = re.compile("(" + "|".join([*escaped(self.specials), IMAGE]) + ")")
        probe = self.text([Turn("user", ["?" + IMAGE]), Turn("assistant", [SLOT])])
        if IMAGE not in probe or SLOT not in probe:
            raise ValueError("the chat template does not render the text of user, assistant as given")
        behind = probe.partition(SLOT)[2]
        end = tokenizer.convert_ids_to_tokens(end_of(self.items(behind, Hidden(self.pattern))))
        self.ending = end, behind.partition(end)[2]  # the token that ends a response, and what is behind it

    def render(
        self, turns: Turns, responses: Sequence[Turn], tiles_per_image: tuple[int, ...], tools: Sequence[dict] = ()
    ) -> Rendered:
        """A prompt with each of its responses. Raises `FieldError` where the template does not take or drops them."""
        hidden = Hidden(self.pattern)
        turns, answers, tools = hidden.turns(turns), hidden.turns(responses), hidden.hide(tools)
        slot, *texts = (self.text([*turns, answer], tools) for answer in (Turn("assistant", [SLOT]), *answers))
        self.refuse_dropped(turns, answers, tools, slot)
        before, found, after = slot.rpartition(SLOT)
        if not found:
            raise FieldError("prompt", "the chat template drops the response of such a conversation")
        prefix, tail = self.items(before, hidden, tiles_per_image), self.items(after, hidden)
        closing = [("id", end_of(tail)), *(tail[2:] if self.whole else ())]
        answered = [self.answered(text, hidden, prefix, tail, tiles_per_image) for text in texts]
        return Rendered(prefix, closing, tuple(answered))

    def answered(self, text: str, hidden: Hidden, prefix, tail, tiles_per_image: tuple[int, ...]) -> list[Item]:
        """The items of a rendered prompt and response up to what is read, `tail` being all behind the response."""
        items = self.items(text, hidden, tiles_per_image)
        end = len(items) - len(tail) + 1
        if items[end:] != tail[1:]:
            raise FieldError("response", "the chat template ends it otherwise than other responses")
        if end < len(prefix):
            raise FieldError("response", "the chat template drops it")
        return items if self.whole else items[: end + 1]

    def refuse_dropped(self, turns: Turns, answers: Sequence[Turn], tools: Sequence[dict], slot: str) -> None:
        """Raise `FieldError` for tools, a tool's turn, calls or reasoning without which the template renders the same.

        Reasoning of an earlier turn may be dropped by a template that shows that of the response.
        """
        answer = Turn("assistant", [SLOT])
        if tools and self.text([*turns, answer]) == slot:
            raise FieldError("tools", "the chat template drops them")
        for place, turn in enumerate(turns):
            said = lambda other: self.text([*turns[:place], other, *turns[place + 1 :], answer], tools)  # noqa: B023, E731
            if turn.role == "tool" and turn.pieces != [""] and said(turn._replace(pieces=[""])) == slot:
                raise FieldError(f"prompt[{place}]", "the chat template drops a tool's turn")
            for name in filter(turn.extra.get, SHOWN):
                if said(turn.without(name)) == slot and not (name == "reasoning_content" and self.shows_reasoning()):
                    raise FieldError(f"prompt[{place}].{name}", "the chat template drops it")
        for answer in answers:
            for name in filter(answer.extra.get, SHOWN):
                if self.text([*turns, answer], tools) == self.text([*turns, answer.without(name)], tools):
                    raise FieldError(f"response.{name}", "the chat template drops it")

    def shows_reasoning(self) -> bool:
        """Whether the template shows the reasoning of a response."""
        question, answer = Turn("user", ["?"]), Turn("assistant", [SLOT], {"reasoning_content": "!"})
        return self.text([question, answer]) != self.text([question, answer.without("reasoning_content")])

    def unanswered(self, turns: Turns, tiles_per_image: tuple[int, ...], tools: Sequence[dict] = ()) -> list[Item]:
        """A prompt up to where generation would begin."""
        hidden = Hidden(self.pattern)
        text = self.text(hidden.turns(turns), hidden.hide(tools), add_generation_prompt=True)
        return self.items(text, hidden, tiles_per_image)

    def text(self, turns: Turns, tools: Sequence[dict] = (), **options) -> str:
        """A conversation as the template renders it, image slots as `IMAGE`."""
        messages = [turn.as_json() for turn in turns]
        try:
            return rendered(self.tokenizer, messages, tools=tools or None, **options)
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in turns[:-1])
            raise FieldError("prompt", f"the chat template does not take the turns {roles}: {error}") from None

    def items(self, text: str, hidden: Hidden, tiles_per_image: tuple[int, ...] = ()) -> list[Item]:
        """Rendered text as items, a run of text (it may be empty) before, between and after all others.

        Runs are without the white space that special tokens swallow. Raises `FieldError` unless every image is rendered
        once.
        """
        if (found := text.count(IMAGE)) != len(tiles_per_image):
            raise FieldError("prompt", f"the chat template renders {found} of its {len(tiles_per_image)} images")
        items, tiles = [], iter(tiles_per_image)
        for place, part in enumerate(self.splitter.split(text)):
            if place % 2 == 0:
                said = hidden.show(part)
                items.append(("text", said.lstrip() if items and items[-1][1] in self.swallows_right else said))
                continue
            new = [("id", id) for id in (self.marks if part == IMAGE else (self.specials[part],))]
            if new[0][1] in self.swallows_left:
                items[-1] = ("text", items[-1][1].rstrip())
            if part == IMAGE:
                new.insert(1, ("image", next(tiles)))
            items += new
        return items


def end_of(tail: list[Item]) -> int:
    """The special token that ends a response, of the items behind it. Raises `ValueError` where there is none."""
    if len(tail) < 2:
        raise ValueError("the chat template puts no special token after the response; a reward needs an end token")
    return tail[1][1]


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], **options: Any) -> str:
    """Messages as a chat template renders them. Raises `TemplateError`, whatever it does, and within a time limit."""
    try:
        text = RENDERING(tokenizer.apply_chat_template, messages, tokenize=False, **options)
    except TemplateError:
        raise
    except Overtime:
        raise TemplateError(f"it took over {RENDERING.seconds:g} seconds") from None
    except Exception as error:  # it is a program: division by zero, endless recursion, more memory than there is
        raise TemplateError(f"{type(error).__name__}: {error}") from None
    if len(text) > MAX_CHARS:
        raise TemplateError(f"it renders {len(text)} characters, more than {MAX_CHARS}")
    return text


def escaped(tokens: Sequence[str]) -> list[str]:
    """Tokens as regular expressions, the longest first."""
    return [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]
