"""Shards of a scoring run: done or not there, once however often they are written, of one run and no other."""

import json

import pytest

from mmrm_fast.shards import Shards, fingerprint


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
    for _ in range(2):
        Shards(tmp_path / "out", "jsonl", 10).open(identity)
    with pytest.raises(ValueError, match=f"other {name}; delete it or choose another --out"):
        Shards(tmp_path / "out", "jsonl", 10).open({**identity, name: "c"})


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    shards = Shards(tmp_path / "out", "jsonl", 10)
    shards.open({})
    (shards.folder / ".part-000000.jsonl.1.unfinished").write_text("{")
    shards.open({})
    assert [path.name for path in shards.folder.iterdir()] == [".done"]


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
