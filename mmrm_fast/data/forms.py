"""The layouts in which preference data is published, read into one: prompt, responses, pairs.

README.md beside this file has a record of each. `completions` are an object of lists or a list of objects, `text` is a
record as JSON, `overall_preference` is below 0 where the first response is preferred, above 0 for the second.

`rejected_images` beside a pair are those that the rejected reply is to, as are images in its own messages. Message
lists of replies may hold the conversation before the reply, `prompt` is not needed then. `system` and `history`
([user, assistant] each) beside any of them are the turns before. `tools` are what the conversation may call.
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmrm_fast.data.fields import Fields, refuse_unread
from mmrm_fast.data.messages import Turns, check_turns, parse_messages, prompt_turns, reply, reply_list
from mmrm_fast.data.types import FieldError, Message, Pairs, Prompt, kind_of, number, some_list, text

CHOSEN_FIELDS = ("chosen", "conversations", "messages")
REJECTED_FIELDS = ("rejected", "rejected_conversations", "rejected_messages", "rejected_response")
COMPLETION = ("annotations", "response")
PROMPT_FIELDS = ("prompt", "question")
PREFERENCE_FIELDS = {*CHOSEN_FIELDS, *REJECTED_FIELDS, "completions", "scores", "overall_preference"}
FORM_FIELDS = {
    *PREFERENCE_FIELDS, *PROMPT_FIELDS, "responses", "margin", "text", "system", "history", "rejected_images", "tools",
}  # fmt: skip
HELPSTEER = ("context", "response1", "response2", "overall_preference")
TRANSLATED = {"instruction", "input", *HELPSTEER[:3]}  # of layouts with names of their own
CONTEXTS = ("conversations", "messages")  # beside `chosen`


@dataclass(frozen=True)
class Form:
    """What the layouts have in common. `images` are those inside the messages, as written."""

    prompt: Prompt
    replies: tuple[Message, ...]
    pairs: Pairs = field(default_factory=Pairs.of)
    ratings: np.ndarray | None = None  # of the responses, float; NaN for one that has none
    images: tuple[object, ...] = ()
    rejected_images: tuple[object, ...] | None = None  # of the rejected reply, where it has others


def translated(fields: Fields) -> Fields:
    """A record whose layout has names of its own, under those that are read; any other as it is."""
    ours = {}
    if "instruction" in fields and not {*PROMPT_FIELDS, *CONTEXTS} & fields.keys():
        parts = [text(fields[name], name) for name in ("instruction", "input") if fields.get(name)]
        ours = {"instruction": None, "input": None, "prompt": "\n".join(parts)}
    if fields.keys() >= set(HELPSTEER):
        prompt, first, second, preference = (fields[name] for name in HELPSTEER)
        scores = [-number(preference), number(preference)]
        ours |= dict.fromkeys(HELPSTEER) | {"prompt": prompt, "responses": [first, second], "scores": scores}
    return Fields(fields | ours, fields.read) if ours else fields


def has_preferences(fields: dict) -> bool:
    """Whether a record, `translated`, says which of its responses are preferred."""
    return bool(PREFERENCE_FIELDS & fields.keys()) or in_text(fields)


def in_text(fields: dict) -> bool:
    """Whether the record is RLHF-V's, all of it in `text`; beside replies a `text` is anything, such as a caption."""
    return "text" in fields and not {*PREFERENCE_FIELDS, "responses"} & fields.keys()


def parse_form(fields: Fields, ignored: Collection[str] = ()) -> Form:
    """Read one record, whichever layout it has; `ignored` names may be dropped. Raises `FieldError`."""
    form = parse_layout(fields, ignored)
    before = turns_before(fields)
    if not before:
        return form
    messages = (Message("user", form.prompt),) if isinstance(form.prompt, str) else form.prompt
    if before[0].role == "system" and messages[0].role == "system":
        raise FieldError("system", "the conversation has a system turn of its own; leave one of them out")
    first = 1 if messages[0].role == "system" else 0
    return replace(form, prompt=(*messages[:first], *before, *messages[first:]))


def parse_layout(fields: Fields, ignored: Collection[str]) -> Form:
    """A record without the turns of its `system` and `history`."""
    if in_text(fields):
        inside = decode_text(fields["text"])
        refuse_unread(inside, FORM_FIELDS, ignored, "text")
        fields = Fields(fields | inside, fields.read)
    name = present(fields, PROMPT_FIELDS)
    prompt = prompt_turns(fields[name], name, ignored) if name in fields else None
    if "completions" in fields:
        return rated_form(require(prompt, name), *parse_completions(fields["completions"], ignored))
    chosen, rejected = present(fields, CHOSEN_FIELDS), present(fields, REJECTED_FIELDS)
    context = next((name for name in CONTEXTS if chosen == "chosen" and name in fields), None)
    if context is not None and not is_repeated(fields, context, chosen, ignored):
        if prompt is not None:
            raise FieldError(context, f"there is a `{name}` beside it; leave one of them out")
        prompt = prompt_turns(fields[context], context, ignored)
        for side in (chosen, rejected):
            if side in fields and reply(fields, side, ignored)[0]:
                why = f"goes on with further turns behind `{context}`; a pair answers one conversation"
                raise FieldError(side, why)
    if "rejected_images" in fields and chosen in fields and rejected not in fields:
        fields = Fields({**fields, rejected: fields[chosen]}, fields.read)
    if chosen in fields or rejected in fields:
        return pairwise_form(fields, prompt, chosen, rejected, ignored)
    if "responses" not in fields:
        raise FieldError("", "needs `chosen` and `rejected`, or `completions`, or `responses`")
    prompt, responses = require(prompt, name), reply_list(fields["responses"], "responses", ignored)
    if (scores := fields.get("scores")) is None:
        return Form(prompt.prompt, responses, images=prompt.images)
    if not isinstance(scores, list) or len(scores) != len(responses):
        raise FieldError("scores", f"expected a list of {len(responses)}, one a response")
    return rated_form(prompt, responses, [*map(number, scores)])


