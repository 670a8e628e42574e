"""Images of a record: paths, `file://` and `data:` URLs, encoded bytes. Nothing is ever downloaded.

The field is `img_path`, `images`, `image` or `image_path`, the one that is not empty: one image or a list. An image
is a path (relative to the image root), a `file://` URL, a base64 `data:image/...` URL, the bytes of an image file
(Parquet), or an object with `bytes` or `path` as the `datasets` library stores it.
"""

import base64
import binascii
import filecmp
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmrm_fast.data.fields import is_empty
from mmrm_fast.data.types import FieldError, kind_of, text

IMAGE_FIELDS = ("img_path", "images", "image", "image_path")
MAX_IMAGE_BYTES = 1 << 26  # of an encoded image inside a record
SHOWN_URL = 40


@dataclass(frozen=True)
class ImageRoots:
    """Where relative image paths start: a folder for all files, or one for a file or a test set by its name.

    Under a folder for all, a name that stands beside its own file too, with other content, is an error: it has to be
    said which of the two is meant, by a folder for that very file.
    """

    common: Path | None = None
    own: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Sequence[str]) -> "ImageRoots":
        """FOLDER, NAME=FOLDER or FILE=FOLDER each. Raises `ValueError`."""
        roots = {}
        for option in options:
            name, found, folder = option.rpartition("=") if not Path(option).is_dir() else ("", "", option)
            if not Path(folder).is_dir() or (found and not name):
                raise ValueError(f"--image-root {option}: no such folder; expected FOLDER, NAME=FOLDER or FILE=FOLDER")
            if name in roots:
                raise ValueError(f"--image-root {option}: there is another for {name or 'all files'}")
            roots[name] = Path(folder).absolute()
        return cls(roots.pop("", None), roots)

    def options(self) -> tuple[str, ...]:
        """The same with absolute paths, for `parse`."""
        common = [str(self.common)] if self.common else []
        return (*common, *(f"{Path(name).absolute()}={folder}" for name, folder in self.own.items()))

    def called(self, file: Path, *names: str) -> str | None:
        """The name by which a file, which goes by these too, has a folder of its own."""
        paths = {Path(own).absolute() for own in (file, *names)}
        return next((name for name in self.own if name in names or Path(name).absolute() in paths), None)

    def of(self, file: Path, *names: str) -> tuple[Path, Path | None]:
        """The folder of a file, and where a picture of the same name must be the same."""
        name = self.called(file, *names)
        if name is not None:
            return self.own[name], None
        return (self.common, file.parent) if self.common else (file.parent, None)

    def refuse_unused(self, known: Iterable[tuple[Path, ...]]) -> None:
        """Raise `ValueError` where the name of a folder is of no file that is read, by what those go by."""
        for name in self.own.keys() - {self.called(*names) for names in known}:
            raise ValueError(f"--image-root {name}={self.own[name]}: no file or test set of this name is read")


def parse_images(fields: dict, in_messages: tuple[object, ...], **where) -> tuple[str | list | None, tuple]:
    """A record's images, of its own field or of its messages: as written, and as `resolve_image` gives them.

    Raises:
        FieldError: an image that cannot be used, or images in both places.
    """
    filled = [name for name in IMAGE_FIELDS if not is_empty(fields.get(name))]
    encoded = [name for name in filled if is_encoded(fields[name])]
    if len(encoded) == 1 and all(isinstance(fields[name], str) for name in filled if name not in encoded):
        filled = encoded  # the path beside it says where it came from, as in RLAIF-V
    if any(fields[name] != fields[filled[0]] for name in filled[1:]):
        raise FieldError(filled[1], f"has other images than `{filled[0]}` beside it; use one of the two")
    if in_messages and filled:
        raise FieldError(filled[0], "there are images in the messages as well; use one of the two")
    name = filled[0] if filled else "image"
    written = fields[name] if filled else [*in_messages] or None
    items = written if isinstance(written, list) else [] if written is None else [written]
    return shown_images(written), tuple(resolve_image(item, name, **where) for item in items)


