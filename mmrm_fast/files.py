"""Files that are whole or not there: written aside, then renamed; JSON without numbers that JSON does not have."""

import json
import math
import os
from pathlib import Path


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, null where a number is NaN or infinite."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file aside, then under its name."""
    aside = path.with_name(path.name + ".unfinished")
    aside.write_text(text)
    os.replace(aside, path)


def finite(value: object) -> object:
    """The same nested value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
