"""The survey before a training: nothing is read more often than it must be, and all that it finds is used."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from runs import losses, read

from mmrm_fast.config_file import with_options
from mmrm_fast.data.lines import LineFile
from mmrm_fast.train.command import train

NUM_RECORDS, NUM_TESTED = 12, 4
opened, watched = Counter(), []  # files by name, while a folder is watched: an audit hook stays for good


@sys.addaudithook
def count_opened(event, args):
    if watched and event == "open" and str(args[0]).startswith(watched[0]) and str(args[0]).endswith(".png"):
        opened[Path(args[0]).name] += 1


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Parses by file and line, and openings by picture, of what is called."""
    decode = LineFile.fields

    def fields(self, row):
        parsed[self.path.name, row] += 1
        return decode(self, row)

    monkeypatch.setattr(LineFile, "fields", fields)
    parsed = Counter()

    def run(function, *args):
        parsed.clear()
        opened.clear()
        watched[:] = [str(tmp_path)]
        function(*args)
        watched.clear()
        return Counter(parsed), Counter(opened)

    return run


@pytest.fixture
def own_pictures(make_config, write_jsonl, tmp_path):
    """A config over records each with pictures of its own, one of them of four responses."""

    def records(name, count):
        for index in range(count):
            for part in "ab":
                Image.effect_noise((60 + 2 * index, 60), 50).save(tmp_path / f"{name}-{index}{part}.png")
            shared = {"prompt": f"What? {index}", "images": [f"{name}-{index}{part}.png" for part in "ab"]}
            scored = {"responses": [f"{index}", "a", "b", "c d"], "scores": [4, 3, 2, 1]}
            yield {**shared, **(scored if index == 3 else {"chosen": f"two {index}", "rejected": "a cat"})}

    data = write_jsonl(list(records("train", NUM_RECORDS)), "train.jsonl")
    tested = write_jsonl(list(records("test", NUM_TESTED)), "test.jsonl")

    def make(name, **options):
        return make_config(name, **{"data": (str(data),), "eval": (f"own={tested}",), "report_to": (), **options})

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"robust": True, "proxy_image": "white"},
        {"eval_fraction": 0.4},
        {"pairs": "1"},
        {"check_records": 0},
        {"check_records": 5},
        {"inputs": "text"},
        {"eval": ()},
    ],
    ids=str,
)
def test_a_run_of_one_epoch_parses_a_record_and_opens_a_picture_at_most_twice(own_pictures, counted, options):
    parsed, pictures = counted(train, own_pictures("run", **options))
    num_tested = 0 if options.get("eval") == () else NUM_TESTED
    assert len(parsed) == NUM_RECORDS + num_tested
    assert set(parsed.values()) == {2}
    assert len(pictures) == 2 * (NUM_RECORDS + num_tested)
    assert set(pictures.values()) == {2}


def test_every_further_epoch_and_evaluation_reads_once_more(own_pictures, counted):
    parsed, pictures = counted(train, own_pictures("run", epochs=3, eval_every=1000))
    assert {parsed["train.jsonl", row] for row in range(NUM_RECORDS)} == {4}
    assert {parsed["test.jsonl", row] for row in range(NUM_TESTED)} == {2}
    assert {count for name, count in pictures.items() if name.startswith("train")} == {4}


def test_every_pair_that_is_a_sample_of_its_own_is_read_once_after_the_survey(own_pictures, counted):
    parsed, _ = counted(train, own_pictures("run", pairs="expand"))
    assert [parsed["train.jsonl", row] for row in (2, 3)] == [2, 1 + 6]


def test_a_resumed_run_does_not_read_what_came_before(own_pictures, counted):
    config = own_pictures("run", save_every=1, keep=100)
    train(config)
    rows = read(config.run.output_dir / "metrics.jsonl")
    second = with_options(config, resume=str(config.run.output_dir / "checkpoints" / "step-00000002"))
    parsed, _ = counted(train, second)
    before = sum(row["records"] for row in rows[:2])
    assert sum(name == "train.jsonl" for name, _ in parsed) == NUM_RECORDS - before > 0
    assert set(parsed.values()) == {2}


def test_how_much_is_surveyed_changes_nothing(own_pictures):
    folders = [train(own_pictures(str(count), check_records=count)) for count in (0, 5, 100)]
    assert losses(folders[0]) == losses(folders[1]) == losses(folders[2])


@pytest.mark.parametrize("fraction", [0, 1, -1, 1e-9, 1 - 1e-9])
def test_a_fraction_that_leaves_nothing_is_refused(own_pictures, fraction):
    with pytest.raises(ValueError, match="--eval-fraction"):
        train(own_pictures("none", eval_fraction=fraction))
