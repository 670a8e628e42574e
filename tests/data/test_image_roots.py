"""`--image-root`: folders for all files, for one file, for one test set; no file gets the pictures of another."""

import filecmp
import json
import re
import shutil

import pytest
from PIL import Image

from mmrm_fast.cli import main
from mmrm_fast.config import ScoreConfig
from mmrm_fast.data.pictures import ImageRoots, same_content
from mmrm_fast.data.records import RecordError, Records, iter_groups
from mmrm_fast.score.command import open_records
from mmrm_fast.train.command import train
from mmrm_fast.train.records import InputErrors


@pytest.fixture
def sets(tmp_path):
    """Two folders of a file of records and a picture `a.png` each, another one in each."""
    for name, size in (("train", (60, 60)), ("ood", (120, 60))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size, "red").save(tmp_path / name / "a.png")
        rows = [{"prompt": "What?", "image": "a.png", "chosen": f"two {i}", "rejected": "cat"} for i in range(2)]
        (tmp_path / name / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "train", tmp_path / "ood"


def roots_of(options, folder, name=None):
    """Where the pictures of a folder's file come from."""
    records = Records(folder / "data.jsonl", image_root=ImageRoots.parse(options), name=name)
    return {group if isinstance(group, RecordError) else group.images[0] for group in iter_groups(records)}


@pytest.mark.parametrize("option", ["{other}", "{file}={other}", "shifted={other}"])
def test_a_root_is_for_all_files_or_for_one_or_for_a_test_set(sets, option):
    training, other = sets
    (training / "a.png").unlink()  # nothing to confuse
    options = [option.format(other=other, file=training / "data.jsonl")]
    assert roots_of(options, training, "shifted") == {str(other / "a.png")}


def test_the_root_of_a_file_goes_before_the_one_for_all(sets):
    training, ood = sets
    options = [str(training), f"{ood / 'data.jsonl'}={ood}"]
    assert roots_of(options, training) == {str(training / "a.png")}
    assert roots_of(options, ood) == {str(ood / "a.png")}
    assert roots_of([str(training), f"{ood / 'data.jsonl'}={training}"], ood) == {str(training / "a.png")}


def test_a_name_that_is_another_picture_beside_its_file_is_an_error_until_decided(sets):
    training, ood = sets
    errors = roots_of([str(training)], ood)
    assert len(errors) == 2 and all(error.field == "image" for error in errors)
    assert all(str(training) in error.reason and str(ood) in error.reason for error in errors)


def test_copies_and_pictures_that_are_in_one_place_alone_are_no_error(sets):
    training, ood = sets
    shutil.copy(training / "a.png", ood / "a.png")
    assert roots_of([str(training)], ood) == {str(training / "a.png")}
    (ood / "a.png").unlink()
    assert roots_of([str(training)], ood) == {str(training / "a.png")}


def test_contents_are_compared_once_for_all_records_and_in_no_epoch(sets, monkeypatch):
    training, ood = sets
    shutil.copy(training / "a.png", ood / "a.png")
    compared = []
    monkeypatch.setattr(filecmp, "cmp", lambda *paths, shallow: not compared.append(paths))
    same_content.cache_clear()
    records = Records(ood / "data.jsonl", image_root=training)
    list(iter_groups(records))
    assert records.group(0).images == records.group(1).images == (str(training / "a.png"),)
    assert compared == [(training / "a.png", ood / "a.png")]


WRONG = {
    "{none}": "no such folder",
    "x={none}": "no such folder",
    "={training}": "no such folder",
    "{training} {ood}": "there is another for all files",
    "x={training} x={ood}": "there is another for x",
}


@pytest.mark.parametrize("options", WRONG)
def test_what_is_no_folder_or_said_twice_is_refused(sets, options):
    training, ood = sets
    with pytest.raises(ValueError, match=WRONG[options]):
        ImageRoots.parse(options.format(training=training, ood=ood, none=ood / "none").split())


def test_training_reads_each_set_with_its_own_pictures(make_config, sets):
    training, ood = sets
    files = {"data": (str(training / "data.jsonl"),), "eval_ood": (f"shifted={ood / 'data.jsonl'}",), "eval": ()}
    roots = (str(training),)
    with pytest.raises(
        InputErrors, match=r"2 records cannot be used:\n.*ood/data.jsonl:1: image: a.png is one picture"
    ):
        train(make_config("refused", **files, image_root=roots))
    with pytest.raises(ValueError, match=r"--image-root other=.*: no file or test set of this name"):
        train(make_config("unused", **files, image_root=(*roots, f"other={ood}")))
    told = train(make_config("told", **files, image_root=(*roots, f"shifted={ood}")))
    alone = train(make_config("alone", **files))
    margins = [re.findall('"margin": ([^,]*)', (run / "eval-shifted.jsonl").read_text()) for run in (told, alone)]
    assert margins[0] == margins[1] and len(margins[0]) == 2


def test_scoring_and_evaluation_take_the_same_options(sets, tmp_path, model_folder, capsys):
    training, ood = sets
    data, out = str(ood / "data.jsonl"), tmp_path / "out"
    errors = [*iter_groups(open_records(ScoreConfig(data=data, image_root=(str(training),))))]
    assert {type(error) for error in errors} == {RecordError}
    (group, _) = iter_groups(open_records(ScoreConfig(data=data, image_root=(f"{data}={training}",))))
    assert group.images == (str(training / "a.png"),)
    evaluate = ["evaluate", "--model", str(model_folder), "--data", data, "--output-dir", str(out), "--image-root"]
    assert main([*evaluate, str(training)]) == 2 and "is one picture under" in capsys.readouterr().err
    assert main([*evaluate, str(training), f"{data}={ood}"]) == 0
