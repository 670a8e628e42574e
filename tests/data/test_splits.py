"""Which files a folder stands for: training takes its training split, evaluation the test split, scoring all of it."""

import pytest

from mmrm_fast.data.records import Records
from mmrm_fast.data.splits import record_files, said_left

HUB = ["test_prefs-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet", "train_prefs-00000-of-00002.parquet",
       "train_prefs-00001-of-00002.parquet", "train_sft-00000-of-00001.parquet"]  # fmt: skip
ALIKE = ["evaluated.jsonl", "testimony.jsonl", "trained.json"]
FOLDERS = {  # files: those that training and evaluation take
    "a hub's": (HUB, HUB[2:4], HUB[:1]),
    "below data": (
        ["data/test-0.parquet", "data/train-0.parquet", "dataset_infos.json"], ["train-0.parquet"], ["test-0.parquet"]),
    "validation alone": (["training.jsonl", "val.jsonl"], ["training.jsonl"], ["val.jsonl"]),
    "test before validation": (["test.jsonl", "train.jsonl", "validation.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    "no split": (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    "words that begin alike": (ALIKE, ALIKE, ALIKE),
    "no training split": (["mine.jsonl", "test.jsonl"], ["mine.jsonl"], ["test.jsonl"]),
    "no test split": (["mine.jsonl", "train.jsonl"], ["train.jsonl"], ["mine.jsonl"]),
    "one split": (["train-0.jsonl", "train-1.jsonl"], *[["train-0.jsonl", "train-1.jsonl"]] * 2),
    "RewardBench": (["filtered-0.parquet", "raw-0.parquet"], ["raw-0.parquet"], ["filtered-0.parquet"]),
    "CSV alone": (["all_data.csv"], ["all_data.csv"], ["all_data.csv"]),
    "CSV beside records": (["a.jsonl", "metrics.csv"], ["a.jsonl"], ["a.jsonl"]),
}  # fmt: skip


@pytest.fixture
def make_folder(tmp_path):
    def make(names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}\n")
        return tmp_path

    return make


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_split_is_taken_and_the_others_are_said_to_be_left(make_folder, kind):
    names, *expected = FOLDERS[kind]
    folder = make_folder(names)
    everything, nothing = record_files(folder)
    for split, own in zip(("train", "test"), expected, strict=True):
        taken, left = record_files(folder, split)
        assert [file.name for file in taken] == own
        assert sorted([*taken, *left]) == everything
        said = said_left(taken, left)
        assert all(file.name in said.partition("left, of other splits")[2] for file in left) if left else said is None
    assert nothing == []


@pytest.mark.parametrize("spec", ["test.jsonl", "t*.jsonl"])
def test_a_file_or_glob_that_is_named_is_read_whatever_its_split(make_folder, spec):
    taken, left = record_files(make_folder(["test.jsonl", "other.jsonl"]) / spec, "train")
    assert ([file.name for file in taken], left) == (["test.jsonl"], [])


def test_records_of_folders_and_files_know_what_was_left(make_folder):
    folder = make_folder(["train.jsonl", "test.jsonl"])
    records = Records(folder, folder / "test.jsonl", split="train")
    assert [file.path.name for file in records.files] == ["train.jsonl", "test.jsonl"]
    assert [file.name for file in records.left] == ["test.jsonl"]


def test_a_file_is_read_once_however_many_links_lead_to_it(tmp_path):
    for folder in ("a", "a/b", "a/.hidden"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text("{}\n")
    for link in ("loop", "again", "b/up"):
        (tmp_path / "a" / link).symlink_to(tmp_path / "a")
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "a" / "rows.jsonl")
    for pattern in ("**/*.jsonl", "a/**", "**/rows.jsonl"):
        found = {file.resolve() for file in record_files(f"{tmp_path}/{pattern}")[0]}
        assert found == {tmp_path / "a" / "rows.jsonl", tmp_path / "a" / "b" / "rows.jsonl"}
        assert len(record_files(f"{tmp_path}/{pattern}")[0]) == 2
