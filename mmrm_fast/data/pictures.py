"""Images of a record: paths, `file://` and `data:` URLs, encoded bytes. Nothing is ever downloaded.

The field is `img_path`, `images`, `image` or `image_path`, the first that is not null: one image or a list. An image
is a path (relative to the image root), a `file://` URL, a base64 `data:image/...` URL, the bytes of an image file
(Parquet), or an object with `bytes` or `path` as the `datasets` library stores it.
"""

import base64
import binascii
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmrm_fast.data.types import RecordError, kind_of, text

IMAGE_FIELDS = ("img_path", "images", "image", "image_path")
MAX_IMAGE_BYTES = 1 << 26  # of an encoded image inside a record
SHOWN_URL = 40


def record_images(fields: dict, source: str, image_root: Path | None, confined: bool) -> tuple[str | bytes, ...]:
    """The record's images: resolved paths, or encoded bytes. Raises `RecordError`."""
    name = image_field(fields)
    if name is None:
        return ()
    value = fields[name]
    items = value if isinstance(value, list) else [value]
    return tuple(resolve_image(item, name, source, image_root, confined) for item in items)


def image_field(fields: dict) -> str | None:
    """The field that holds the record's images."""
    return next((name for name in IMAGE_FIELDS if fields.get(name) is not None), None)


def resolve_image(
    item: object, name: str, source: str, image_root: Path | None = None, confined: bool = False
) -> str | bytes:
    """One image as a path or as encoded bytes.

    Args:
        image_root: where relative paths start.
        confined: accept only paths that lie under `image_root`, symbolic links followed; without a root, none.

    Raises:
        RecordError: not an image reference, outside of the root, or over `MAX_IMAGE_BYTES`.
    """
    if isinstance(item, dict):
        content = item.get("bytes")
        if isinstance(content, str):
            raise RecordError(source, name, "JSON holds no bytes; write them as a data:image/...;base64, URL")
        item = item.get("path") if content is None else content
    if isinstance(item, bytes):
        return checked_size(item, name, source)
    if not isinstance(item, str) or not item or "\0" in item:
        raise RecordError(source, name, f"expected a path or a list of paths, got {kind_of(item)}")
    scheme = item[:8].lower()
    if scheme.startswith("data:"):
        return decode_data_url(item, name, source)
    if scheme.startswith(("http://", "https://")):
        raise RecordError(source, name, "images are not downloaded; save it and give its path")
    path = file_url_path(item, name, source) if scheme.startswith("file://") else text(item, name, source)
    if confined:
        return confined_path(path, name, source, image_root)
    return str(image_root / path if image_root else Path(path))


def checked_size(content: bytes, name: str, source: str) -> bytes:
    """Encoded bytes of at most `MAX_IMAGE_BYTES`."""
    if len(content) > MAX_IMAGE_BYTES:
        raise RecordError(source, name, f"an image of {len(content)} bytes is over the limit of {MAX_IMAGE_BYTES}")
    return content


def decode_data_url(url: str, name: str, source: str) -> bytes:
    """The bytes of a base64 `data:image/...` URL."""
    head, comma, body = url.partition(",")
    head = head.lower()
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise RecordError(source, name, f"expected data:image/...;base64,... got {url[:SHOWN_URL]}")
    if len(body) > MAX_IMAGE_BYTES // 3 * 4 + 4:
        raise RecordError(
            source, name, f"an image of {len(url)} characters is over the limit of {MAX_IMAGE_BYTES} bytes"
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(source, name, f"its data URL is not valid base64 ({error})") from None


def file_url_path(url: str, name: str, source: str) -> str:
    """The path of a `file://` URL on this machine."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise RecordError(source, name, f"not a file URL ({error})") from None
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path or "\0" in path:
        raise RecordError(source, name, f"expected file:///path/on/this/machine, got {url[:SHOWN_URL]}")
    return path


def confined_path(path: str, name: str, source: str, image_root: Path | None) -> str:
    """A path that stays under the root when every symbolic link is followed."""
    if image_root is None:
        raise RecordError(source, name, "paths are not accepted here; send the image as a data URL")
    try:
        root = image_root.resolve()
        resolved = (root / path).resolve()
        special = resolved.exists() and not resolved.is_file()
    except (OSError, RuntimeError, ValueError):
        resolved = root.parent
    if not resolved.is_relative_to(root):
        raise RecordError(source, name, "lies outside of the image root")
    if special:  # opening a named pipe would wait without end
        raise RecordError(source, name, "is not a regular file")
    return str(resolved)


def shown_images(value: object) -> str | list | None:
    """Images as a record has them, short enough to be repeated: encoded ones by their size."""
    if isinstance(value, list):
        return [shown_images(item) for item in value]
    if isinstance(value, dict):
        return shown_images(value["path"] if isinstance(value.get("path"), str) else value.get("bytes"))
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str) and value[:5].lower() == "data:":
        return f"{value[:SHOWN_URL].partition(',')[0]},<{len(value)} characters>"
    return value
