"""A templated conversation read back into its turns, by the served model's own chat template.

Reinforcement learners send the text that a policy read and wrote. It is cut at what the template puts between turns,
and taken only where the template renders the turns found to that very text: another model's template, a prompt that was
cut on its left or a text without any is refused, never read as something else.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mmrm_fast.data.chat import IMAGE, ChatTemplate
from mmrm_fast.data.chat import Turn as ChatTurn
from mmrm_fast.data.prompt import IMAGE as TYPED_IMAGE
from mmrm_fast.data.prompt import SPACE
from mmrm_fast.data.types import FieldError

MARKS = ("\U000f1000", "\U000f1001", "\U000f1002", "\U000f1003")  # what stands for turns while the template renders
EXPANDED = re.compile(r"(?:<img>)?(?:<IMG_CONTEXT>)+(?:</img>)?")
REMEDY = "is not a conversation in this model's chat template; send it as messages in `prompts`, or with its template"

Turn = tuple[str, str]  # (role, text)


class Seams(NamedTuple):
    """What a template puts before the first turn and between turns."""

    start: str
    system_user: str | None  # where the conversation begins with a system turn
    ends: dict[str, str]  # of user's and assistant's turns


class ConversationReader:
    """Reads templated conversations of one checkpoint."""

    def __init__(self, chat: ChatTemplate, tokenizer: PreTrainedTokenizerBase):
        self.chat = chat
        system, user, assistant, again = MARKS
        middle = [("user", user), ("assistant", assistant), ("user", again), ("assistant", system)]
        before, *between, tail = split_marks(self.rendered(middle), (user, assistant, again, system))
        ends = {"user": between[0], "assistant": between[1]}
        self.seams = [Seams(before, None, ends)]
        with suppress(FieldError):  # the template takes no system turn
            begun = self.rendered([("system", system), ("user", user), ("assistant", assistant)])
            start, first, _, _ = split_marks(begun, (system, user, assistant))
            self.seams.append(Seams(start, first, ends))
        closing = {tokenizer.eos_token, tokenizer.pad_token} | {token for token in chat.specials if token in tail}
        self.closing = longest_first(closing)
        opening = map(re.escape, longest_first({tokenizer.bos_token, tokenizer.pad_token}))
        self.leading = re.compile("^(?:" + "|".join([*opening, SPACE]) + ")+")
        self.is_spaced = SPACE in before[: len(tokenizer.bos_token or "") + 1]  # a space that texts have for it

    def read(self, query: str, prompt: str | None = None) -> tuple[list[dict], str]:
        """(prompt as messages, response) of a whole decoded text, or of one that begins with its prompt.

        Padding and begin tokens before it, and end and padding tokens behind it, are dropped; image tokens become one
        `<image>` each. Raises `FieldError`.
        """
        query = self.shortened(query)
        if prompt is not None:
            prompt = self.shortened(prompt)
            if not query.startswith(prompt):
                raise FieldError("query", "does not begin with its prompt of `prompts`")
        for seams in self.seams:
            turns = self.turns(query if prompt is None else prompt, seams, query[len(prompt or query) :])
            if turns and self.says(turns, query):
                *before, (_, response) = turns
                messages = [{"role": role, "content": text.replace(IMAGE, TYPED_IMAGE)} for role, text in before]
                return messages, response.replace(IMAGE, TYPED_IMAGE)
        raise FieldError("query" if prompt is None else "prompts", REMEDY)

    def shortened(self, text: str) -> str:
        """The text with one character an image, from its first turn on."""
        text = self.leading.sub("", text)
        return EXPANDED.sub(IMAGE, text.removeprefix(" ") if self.is_spaced else text)

    def turns(self, text: str, seams: Seams, rest: str) -> list[Turn]:
        """The turns of a text that ends in the assistant's, which goes on with `rest`; none where they are not such."""
        start = self.leading.sub("", seams.start)
        if not text.startswith(start):
            return []
        text, turns = text[len(start) :], []
        if seams.system_user is not None:
            system, _, text = text.partition(seams.system_user)
            turns = [("system", system)]
        role = "user"
        while seams.ends[role] in text:
            turn, _, text = text.partition(seams.ends[role])
            turns.append((role, turn))
            role = "assistant" if role == "user" else "user"
        return [*turns, (role, without_end(text + rest, self.closing))] if role == "assistant" else []

    def says(self, turns: Sequence[Turn], query: str) -> bool:
        """Whether the template renders the turns to the query, but for what may follow the response."""
        try:
            rendered = self.leading.sub("", self.rendered(turns))
        except FieldError:
            return False
        return without_end(rendered, self.closing) == without_end(query, self.closing)

    def rendered(self, turns: Sequence[Turn]) -> str:
        """A conversation as the template has it."""
        return self.chat.text([ChatTurn(role, [text]) for role, text in turns])


def split_marks(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and after the marks."""
    parts = []
    for mark in marks:
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


def longest_first(tokens: set[str | None]) -> list[str]:
    """The tokens that there are, so that none hides a longer one that it is part of."""
    return sorted(filter(None, tokens), key=len, reverse=True)


def without_end(text: str, tokens: Sequence[str]) -> str:
    """The text without the tokens that it ends in, each with the whitespace after it."""
    end = len(text)
    while True:
        at = end
        while at and text[at - 1].isspace():
            at -= 1
        token = next((token for token in tokens if text.endswith(token, 0, at)), None)
        if token is None:
            return text[:end]
        end = at - len(token)
