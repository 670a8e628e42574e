"""Whether, and how, files of records are not what they were."""

import csv
import gzip

import pytest

from mmrm_fast.data import fingerprint
from mmrm_fast.data.fingerprint import differences, fingerprints
from mmrm_fast.data.lines import open_rows

LINES = [f'{{"prompt": "{i}", "chosen": "a{i}", "rejected": "b{i}"}}\n' for i in range(300)]
SWAPPED = [*LINES[:150], LINES[150].replace("a150", "b150", 1), *LINES[151:]]
CHANGES = {
    "nothing": (LINES, None),
    "truncated": (LINES[:70], "truncated, 70 records where 300 were"),
    "cut in a line": ([*LINES[:69], LINES[69][:20]], "truncated, 70 records where 300 were"),
    "nothing left": ([], "truncated, 0 records where 300 were"),
    "appended to": ([*LINES, *LINES[:5]], "appended to, 305 records where 300 were"),
    "reordered": ([*LINES[100:], *LINES[:100]], "reordered"),
    "labels swapped": (SWAPPED, "changed, 300 records where 300 were"),
    "other lines": ([line.replace("a", "c") for line in LINES], "changed, 300 records where 300 were"),
    "shorter and other": (SWAPPED[:200], "changed, 200 records where 300 were"),
    "longer and other": ([*SWAPPED, *LINES], "changed, 600 records where 300 were"),
}


def changed(tmp_path, before, after, write, name):
    """What is said of a file that held some lines and holds others."""
    path = tmp_path / name
    write(path, before)
    known = fingerprints(open_rows([path], ()))
    write(path, after)
    return [line.removeprefix(f"{path}: ") for line in differences(known, open_rows([path], ()))]


def plain(path, lines):
    path.write_text("".join(lines))


def packed(path, lines):
    path.write_bytes(gzip.compress("".join(lines).encode()))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(("write", "file"), [(plain, "data.jsonl"), (packed, "data.jsonl.gz")], ids=["plain", "gz"])
def test_a_change_of_a_file_is_named(tmp_path, name, write, file):
    after, change = CHANGES[name]
    said = changed(tmp_path, LINES, after, write, file)
    assert len(said) == (change is not None) and all(line.startswith(change) for line in said)


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("labels swapped", "shorter and other")])
def test_a_change_of_most_of_a_file_is_named_where_samples_alone_are_looked_at(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 100)
    test_a_change_of_a_file_is_named(tmp_path, name, plain, "data.jsonl")


def table(path, lines):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen"], *([line, "a"] for line in lines)])


def test_a_change_of_a_file_without_lines_is_named(tmp_path):
    for after, change in ((LINES, []), (LINES[:9], ["truncated, 9 records where 300 were"])):
        assert changed(tmp_path, LINES, after, table, "data.csv") == change
    assert changed(tmp_path, LINES, SWAPPED, table, "data.csv") == ["changed, 300 records where 300 were"]


def test_files_that_come_and_go_are_named(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        plain(tmp_path / name, LINES)
    known = fingerprints(open_rows(sorted(tmp_path.iterdir()), ()))
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    assert differences(known, open_rows(sorted(tmp_path.iterdir()), ())) == [
        f"{tmp_path / 'c.jsonl'}: was not there",
        f"{tmp_path / 'a.jsonl'}: is not read any more",
    ]
