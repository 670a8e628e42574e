"""Messages as the layouts have them: turns with their pictures, and what else a chat template may know of them.

A message is `{role, content}` or `{from, value}`. Content is a string, or parts of type `text`, `image`, `image_url`,
where an image part stands for `<image>` and a newline, as InternVL's own templates write it; its picture is its
`image`, `url`, `path` or `base64`, or the record's. A message may have `tool_calls`, `reasoning_content`, `name` and
`tool_call_id`; a chat template that drops what they say is an error where it renders them.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmrm_fast.data.fields import is_empty, refuse_unread
from mmrm_fast.data.types import FieldError, Message, Prompt, kind_of, some_list, text

PICTURE_KEYS = ("image", "image_url", "url", "path", "base64")
MESSAGE_EXTRAS = ("tool_calls", "reasoning_content", "name", "tool_call_id")  # of messages, for the chat template
MAX_LEVELS = 100  # of calls and tools
HARMLESS_KEYS = {"detail", "cache_control"}  # of parts
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "tool": "tool",
}  # fmt: skip
IMAGE_PART = "<image>\n"


@dataclass(frozen=True)
class Turns:
    """Messages and the images inside them, as written."""

    messages: tuple[Message, ...]
    images: tuple[object, ...] = ()

    @property
    def prompt(self) -> Prompt:
        """A lone user turn as its text, anything else as messages."""
        first = self.messages[0]
        return first.content if self.messages == (Message("user", first.content),) else self.messages


def reply(fields: dict, name: str, ignored: Collection[str]) -> tuple[Turns | None, Message]:
    """A reply and, where its message list holds it, the conversation before it."""
    if name not in fields:
        raise FieldError(name, "missing")
    value = fields[name]
    if not isinstance(value, (list, dict)):
        return None, Message("assistant", text(value, name))
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        raise FieldError(name, "expected a string or a list of messages, got a list of strings")
    turns = parse_messages(value, name, ignored)
    *context, last = turns.messages
    if last.role != "assistant":
        raise FieldError(name, f"must end with the assistant's message, ends with the {last.role}'s")
    return (Turns(tuple(context), turns.images) if context else None), last


def reply_list(values: object, name: str, ignored: Collection[str]) -> tuple[Message, ...]:
    """A required, non-empty list of replies, each a string or the assistant's message."""
    replies = []
    for index, value in enumerate(some_list(values, name, of="strings")):
        own = f"{name}[{index}]"
        context, said = reply({own: value}, own, ignored)
        if context:
            raise FieldError(own, "expected the assistant's message alone; the conversation goes into `prompt`")
        replies.append(said)
    return tuple(replies)


def prompt_turns(value: object, name: str, ignored: Collection[str]) -> Turns:
    """A prompt: a string is one user turn."""
    if not isinstance(value, (list, dict)):
        return Turns((Message("user", text(value, name)),))
    turns = parse_messages(value, name, ignored)
    check_turns(turns.messages, name)
    return turns


def check_turns(messages: Sequence[Message], name: str) -> None:
    """A prompt ends with the user's turn or a tool's, and the system's message, if any, comes first."""
    if messages[-1].role not in ("user", "tool"):
        raise FieldError(name, f"the turn before the reply must be the user's, is the {messages[-1].role}'s")
    if any(message.role == "system" for message in messages[1:]):
        raise FieldError(name, "only the first message may be the system's")


def parse_messages(value: list | dict, name: str, ignored: Collection[str]) -> Turns:
    """A message list, or one message."""
    images: list[object] = []
    if isinstance(value, dict):
        return Turns((parse_message(value, name, images, ignored),), tuple(images))
    items = enumerate(some_list(value, name, of="messages"))
    messages = [parse_message(item, f"{name}[{index}]", images, ignored) for index, item in items]
    return Turns(tuple(messages), tuple(images))


def parse_message(item: object, name: str, images: list[object], ignored: Collection[str]) -> Message:
    """One message; images inside its parts are appended to `images`."""
    if not isinstance(item, dict):
        raise FieldError(name, f"expected a message with role and content, got {kind_of(item)}")
    role_field, content_field = ("role", "content") if item.get("role") is not None else ("from", "value")
    given = item.get(role_field)
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise FieldError(f"{name}.{role_field}", "expected system, user, assistant or tool")
    refuse_unread(item, (role_field, content_field, *MESSAGE_EXTRAS), ignored, name)
    extra = {key: item[key] for key in MESSAGE_EXTRAS if item.get(key) is not None and key not in ignored}
    for key, value in extra.items():
        parse = parse_objects if key == "tool_calls" else text
        extra[key] = parse(value, f"{name}.{key}")
    content = item.get(content_field)
    if content is None and role == "assistant" and extra:
        extra, content = extra | {"content": None}, ""
    said = as_json(extra, name) if extra else ""
    name = f"{name}.{content_field}"
    if isinstance(content, list):
        parts = (parse_part(part, role, f"{name}[{index}]", images, ignored) for index, part in enumerate(content))
        content = "".join(parts)
    return Message(role, text(content, name), said)


def parse_objects(value: object, name: str) -> list[dict]:
    """A list of objects, or the JSON of one or of each, as Arrow's tables need it."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        items = [json.loads(item) if isinstance(item, str) else item for item in value or ()]
    except (ValueError, TypeError, RecursionError):
        items = [value]
    if not all(isinstance(item, dict) for item in items):
        raise FieldError(name, f"expected a list of objects or its JSON, got {kind_of(value)}")
    return items


def as_json(value: object, name: str) -> str:
    """A value as JSON text, its keys in their order. Raises `FieldError` for what JSON does not hold or is too deep."""
    refuse_deep(value, name)
    try:
        return text(json.dumps(value, ensure_ascii=False), name)
    except (TypeError, ValueError, RecursionError) as error:
        raise FieldError(name, f"cannot be written as JSON ({error})") from None


def refuse_deep(value: object, name: str, levels: int = MAX_LEVELS) -> None:
    """Raise `FieldError` for a value that nests so deep that a template could not walk through it."""
    if not levels:
        raise FieldError(name, f"is nested more than {MAX_LEVELS} levels deep")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        refuse_deep(item, name, levels - 1)


def parse_part(part: object, role: str, name: str, images: list[object], ignored: Collection[str]) -> str:
    """One part of a message's content as text."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image", "image_url") or (kind != "text" and role != "user"):
        raise FieldError(name, f"expected a part of type {'text, image or image_url' if role == 'user' else 'text'}")
    said = {key: value for key, value in part.items() if not is_empty(value) and key not in {*HARMLESS_KEYS, *ignored}}
    given = [key for key in PICTURE_KEYS if key in said]
    others = said.keys() - {"type", *(("text",) if kind == "text" else given)}
    if others:
        raise FieldError(f"{name}.{min(others)}", f"is not read in a part of type {kind}")
    if kind == "text":
        return text(part.get("text"), f"{name}.text")
    if len(given) > 1:
        raise FieldError(name, f"has its picture twice, as {' and '.join(given)}; use one of them")
    if kind == "image_url" and not given:
        raise FieldError(f"{name}.image_url", "missing its url")
    images.extend(picture(said[key], key) for key in given)
    return IMAGE_PART


def picture(value: object, key: str) -> object:
    """A part's picture, as one of a record's own field would be written."""
    if key == "image_url" and isinstance(value, dict):
        return value.get("url") or value.get("path")
    return f"data:image/any;base64,{value}" if key == "base64" else value
