"""The same pair twice: told, and trained on once, whatever the ranks and however often the run was interrupted."""

import json

import pytest
from ranks import run_ranks
from runs import losses, mixed_records, read

from mmrm_fast.config_file import with_options
from mmrm_fast.train.command import train

COPIED = "2 records have the same prompt, images and pairs as others (left out, --duplicates keep trains on them)"
OPPOSED = "2 records have the pairs of others the other way round (kept), such as "


@pytest.fixture
def twice(make_config, write_jsonl, pictures):
    """A config whose second file has copies of two records of the first, one with an id, and one turned round."""
    first = mixed_records(pictures)
    turned = {**first[1], "chosen": first[1]["rejected"], "rejected": first[1]["chosen"]}
    data = [
        write_jsonl(first, "first.jsonl"),
        write_jsonl([first[2], {**first[-1], "id": "x"}, turned], "second.jsonl"),
    ]

    def make(name, **options):
        files = {"data": tuple(map(str, data)), "eval": (), "report_to": ()}
        return make_config(name, **{**files, **options})

    return make


@pytest.mark.parametrize("options", [{}, {"check_records": 0}, {"pairs": "expand"}, {"num_workers": 1}], ids=str)
def test_copies_are_told_and_not_trained_on(twice, options, write_jsonl, capsys):
    config = twice("twice", **options)
    folder = train(config)
    out = capsys.readouterr().out
    first, second = config.records.data
    assert f"{COPIED}, such as {second}:1 and {first}:3\n" in out
    assert f"{OPPOSED}{first}:2 and {second}:3\n" in out
    assert "2 copies of other records, see skipped.jsonl" in out
    rows = [(row["source"], row["reason"]) for row in read(folder / "skipped.jsonl")]
    assert rows == [(f"{second}:1", f"a copy of {first}:3"), (f"{second}:2", f"a copy of {first}:11")]
    third = write_jsonl(read_lines(second)[2:], "third.jsonl")
    assert losses(train(twice("once", data=(first, str(third)), **options))) == losses(folder)


def read_lines(path):
    with open(path) as file:
        return file.read().splitlines()


def test_copies_are_trained_on_where_that_is_asked_for(twice, capsys):
    folder = train(twice("keep", duplicates="keep"))
    assert sum(row["records"] for row in read(folder / "metrics.jsonl")) == 14
    assert "2 records have the same prompt, images and pairs as others (kept)" in capsys.readouterr().out


def test_files_of_a_mixture_may_have_copies_of_each_other_but_not_of_themselves(twice, write_jsonl, capsys):
    first, second = twice("any").records.data
    double = write_jsonl(read_lines(second)[:1] * 2, "double.jsonl")
    folder = train(twice("mixture", data=(f"{first}:1", f"{double}:1")))
    assert sum(row["records"] for row in read(folder / "metrics.jsonl")) == 12
    assert f"{COPIED.replace('2', '1')}, such as {double}:2 and {double}:1" in capsys.readouterr().out


@pytest.mark.parametrize(("duplicates", "pairs"), [("drop", 18), ("keep", 22)])
def test_copies_are_on_no_side_of_what_is_held_out(twice, duplicates, pairs):
    folder = train(twice("held", eval_fraction=0.4, duplicates=duplicates))
    held_out = json.loads((folder / "results.json").read_text())["held-out"]["pairs"]
    assert sum(row["pairs"] for row in read(folder / "metrics.jsonl")) + held_out == pairs


def test_a_resumed_run_leaves_out_what_the_run_left_out(twice):
    config = twice("run", save_every=2, keep=100, epochs=2)
    whole = losses(train(config))
    start = config.run.output_dir / "checkpoints" / "step-00000002"
    assert losses(train(with_options(config, resume=str(start)))) == whole
    assert len(read(config.run.output_dir / "skipped.jsonl")) == 2


def test_two_ranks_leave_out_the_same(twice):
    one, two = train(twice("one")), twice("two")
    assert run_ranks(train, two) == [0, 0]
    assert losses(two.run.output_dir) == pytest.approx(losses(one), abs=1e-4)
    assert read(two.run.output_dir / "skipped.jsonl") == read(one / "skipped.jsonl")
