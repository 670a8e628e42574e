"""Shards of a scoring run: done or not there, once however often they are written, of one run and no other."""

import json
import os
import re
import shutil

import pytest
from pyarrow import parquet

from mmrm_fast.score.shards import PAIRS, Shards, fingerprint


def test_a_chunk_without_its_note_is_not_done_and_a_chunk_written_twice_is_there_once(tmp_path):
    shards = Shards(tmp_path / "out", "jsonl", 130)
    shards.open({"data": "a"})
    assert shards.todo() == [0, 1, 2] and list(shards.records(2)) == [128, 129]
    for _ in range(2):
        shards.write(1, [{"record": 64}], {"chunk": 1})
    assert shards.todo() == [0, 2]
    shards.note(1).unlink()  # killed between the rows and the note
    assert shards.todo() == [0, 1, 2]
    for chunk in range(3):
        shards.write(chunk, [{"record": record} for record in shards.records(chunk)], {"chunk": chunk})
    assert shards.todo() == [] and [note["chunk"] for note in shards.notes()] == [0, 1, 2]
    shards.join(tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == list(range(130))


@pytest.mark.parametrize("name", ["data", "model"])
def test_a_run_is_not_resumed_on_something_else(tmp_path, name):
    identity = {"data": "a", "model": "b"}
    shards = Shards(tmp_path / "out", "jsonl", 10)
    shards.open({**identity, name: "c"})  # of which nothing is done
    shards.open(identity)
    shards.write(0, [], {})
    assert shards.open(identity) == []
    with pytest.raises(ValueError, match=f"other {name}; delete it or choose another --out"):
        Shards(tmp_path / "out", "jsonl", 10).open({**identity, name: "c"})


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    shards = Shards(tmp_path / "out", "jsonl", 10)
    shards.open({})
    (shards.folder / ".part-000000.jsonl.1.unfinished").write_text("{")
    shards.open({})
    assert [path.name for path in shards.folder.iterdir()] == [".done"]


class Killed(BaseException):
    pass


def dying(function, calls):
    """The function, killed at the last of so many calls; one that removes a folder is half done then."""
    left, removes = iter(range(calls - 1, -1, -1)), function is shutil.rmtree

    def call(*arguments, **options):
        if next(left):
            return function(*arguments, **options)
        if removes:
            function(arguments[0] / ".done")
        raise Killed

    return call


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [(shutil, "copyfileobj", 2), (os, "replace", 1), (os, "replace", 2), (shutil, "rmtree", 1)],
)
def test_a_run_killed_while_its_shards_are_joined_ends_when_it_is_started_again(
    tmp_path, monkeypatch, module, name, calls
):
    def opened():
        shards = Shards(tmp_path / "out.jsonl.parts", "jsonl", 130)
        shards.open({"data": "a"})
        for chunk in shards.todo():
            shards.write(chunk, [{"record": record} for record in shards.records(chunk)], {})
        return shards

    out, shards = tmp_path / "out.jsonl", opened()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, dying(getattr(module, name), calls))
        shards.join(out)
    opened().join(out)
    assert [json.loads(line)["record"] for line in out.read_text().splitlines()] == list(range(130))
    assert list(tmp_path.iterdir()) == [out]


DAMAGES = {
    "is gone": lambda shards: shards.shard(1).unlink(),
    "is not what was written": lambda shards: shards.shard(1).write_text('{"record": 65}\n'),
    "has a damaged note": lambda shards: shards.note(1).write_text('{"tally": {}}'),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_chunk_whose_shard_is_not_as_its_note_says_is_scored_again_and_that_is_said(tmp_path, problem):
    shards = Shards(tmp_path / "out", "jsonl", 130)
    shards.open({"data": "a"})
    for chunk in range(3):
        shards.write(chunk, [{"record": 64 * chunk}], {})
    DAMAGES[problem](shards)
    assert shards.open({"data": "a"}) == [f"{shards.shard(1)} {problem}: its records are scored again"]
    assert shards.todo() == [1]


def test_a_note_is_written_when_its_rows_are_on_the_disk_and_the_folder_goes_when_the_whole_is(tmp_path, monkeypatch):
    shards, steps = Shards(tmp_path / "out.jsonl.parts", "jsonl", 1), []
    shards.open({})
    fsync, replace = os.fsync, os.replace
    name = lambda path: re.sub(r"\.\d+\.unfinished$", "", os.path.basename(path)).lstrip(".")  # noqa: E731
    note_sync = lambda number: (steps.append(("sync", name(os.readlink(f"/proc/self/fd/{number}")))), fsync(number))  # noqa: E731
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append(("rename", name(paths[1]))), replace(*paths)))
    shards.write(0, [{"record": 0}], {})
    shards.join(tmp_path / "out.jsonl")
    files = [("part-000000.jsonl", "out.jsonl.parts"), ("000000.json", "done"), ("out.jsonl", tmp_path.name)]
    expected = [(act, at) for file, folder in files for act, at in (("sync", file), ("rename", file), ("sync", folder))]
    assert steps == [*expected, ("rename", "out.jsonl.parts.removed.unfinished")]


def test_notes_of_a_run_that_is_not_described_do_not_count(tmp_path):
    shards = Shards(tmp_path / "out", "jsonl", 10)
    shards.open({"data": "a"})
    shards.write(0, [], {})
    (shards.folder / ".done" / "run.json").unlink()
    shards.open({"data": "b"})
    assert shards.todo() == [0]


def test_a_parquet_shard_without_pairs_has_the_columns_of_one_with_pairs(tmp_path):
    shards = Shards(tmp_path / "out", "parquet", 128, PAIRS)
    shards.open({})
    pair = dict.fromkeys(PAIRS.names) | {"record": 1, "chosen": "a", "rejected": "b", "reward_margin": 1.0}
    for chunk, rows in enumerate(([], [pair])):
        shards.write(chunk, rows, {})
    empty, full = (parquet.read_table(shards.shard(chunk)) for chunk in (0, 1))
    assert empty.schema == full.schema
    (row,) = full.to_pylist()
    said = [row.pop(side)[0]["content"] for side in ("chosen", "rejected")]
    assert said == [pair.pop("chosen"), pair.pop("rejected")] and row == pair


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no scoring run"):
        Shards(tmp_path, "jsonl", 10).open({})


def test_a_fingerprint_sees_every_byte_of_the_data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(bytes(3 << 20))
    before = fingerprint([path])
    for place in (0, 1_500_000, (3 << 20) - 1):
        content = bytearray(3 << 20)
        content[place] = 1
        path.write_bytes(content)
        assert fingerprint([path]) != before
