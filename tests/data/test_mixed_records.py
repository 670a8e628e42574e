"""Two thousand records as the world has them, good and bad: each one is a sample or a named error, once."""

import base64
import gzip
import json

import numpy as np
import pytest
from PIL import Image

from mmrm_fast.data.mixture import SAMPLE, Look
from mmrm_fast.data.records import RecordError, Records
from mmrm_fast.data.samples import Preparer

NUM_RECORDS = 2000
GOOD_IMAGES = {
    "rgb": "RGB",
    "grey": "L",
    "bilevel": "1",
    "cmyk": "CMYK",
    "alpha": "RGBA",
    "grey alpha": "LA",
    "16": "I;16",
}
GOOD_TEXTS = {
    "empty": "",
    "unicode": "图片 👩\u200d🔬 cafe\u0301 \u200b العربية",
    "special tokens": "<|im_end|> <image> <IMG_CONTEXT>",
    "white space": " \n\t ",
    "long": "I think so. " * 9000,
}


@pytest.fixture
def images(tmp_path):
    """Names of usable and of unusable image files, the latter with what is said of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    picture = Image.fromarray(pixels)
    for name, mode in GOOD_IMAGES.items():
        grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        (grey if mode == "I;16" else picture.convert(mode)).save(tmp_path / f"{name}.tiff")
    picture.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "huge.png").write_bytes(whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    bad = {"truncated.png": "", "huge.png": "", "text.png": "not an image", "empty.png": "not an image"}
    return [f"{name}.tiff" for name in GOOD_IMAGES], {**bad, "folder.png": "a folder", "missing.png": "no such image"}


@pytest.fixture
def kinds(images):
    """(line, whether it is good) of each kind of record."""
    good_images, bad_images = images
    record = {"prompt": "What?", "responses": ["two", "red"]}
    encoded = "data:image/png;base64," + base64.b64encode(b"not a picture").decode()
    good = [{**record, "img_path": name} for name in good_images]
    good += [{**record, "responses": [text, "a"]} for name, text in GOOD_TEXTS.items() if name != "long"]
    good += [{**record, "images": good_images[:3]}, {**record, "prompt": ""}]
    good += [{**record, "img_path": nothing} for nothing in (None, "", [])]
    bad = [{**record, "img_path": name} for name in [*bad_images, encoded, "http://host/a.png", 3]]
    bad += [{**record, "responses": value} for value in ([], None, "text", [1], [{"role": "user", "content": "a"}])]
    bad += [
        {"responses": ["a"]},
        {"prompt": "p"},
        {**record, "prompt": "<image> <image>", "img_path": good_images[0]},
        [],
        7,
    ]
    bad += [{**record, "prompt": "\ud800"}]
    broken = ['{"prompt": "p", ', "not JSON", "[" * 5000, '{"prompt": "p"} {}', "\x00"]
    lines = [(json.dumps(fields), True) for fields in good] + [(json.dumps(fields), False) for fields in bad]
    return lines + [(line, False) for line in broken]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_record_is_a_sample_or_an_error_that_names_its_line(make_checkpoint, tmp_path, kinds, suffix):
    drawn = np.random.default_rng(1).integers(0, len(kinds), NUM_RECORDS)
    lines, good = map(list, zip(*(kinds[kind] for kind in drawn), strict=True))
    for place in range(100, NUM_RECORDS, 400):
        lines[place], good[place] = json.dumps({"prompt": "p", "responses": [GOOD_TEXTS["long"]]}), True
    path = tmp_path / ("records" + suffix)
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    checkpoint = make_checkpoint(max_length=256)
    records, preparer = Records(path), Preparer(checkpoint.prompt_encoder(), checkpoint.tiling)
    assert len(records) == NUM_RECORDS

    rows = np.array([row for i in range(NUM_RECORDS) for row in Look(records, preparer, decode=True)(i).rows], SAMPLE)
    errors = [error for notes in rows["notes"] if notes for error in notes.errors]
    assert [error.source for error in errors] == [f"{path}:{i + 1}" for i in range(NUM_RECORDS) if not good[i]]
    samples = [preparer.sample(records.group(i)) for i in range(NUM_RECORDS) if good[i]]
    assert all(len(sequence) <= 256 for sample in samples for sequence in sample.main.sequences)
    assert sum(any(sample.main.truncated) for sample in samples) == 5


def test_every_bad_image_says_what_is_wrong_with_it(make_checkpoint, tmp_path, images):
    checkpoint = make_checkpoint()
    preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling)
    path = tmp_path / "records.jsonl"
    for name, reason in images[1].items():
        path.write_text(json.dumps({"prompt": "What?", "img_path": name, "responses": ["a"]}))
        with pytest.raises(RecordError, match=name) as caught:
            preparer.whole(Records(path).group(0))
        assert reason in caught.value.reason
        assert caught.value.field == "img_path"