def is_encoded(value: object) -> bool:
    """Whether a picture is here itself, as an object of the `datasets` library or bytes."""
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def resolve_image(
    item: object, name: str, image_root: Path | None = None, confined: bool = False, beside: Path | None = None
) -> str | bytes:
    """One image as a path, which starts from `image_root` where it is relative, or as encoded bytes.

    Args:
        confined: accept only paths that lie under `image_root`, symbolic links followed; without a root, none.
        beside: where a file of the same relative path must have the same content.

    Raises:
        FieldError: not an image reference, outside of the root, or over `MAX_IMAGE_BYTES`.
    """
    if isinstance(item, dict):
        content = item.get("bytes")
        if isinstance(content, str):
            raise FieldError(name, "JSON holds no bytes; write them as a data:image/...;base64, URL")
        item = item.get("path") if content is None else content
    if isinstance(item, bytes):
        if len(item) > MAX_IMAGE_BYTES:
            raise FieldError(name, f"an image of {len(item)} bytes is over the limit of {MAX_IMAGE_BYTES}")
        return item
    if not isinstance(item, str) or not item or "\0" in item:
        raise FieldError(name, f"expected a path or a list of paths, got {kind_of(item)}")
    scheme = item[:8].lower()
    if scheme.startswith("data:"):
        return decode_data_url(item, name)
    if scheme.startswith(("http://", "https://")):
        raise FieldError(name, "images are not downloaded; save it and give its path")
    path = file_url_path(item, name) if scheme.startswith("file://") else text(item, name)
    if beside and not Path(path).is_absolute() and not same_content(image_root / path, beside / path):
        remedy = f"say which with --image-root FILE={image_root} or FILE={beside}"
        why = f"is one picture under --image-root {image_root} and another one beside the file, in {beside}; {remedy}"
        raise FieldError(name, f"{path} {why}")
    if confined:
        return confined_path(path, name, image_root)
    return str(image_root / path if image_root else Path(path))


@lru_cache(maxsize=1 << 16)
def same_content(first: Path, second: Path) -> bool:
    """Whether two files are alike, sizes compared before bytes; true where one of them is not there."""
    try:
        return first.samefile(second) or filecmp.cmp(first, second, shallow=False)
    except OSError:
        return True


def decode_data_url(url: str, name: str) -> bytes:
    """The bytes of a base64 `data:image/...` URL."""
    head, comma, body = url.partition(",")
    head = head.lower()
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise FieldError(name, f"expected data:image/...;base64,... got {url[:SHOWN_URL]}")
    if len(body) > MAX_IMAGE_BYTES // 3 * 4 + 4:
        raise FieldError(name, f"an image of {len(url)} characters is over the limit of {MAX_IMAGE_BYTES} bytes")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FieldError(name, f"its data URL is not valid base64 ({error})") from None


def file_url_path(url: str, name: str) -> str:
    """The path of a `file://` URL on this machine."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise FieldError(name, f"not a file URL ({error})") from None
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path or "\0" in path:
        raise FieldError(name, f"expected file:///path/on/this/machine, got {url[:SHOWN_URL]}")
    return path


def confined_path(path: str, name: str, image_root: Path | None) -> str:
    """A path that stays under the root when every symbolic link is followed."""
    if image_root is None:
        raise FieldError(name, "paths are not accepted here; send the image as a data URL")
    try:
        root = image_root.resolve()
        resolved = (root / path).resolve()
        is_special = resolved.exists() and not resolved.is_file()
    except (OSError, RuntimeError, ValueError):  # such as links in a circle
        resolved = root.parent
    if not resolved.is_relative_to(root):
        raise FieldError(name, "lies outside of the image root")
    if is_special:  # opening a named pipe would wait without end
        raise FieldError(name, "is not a regular file")
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
