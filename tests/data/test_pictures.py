"""Images of a record: paths, URLs and bytes; nothing outside of the root when confined, nothing without a limit."""

import base64

import pytest

from mmrm_fast.data import pictures
from mmrm_fast.data.records import RecordError, parse_group

CONTENT = b"\x89PNG of sorts"
DATA_URL = "data:image/png;base64," + base64.b64encode(CONTENT).decode()


def parse(image, *, field="img_path", **options):
    return parse_group({"prompt": "p", field: image, "responses": ["a"]}, source="file.jsonl:1", **options)


IMAGES = {
    "a path": ("a.png", ("a.png",), "a.png"),
    "a list": (["a.png", "b.png"], ("a.png", "b.png"), ["a.png", "b.png"]),
    "null": (None, (), None),
    "a file URL": ("file:///a%20b.png", ("/a b.png",), "file:///a%20b.png"),
    "a file URL of this host": ("file://localhost/a.png", ("/a.png",), "file://localhost/a.png"),
    "a data URL": (DATA_URL, (CONTENT,), f"data:image/png;base64,<{len(DATA_URL)} characters>"),
    "bytes": (CONTENT, (CONTENT,), f"<{len(CONTENT)} bytes>"),
    "an object with bytes": ({"bytes": CONTENT, "path": None}, (CONTENT,), f"<{len(CONTENT)} bytes>"),
    "an object with bytes and a name": ({"bytes": CONTENT, "path": "a.png"}, (CONTENT,), "a.png"),
    "an object with a path": ({"bytes": None, "path": "a.png"}, ("a.png",), "a.png"),
    "a list of objects": (
        [{"bytes": CONTENT}, {"path": "b.png"}], (CONTENT, "b.png"), [f"<{len(CONTENT)} bytes>", "b.png"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("field", pictures.IMAGE_FIELDS)
def test_an_image_is_a_path_or_the_bytes_of_a_file(kind, field):
    image, images, shown = IMAGES[kind]
    group = parse(image, field=field)
    assert (group.images, group.img_path) == (images, shown)


EMPTY = (None, "", [], {}, {"bytes": None, "path": None})


@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_what_is_empty_is_no_picture_and_another_field_s_picture_counts(empty):
    fields = {"prompt": "p", "responses": ["a"], "img_path": empty, "images": empty}
    assert parse_group(fields, source="file.jsonl:1").images == ()
    assert parse_group({**fields, "image": {"bytes": CONTENT}}, source="file.jsonl:1").images == (CONTENT,)


def test_different_pictures_in_two_fields_are_refused_and_the_same_taken_once():
    fields = {"prompt": "p", "responses": ["a"], "image": "a.png", "image_path": "a.png"}
    assert parse_group(fields, source="file.jsonl:1").images == ("a.png",)
    with pytest.raises(RecordError, match="image_path: has other images than `image`"):
        parse_group({**fields, "image_path": "b.png"}, source="file.jsonl:1")


REFUSED = {
    "http": ("http://host/a.png", "not downloaded"),
    "https in capitals": ("HTTPS://host/a.png", "not downloaded"),
    "a data URL of text": ("data:text/plain;base64,AAAA", "expected data:image/"),
    "a data URL that is not base64": ("data:image/svg+xml,<svg/>", "expected data:image/"),
    "broken base64": ("data:image/png;base64,A*AA", "not valid base64"),
    "a file URL of another host": ("file://host/a.png", "expected file:///path"),
    "a file URL without a path": ("file://", "expected file:///path"),
    "a file URL with a NUL": ("file:///a%00b", "expected file:///path"),
    "bytes as text": ({"bytes": "AAAA"}, "write them as a data:image"),
    "a number": (3, "got a number"),
    "a list in a list": ([["a.png"]], "got a list"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_refused(kind):
    image, reason = REFUSED[kind]
    with pytest.raises(RecordError, match=reason) as caught:
        parse(image)
    assert caught.value.field == "img_path"


@pytest.mark.parametrize("image", [b"\0" * 101, "data:image/png;base64," + "AAAA" * 40], ids=["bytes", "data URL"])
def test_an_encoded_image_over_the_limit_is_refused(monkeypatch, image):
    monkeypatch.setattr(pictures, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(RecordError, match="over"):
        parse(image)


# confined


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(CONTENT)
    (root / "a.png").write_bytes(CONTENT)
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    return root


@pytest.mark.parametrize("path", ["a.png", "inner/../a.png", "inside.png", "{root}/a.png", "file://{root}/a.png"])
def test_confined_paths_lie_under_the_root(root, path):
    assert parse(path.format(root=root), image_root=root, confined=True).images == (str(root / "a.png"),)


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "outside.png", "up/secret.png", "/etc/passwd", "file:///etc/passwd", "inner/../../secret.png"],
)
def test_a_confined_path_cannot_leave_the_root(root, path):
    with pytest.raises(RecordError, match="outside of the image root"):
        parse(path, image_root=root, confined=True)


def test_a_confined_loop_of_links_is_no_crash(root):
    try:
        assert parse("loop/a.png", image_root=root, confined=True).images == (str(root / "loop/a.png"),)
    except RecordError as error:
        assert "outside of the image root" in error.reason


def test_without_a_root_confined_records_bring_their_images_along():
    assert parse(DATA_URL, confined=True).images == (CONTENT,)
    for path in ("a.png", "/a.png", "file:///a.png"):
        with pytest.raises(RecordError, match="send the image as a data URL"):
            parse(path, confined=True)
