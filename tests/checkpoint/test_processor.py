"""Image settings of a folder: found where transformers finds them, each honoured or refused by its name."""

import json

import pytest

from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.checkpoint.processor import NESTED, PLAIN, Processor, stored_settings
from mmrm_fast.data.images import NORMALIZATION

IMAGENET_MEAN, IMAGENET_STD = NORMALIZATION["imagenet"]
GIVEN = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}


def processor(**settings):
    return Processor("folder/file.json", {**GIVEN, **settings}, image_size=56)


def test_settings_that_are_not_given_are_those_of_transformers():
    plain = Processor("file.json", {}, image_size=56)
    assert (plain.mean, plain.std) == NORMALIZATION["clip"]
    assert plain.tiling(None, None) == plain.tiling(12, None)
    assert (plain.tile_size, plain.thumbnail, plain.pad2square) == (56, True, False)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"size": 28}, "tile_size", 28),
        ({"size": {"height": 28, "width": 28}}, "tile_size", 28),
        ({"size": None}, "tile_size", 56),
        ({"do_normalize": False}, "mean", (0.0, 0.0, 0.0)),
        ({"do_normalize": False, "image_std": None}, "std", (1.0, 1.0, 1.0)),
        ({"max_patches": 4}, "max_patches", 4),
        ({"use_thumbnail": False}, "thumbnail", False),
        ({"do_resize": True, "resample": 3, "rescale_factor": 1 / 255, "do_convert_rgb": None}, "mean", IMAGENET_MEAN),
    ],
    ids=str,
)
def test_a_setting_is_honoured(settings, name, value):
    assert getattr(processor(**settings), name) == value


def test_pictures_that_are_not_cropped_are_one_tile():
    assert processor(crop_to_patches=False).tiling(None, None).max_tiles == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 28, "width": 56}}, {"size": {"shortest_edge": 56}}, {"size": 0}, {"size": "56"},
        {"image_mean": None}, {"image_mean": [0.5]}, {"image_std": [0, 1, 1]}, {"image_std": "x"},
        {"do_resize": False}, {"do_rescale": False}, {"do_center_crop": True}, {"do_pad": True}, {"resample": 2},
        {"rescale_factor": 1}, {"rescale_factor": "x"}, {"do_normalize": 1}, {"use_thumbnail": "yes"},
        {"min_patches": 0}, {"max_patches": 1_000_000}, {"max_patches": 2.5}, {"min_patches": 20},
        {"compat": "other"}, {"max_length": 0}, {"max_length": "4096"},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_its_name(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"folder/file\.json: {name} is .*; expected "):
        processor(**settings)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({PLAIN: {"size": 1}}, (PLAIN, {"size": 1})),
        ({NESTED: {"image_processor": {"size": 2}}, PLAIN: {"size": 1}}, (NESTED, {"size": 2})),
        ({NESTED: {"image_seq_length": 4}, PLAIN: {"size": 1}}, (PLAIN, {"size": 1})),
    ],
    ids=["one file", "a stale file beside the nested settings", "a processor without an image processor"],
)
def test_settings_are_found_in_the_order_of_transformers(tmp_path, files, found):
    for name, settings in files.items():
        (tmp_path / name).write_text(json.dumps(settings))
    path, settings = stored_settings(tmp_path)
    assert (path.name, settings) == found


def test_a_folder_without_settings_is_refused(tmp_path):
    (tmp_path / NESTED).write_text("{}")
    with pytest.raises(ValueError, match=f"no {PLAIN}"):
        stored_settings(tmp_path)


def test_a_byte_order_mark_is_read_past(model_folder):
    path = model_folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert CheckpointFolder(model_folder).settings["model_type"] == "internvl"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", PLAIN])
def test_a_git_lfs_pointer_is_named_with_its_remedy(model_folder, name):
    (model_folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{name}: a git-lfs pointer, not the file itself: run `git lfs pull`"):
        CheckpointFolder(model_folder).load()