def is_repeated(fields: Fields, context: str, side: str, ignored: Collection[str]) -> bool:
    """Whether `messages` is the whole of `chosen`, as UltraFeedback has it, and not the conversation before it."""
    value, messages = fields.get(side), fields[context]
    if not isinstance(value, list) or not isinstance(messages, list) or len(value) != len(messages):
        return False
    return parse_messages(value, side, ignored) == parse_messages(messages, context, ignored)


def turns_before(fields: dict) -> tuple[Message, ...]:
    """The turns of the columns `system` and `history`."""
    system, history = fields.get("system"), fields.get("history")
    turns = [Message("system", text(system, "system"))] if system else []
    for index, pair in enumerate(some_list(history, "history", of="questions and answers") if history else ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise FieldError(f"history[{index}]", f"expected a question and its answer, got {kind_of(pair)}")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role, text(said, f"history[{index}]")))
    return tuple(turns)


def present(fields: dict, names: Sequence[str]) -> str:
    """The first of the names that the record has; the usual one where it has none."""
    return next((name for name in names if name in fields), names[0])


def decode_text(value: object) -> dict:
    """RLHF-V's `text`: a JSON string, or already an object."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FieldError("text", f"expected a JSON string with question, chosen, rejected ({error})") from None
    if not isinstance(value, dict):
        raise FieldError("text", f"expected an object with question, chosen, rejected, got {kind_of(value)}")
    return value


def require(prompt: Turns | None, name: str) -> Turns:
    """The prompt, which only message lists of replies may hold instead."""
    if prompt is None:
        raise FieldError(name, "missing")
    return prompt


def pairwise_form(fields: dict, prompt: Turns | None, chosen: str, rejected: str, ignored: Collection[str]) -> Form:
    """One preferred and one rejected reply to the same conversation."""
    (better_turns, better), (worse_turns, worse) = (reply(fields, name, ignored) for name in (chosen, rejected))
    if better_turns and worse_turns and better_turns.messages != worse_turns.messages:
        raise FieldError(rejected, f"differs from {chosen} before its last turn; a pair shares one prompt")
    context = better_turns or worse_turns
    if context:
        check_turns(context.messages, chosen)
        check_same_prompt(prompt, context)
    turns = context or require(prompt, "prompt")
    others = worse_turns.images if better_turns and worse_turns and worse_turns.images != turns.images else None
    margin = 0.0 if fields.get("margin") is None else number(fields["margin"])
    if not math.isfinite(margin):
        raise FieldError("margin", f"expected a finite number, got {fields['margin']!r}")
    return Form(turns.prompt, (better, worse), Pairs.of((0, 1, margin)), images=turns.images, rejected_images=others)


def check_same_prompt(prompt: Turns | None, context: Turns) -> None:
    """A prompt that stands both outside and inside of the replies' messages must be the same."""
    if prompt is None:
        return
    if prompt.images and prompt.images != context.images:
        raise FieldError("prompt", "has other images than the replies' messages; leave one of them out")
    if prompt.messages == context.messages:
        return
    users = [message for message in context.messages if message.role == "user"]
    if len(prompt.messages) != 1 or prompt.messages[0] not in (users[0], users[-1]):
        raise FieldError("prompt", "is not the one inside of the replies' messages; leave one of them out")


def rated_form(prompt: Turns, responses: tuple[Message, ...], ratings: list[float]) -> Form:
    """Responses with ratings."""
    return Form(prompt.prompt, responses, ratings=np.array(ratings, float), images=prompt.images)


def parse_completions(completions: object, ignored: Collection[str]) -> tuple[tuple[Message, ...], list[float]]:
    """VLFeedback's `completions`: responses and their mean ratings."""
    if isinstance(completions, list):  # as the public data set stores it: one object a response
        if not all(isinstance(item, dict) for item in completions):
            raise FieldError("completions", "expected objects with `annotations` and `response`")
        for index, item in enumerate(completions):
            refuse_unread(item, COMPLETION, ignored, f"completions[{index}]")
        completions = {key: [item.get(key) for item in completions] for key in COMPLETION}
    elif not isinstance(completions, dict):
        raise FieldError("completions", f"expected an object or a list, got {kind_of(completions)}")
    refuse_unread(completions, COMPLETION, ignored, "completions")
    responses = reply_list(completions.get("response"), "completions.response", ignored)
    annotations = completions.get("annotations")
    if not isinstance(annotations, list) or len(annotations) != len(responses):
        raise FieldError("completions.annotations", f"expected a list of {len(responses)}, one a response")
    return responses, [mean_rating(annotation) for annotation in annotations]


def mean_rating(annotation: object) -> float:
    """Mean `Rating` over the aspects of one annotation, NaN unless every one is a finite number."""
    if not isinstance(annotation, dict) or not annotation:
        return math.nan
    ratings = [number(aspect.get("Rating")) if isinstance(aspect, dict) else math.nan for aspect in annotation.values()]
    return number(sum(ratings) / len(ratings))
