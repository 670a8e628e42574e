"""Inputs with `compat="reference"` are those of the public reference implementation: token ids and pixels."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmrm_fast.checkpoint.tokenizer import load_tokenizer
from mmrm_fast.data.images import NORMALIZATION, Tiling, mean_colour, white_tile
from mmrm_fast.data.packing import pack_items
from mmrm_fast.data.prompt import PromptEncoder
from mmrm_fast.data.records import Records, iter_groups
from mmrm_fast.data.samples import Preparer

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = {"InternLM2ForCausalLM": "internlm2-chat", "Qwen2ForCausalLM": "Hermes-2", "Phi3ForCausalLM": "phi3-chat"}
TRAINED = ("InternLM2ForCausalLM", "Qwen2ForCausalLM")  # those with goldens of a training step
TILING = Tiling(56, 1, 6, compat="reference")
LIMITS = {"expected.json": 4096, "expected_maxlen512.json": 512}
MEAN, STD = (np.array(values, np.float32) for values in NORMALIZATION["imagenet"])


@pytest.fixture(params=TEMPLATES)
def name(request):
    return request.param


@pytest.fixture
def open_golden(name):
    def make(file="records.jsonl", max_length=4096, **options):
        tokenizer = load_tokenizer(GOLDEN / name / "checkpoint", template=TEMPLATES[name], original=True)
        encoder = PromptEncoder(tokenizer, tokens_per_tile=4, max_length=max_length, compat="reference")
        return Preparer(encoder, TILING, **options), list(iter_groups(Records(GOLDEN / name / file)))

    return make


@pytest.fixture
def expected(name):
    return lambda file: json.loads((GOLDEN / name / file).read_text(encoding="utf-8"))


def with_image_token(preparer, sequence):
    """A sequence with every image row as the placeholder's id."""
    return np.where(sequence < 0, preparer.encoder.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), sequence).tolist()


def normalised(tiles):
    """uint8 tiles [I, S, S, 3] as the reference's float32 pixels [I, 3, S, S]."""
    return ((tiles.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def assert_checked(pixels, check):
    """One tile against the mean, deviation and first values that were recorded of it."""
    pixels = pixels.astype(np.float64)
    assert pixels.mean() == pytest.approx(check["mean"], abs=1e-6)
    assert pixels.std() == pytest.approx(check["std"], abs=1e-6)
    assert pixels.mean((1, 2)) == pytest.approx(np.array(check["channel_means"]), abs=1e-6)
    assert pixels.ravel()[:8] == pytest.approx(np.array(check["first8"]), abs=1e-6)


@pytest.mark.parametrize("file", LIMITS)
def test_token_ids_are_those_of_the_reference(open_golden, expected, file):
    preparer, groups = open_golden(max_length=LIMITS[file])
    assert expected(file)["max_length"] == LIMITS[file]
    for item in expected(file)["items"]:
        sample = preparer.sample(groups[item["record"]])
        assert sum(sample.tiles_per_image) == item["num_tiles"]
        assert with_image_token(preparer, sample.main.sequences[item["response"]]) == item["input_ids"]


def test_every_response_has_a_golden(open_golden, expected):
    _, groups = open_golden()
    keys = [(record, response) for record in range(6) for response in range(len(groups[record].responses))]
    for file in LIMITS:
        assert [(item["record"], item["response"]) for item in expected(file)["items"]] == keys


def test_pixels_are_those_of_the_reference(open_golden, expected, name):
    preparer, groups = open_golden()
    checks = expected("expected.json")["pixel_checks"]
    stored = np.load(GOLDEN / name / "pixels.npz")
    assert len(checks) == len(stored.files) == len(groups) == 6
    for record, check in enumerate(checks):
        (tiles,) = preparer.tiles(groups[record])
        pixels = normalised(tiles)
        assert np.array_equal(pixels.astype(np.float16), stored[f"record_{record}"])
        for tile, tile_check in zip(pixels, check["tiles"], strict=True):
            assert_checked(tile, tile_check)


@pytest.mark.parametrize("name", TRAINED, indirect=True)
def test_training_pixels_are_those_of_the_reference(open_golden, expected):
    preparer, groups = open_golden("pairs.jsonl")
    checks = expected("expected_robust.json")["pixel_checks"]
    assert len(checks) == len(groups) == 4
    for record, check in enumerate(checks):
        (tiles,) = preparer.tiles(groups[record])
        for tile, tile_check in zip(normalised(tiles), check["tiles"], strict=True):
            assert_checked(tile, tile_check)


@pytest.mark.parametrize("name", TRAINED, indirect=True)
def test_training_ids_are_those_of_the_reference_for_both_branches(open_golden, expected):
    preparer, groups = open_golden("pairs.jsonl", with_text=True, proxy_image="white")
    items = expected("expected_robust.json")["items"]
    assert len(items) == len(groups) == 4
    for record, item in enumerate(items):
        sample = preparer.sample(groups[record])
        assert (sample.group.id, sum(sample.tiles_per_image)) == (item["id"], item["num_tiles"])
        for kind, encoded in (("", sample.main), ("_fake", sample.text)):
            ids = [with_image_token(preparer, sequence) for sequence in encoded.sequences]
            assert ids == [item["input_ids_chosen" + kind], item["input_ids_rejected" + kind]]


@pytest.mark.parametrize("name", TRAINED, indirect=True)
def test_the_proxy_sees_the_white_picture_of_the_reference(open_golden, expected):
    preparer, groups = open_golden("pairs.jsonl", with_text=True, proxy_image="white")
    batch = pack_items(preparer, groups, preparer.whole).batch
    (pixels,) = normalised(batch.text_tiles.numpy())
    assert_checked(pixels, expected("expected_robust.json")["pixel_check_fake"])
    rows = -1 - batch.text.source_T[batch.text.source_T < 0]
    assert set(rows.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", TRAINED, indirect=True)
def test_text_only_inputs_are_one_white_tile_and_image_only_inputs_have_no_question(open_golden, expected):
    (text_only, groups), whole = open_golden("pairs.jsonl", inputs="text"), expected("expected_robust.json")["items"]
    for record, item in enumerate(whole):
        sample, (tiles,) = text_only.whole(groups[record])
        assert with_image_token(text_only, sample.main.sequences[0]) == item["input_ids_chosen_fake"]
        assert np.array_equal(tiles, white_tile(56))
    image_only, groups = open_golden("records.jsonl", inputs="image")
    empty = expected("expected.json")["items"]
    (no_question,) = (item["input_ids"] for item in empty if (item["record"], item["response"]) == (4, 0))
    sample = image_only.sample(groups[4])
    assert with_image_token(image_only, sample.main.sequences[0]) == no_question
    assert image_only.sample(groups[3]).main.prefix_length == sample.main.prefix_length


@pytest.mark.parametrize(
    ("normalize_type", "colour"),
    [("imagenet", (123, 116, 103)), ("clip", (122, 116, 104)), ("siglip", (127, 127, 127))],
)
def test_the_colour_of_the_padding_is_the_mean_of_the_normalisation(normalize_type, colour):
    assert mean_colour(normalize_type) == colour
