"""What is written is whole or not there, whatever ends the writer."""

import errno
import fcntl
import json
import multiprocessing
import os
import platform
import signal
from contextlib import nullcontext

import pytest

from mmrm_fast.files import json_lines, locked, read_json, recover, whole_file, whole_folder, write_json


def test_a_file_takes_the_place_of_the_one_before_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write("after" + 10_000 * "x")
        1 / 0  # noqa: B018
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with whole_file(path, "wb") as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_appears_when_it_is_whole(tmp_path, replace):
    path = tmp_path / "new" / "run"
    with pytest.raises(ZeroDivisionError), whole_folder(path, replace=replace) as folder:
        (folder / "a").write_text("half")
        1 / 0  # noqa: B018
    assert not any(path.parent.iterdir())
    with whole_folder(path, replace=replace) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "a").write_text("whole")
        assert not path.exists()
    assert (path / "inside" / "a").read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_only_where_that_is_asked_for(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "old").write_text("")
    with pytest.raises(FileExistsError, match="run exists and is not empty"), whole_folder(path):
        pass
    with whole_folder(path, replace=True) as folder:
        (folder / "new").write_text("")
        assert (path / "old").exists()
    assert [inside.name for inside in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def write_and_die(folder):
    with whole_folder(folder / "run") as run, whole_file(folder / "a.txt") as file:
        (run / "part").write_text("half")
        file.write("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_leaves_is_hidden_and_can_be_removed(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2 and all(left.name.startswith(".") for left in tmp_path.iterdir())
    recover(tmp_path, "a.txt")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".run.")
    recover(tmp_path)
    assert not any(tmp_path.iterdir())


def replace_and_die(path, rename):
    renames, rename_now = iter(range(rename)), os.replace

    def replace(*paths):
        if next(renames, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename_now(*paths)

    os.replace = replace
    with whole_folder(path, replace=True) as folder:
        (folder / "new").write_text("")


@pytest.mark.parametrize("rename", [0, 1], ids=["before both renames", "between them"])
def test_a_folder_that_is_being_replaced_by_a_process_that_is_killed_comes_back(tmp_path, rename):
    path = tmp_path / "run"
    path.mkdir()
    (path / "old").write_text("")
    process = multiprocessing.get_context("fork").Process(target=replace_and_die, args=(path, rename))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and path.exists() == (rename == 0)
    recover(tmp_path)
    assert [inside.name for inside in path.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [path]


def hold(folder, told, go_on):
    """In a child: hold a folder, with a fork that outlives it, until nobody has the other end of `go_on`."""
    with locked(folder):
        if os.fork():
            os.write(told, b"x")
        os.read(go_on, 1)
        os._exit(0)


def test_a_locked_folder_is_refused_by_the_name_of_its_process_until_that_has_died(tmp_path):
    folder, (telling, told), (go_on, end) = tmp_path / "run", os.pipe(), os.pipe()
    holder = os.fork()
    if not holder:
        os.close(end)
        hold(folder, told, go_on)
    assert os.read(telling, 1) == b"x"
    refusal = rf"run: process {holder} on {platform.node()} is at work there"
    with pytest.raises(ValueError, match=refusal), locked(folder):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with locked(folder):  # though its fork lives
        assert (folder / ".lock").read_text() == f"{platform.node()} {os.getpid()}\n"
    os.close(end)
    assert not any(folder.iterdir())


OWNERS = [("HERE 4194305", False), ("HERE PARENT", True), ("elsewhere 1", True), ("", False)]


@pytest.mark.parametrize(("owner", "is_taken"), OWNERS)
def test_where_a_file_system_has_no_locks_an_owner_that_is_gone_is_told_from_one_that_may_live(
    tmp_path, monkeypatch, owner, is_taken
):
    def nothing(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", nothing)
    owner = owner.replace("HERE", platform.node()).replace("PARENT", str(os.getppid()))
    (tmp_path / ".lock").write_text(owner)
    with pytest.raises(ValueError, match="is at work there") if is_taken else nullcontext(), locked(tmp_path):
        pass


def test_a_lock_leaves_no_folder_that_was_not_there(tmp_path):
    with locked(tmp_path / "runs" / "a"):
        pass
    with locked(tmp_path / "b"):
        (tmp_path / "b" / "mine").write_text("")
    with locked(tmp_path / "b"):
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["b", "b/mine"]


def test_json_has_no_number_that_json_does_not_have(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": (float("-inf"),)})
    written = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert written == {"a": [None, 1.5], "b": [None]}


def test_json_lines_are_objects_with_where_they_stand(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(json_lines(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]


@pytest.mark.parametrize(("line", "reason"), [('{"a": ', "not valid JSON"), ("[1]", "a row is a JSON object")])
def test_a_line_that_is_no_object_is_named(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {reason}"):
        list(json_lines(path))


def test_lines_that_a_killed_process_or_a_disk_has_broken_are_left_out_and_told_of(tmp_path):
    path, told = tmp_path / "rows.jsonl", []
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": 2}\n\0\0\0\n{"a": ')
    assert [row for _, row in json_lines(path, left_out=told.append)] == [{"a": 1}, {"a": 2}]
    assert [line.removeprefix(f"{path}:")[0] for line in told] == ["2", "4", "5"]


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
