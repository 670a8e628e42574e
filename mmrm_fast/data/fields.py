"""Which fields of records, messages and parts are read, and which of the others may pass.

A field that nobody reads may pass if it is about a record: an id, a source, ratings of another kind. One that would
change what the record says is refused by its name: `MEANING`, or by its value a picture or a conversation.
"""

import re
from collections.abc import Collection, Mapping

from mmrm_fast.data.types import FieldError

MEANING = {
    "video", "videos", "audio", "audios", "input", "instruction", "tools", "rejected_tools", "functions",
    "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "system_prompt",
    "custom_system_prompt", "images", "url", "path", "base64", "image_url",
}  # fmt: skip
CONVERSATION_KEYS = ({"role", "content"}, {"from", "value"})
PICTURE_NAME = re.compile(r"image|img|picture|photo|pixel|video|audio", re.IGNORECASE)
MEDIA_FILE = re.compile(
    r"(?i)\.(png|jpe?g|jfif|webp|gif|bmp|tiff?|avif|heic|jp2|ppm|svg|mp4|webm|avi|mov|mkv|wav|mp3|flac)$"
)
SNIFFED = 300  # characters of a value that are looked at


def refuse_unread(fields: Mapping, read: Collection[str], ignored: Collection[str], where: str = "") -> None:
    """Raise `FieldError` for a field that is not read and would change what a record, a message or a part says.

    `ignored` names may be dropped; `where` is what stands before the field's name, such as "messages[0]".
    """
    for name, value in fields.items():
        if name in read or name in ignored or is_empty(value) or not says_something(str(name), value):
            continue
        remedy = f"write it in a layout that is read, or drop it with --ignore-fields {name}"
        why = f"is not read here and may change what the record says; {remedy}"
        raise FieldError(f"{where}.{name}" if where else str(name), why)


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, empty text, an empty list or object, or an object of nothing else."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, (str, bytes, list, tuple)) and not len(value))


def says_something(name: str, value: object) -> bool:
    """Whether a field nobody reads may change what is said, by its name or its value."""
    return name in MEANING or is_media(name, value) or is_conversation(value)


def may_say_something(name: str) -> bool:
    """Whether a column may hold what `says_something` finds, by its name alone."""
    return name in MEANING or bool(PICTURE_NAME.search(name))


def is_media(name: str, value: object) -> bool:
    """A picture, a film or a sound, or a list of them: encoded, or the name of a file under a name that says so."""
    if isinstance(value, (list, tuple)):
        return any(is_media(name, item) for item in value)
    if isinstance(value, dict):
        return any(is_media(name, value[key]) for key in ("bytes", "path", "url") if not is_empty(value.get(key)))
    if isinstance(value, bytes):
        return True
    if not isinstance(value, str):
        return False
    if value[:11].lower().startswith(("data:image/", "data:video/", "data:audio/")):
        return True
    return bool(PICTURE_NAME.search(name) and MEDIA_FILE.search(value[-SNIFFED:].partition("?")[0]))


def is_conversation(value: object) -> bool:
    """A list of messages."""
    items = value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(item, dict) and any(keys <= item.keys() for keys in CONVERSATION_KEYS) for item in items)


class Fields(dict):
    """What a record has, without what is null; it knows which of its fields were asked for."""

    def __init__(self, fields: Mapping, read: set[str] | None = None):
        super().__init__((name, value) for name, value in fields.items() if value is not None)
        self.read = set() if read is None else read

    def __getitem__(self, name: str) -> object:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:
        self.read.add(name)
        return super().get(name, default)

    def names(self, columns: Collection[str], known: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Its fields that were read, and those that were not, `columns` that stayed in the file among them.

        Keys of messages and completions that are not `known` were not read either, told as "prompt[].key".
        """
        read = tuple(name for name in self if name in self.read)
        inside = {}  # in order
        for name in read:
            if is_conversation(self[name]) or name == "completions":
                items = self[name] if isinstance(self[name], list) else [self[name]]
                keys = [key for item in items if isinstance(item, dict) for key in item if not is_empty(item[key])]
                inside |= dict.fromkeys(f"{name}[].{key}" for key in keys if key not in known)
        unread = (*(str(name) for name in self if name not in self.read), *inside, *columns)
        return {"read": read, "unread": unread}
