"""Batch scoring on Ray: every line of input ends as scores or as a named error, once, in order, whoever is killed.

One Ray for all of it, which ends with it: what forks later has no part in it.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import ray
from PIL import Image
from runs import descendants, wait_until

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.cli import main
from mmrm_fast.data.records import RecordError
from mmrm_fast.score.cluster import LOOPBACK, ray_cluster
from mmrm_fast.score.command import ScoringActor, actor_starts
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.score.shards import RECORDS_PER_CHUNK

pytestmark = pytest.mark.xdist_group("score")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """The address of a cluster that runs in this process join."""
    with ray_cluster():
        yield ray.get_runtime_context().gcs_address


def test_scoring_a_file(scoring, capsys, monkeypatch):
    folder, data, good = scoring
    out = folder / "out.jsonl"
    monkeypatch.chdir(folder)  # the actors work elsewhere
    assert main(["score", "--model", "model", "--data", data.name, "--out", out.name, "--actors", "1"]) == 3
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["record"], row["response_index"]) for row in rows] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (3, 0),
        (4, 0),
        (4, 1),
    ]
    assert list(rows[0]) == ["id", "record", "response_index", "prompt", "img_path", "response", "score", "truncated"]
    assert [row["id"] for row in rows] == ["a"] * 4 + [None] + ["7"] * 2
    assert [row["truncated"] for row in rows] == [False, False, False, True, False, False, False]
    assert rows[0]["img_path"] == "photo.png" and rows[4]["response"] == "naïve 图 😀"
    assert rows[0]["score"] == rows[2]["score"] != rows[1]["score"]

    record = {**good[0], "img_path": str(folder / "photo.png")}
    (rewards,) = Scorer.from_pretrained(folder / "model", device="cpu").score([record])
    assert [row["score"] for row in rows[:4]] == pytest.approx(rewards, abs=1e-5)

    errors = [json.loads(line) for line in (folder / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [error["source"].rsplit(":")[-1] for error in errors] == ["2", "3"]
    assert [(error["record"], error["error"]) for error in errors] == [(1, "RecordError"), (2, "RecordError")]
    assert not (folder / "out.jsonl.parts").exists()
    printed = capsys.readouterr().out
    assert "records.jsonl: 5 records, 3 with pictures, 1 without, 1 that cannot be used; read: " in printed
    assert "3 of 5 records scored" in printed and "records.jsonl:2" in printed and "empty.png" in printed


def test_what_keeps_a_process_from_its_model_is_said_once_and_another_model_may_follow(
    scoring, capsys, monkeypatch, request
):
    class Refused(ScoringActor):
        def load(self):
            raise ValueError(f"{self.config.model}: no `score.weight`: this is not a reward model, train one first")

    folder, data, _ = scoring
    arguments = ["score", "--model", str(folder / "model"), "--data", str(data), "--out", str(folder / "out.jsonl")]
    monkeypatch.setattr("mmrm_fast.score.command.ScoringActor", Refused)
    assert main(arguments) == 2
    message = f"mmrm-fast score: {folder / 'model'}: no `score.weight`: this is not a reward model, train one first"
    assert message in capsys.readouterr().err.splitlines()
    monkeypatch.undo()
    request.getfixturevalue("without_ray")
    assert main([*arguments, "--max-length", "128"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--actors", "0"], "--actors must be auto or at least 1, got 0"),
        (["--gpus-per-actor", "1"], "1 actors with 1 GPUs each: the cluster has 0"),
        (["--out", "records.jsonl"], "is one of the files to be scored"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_data_is_left_alone(scoring, capsys, monkeypatch, options, message):
    folder, data, _ = scoring
    monkeypatch.chdir(folder)
    before = data.read_bytes()
    assert main(["score", "--model", "model", "--data", "records.jsonl", "--out", "out.jsonl", *options]) == 2
    assert message in capsys.readouterr().err and data.read_bytes() == before


def test_a_record_that_kills_its_process_is_listed_and_the_rest_is_scored(
    make_checkpoint, tmp_path, monkeypatch, capsys
):
    class Constant:
        """A scorer that loads nothing: five processes come and go."""

        def score_groups(self, groups):
            return [
                group
                if isinstance(group, RecordError)
                else Scored(group, (1.0,), (False,), num_tokens=1, num_tokens_unshared=1)
                for group in groups
            ]

    class Mortal(ScoringActor):
        """Dies over a certain record, as inside a broken decoder."""

        def load(self):
            self.scorer = Constant()

        def groups(self, positions, fatal):
            found = super().groups(positions, fatal)
            if any(getattr(group, "id", None) == "poison" for group in found):
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    monkeypatch.setattr("mmrm_fast.score.command.ScoringActor", Mortal)
    save_checkpoint(tmp_path / "model", make_checkpoint(max_length=256))
    rows = [{"id": "poison" if i == 65 else str(i), "prompt": "p", "responses": ["a"]} for i in range(66)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--actors", "1"]
    assert main(["score", *arguments, "--out", str(tmp_path / "out.jsonl")]) == 3
    scores = [json.loads(line)["record"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert scores == list(range(65))
    assert "rows.jsonl:66: its process died twice" in capsys.readouterr().out


# killed at any moment


NUM_RECORDS, NUM_RESPONSES = 450, 4
LAST = NUM_RECORDS // RECORDS_PER_CHUNK  # chunk
MISSED_SOON = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2"}  # a node that is gone
ELSEWHERE = {"RAY_ADDRESS": "127.0.0.1:1"}  # a cluster that no run joins unasked


def hold_the_last_note(pids, out):
    """The processes that score, so that none ends the run: who writes the last chunk's note waits for a reader."""
    for pid in pids:
        note = out.with_name(out.name + ".parts") / ".done" / f".{LAST:06d}.json.{pid}.unfinished"
        if not note.exists() and note.parent.is_dir():
            os.mkfifo(note)
    return pids


def kill_when(condition, what, root, out, victims=lambda actors: actors):
    """Kill when a condition of the shards' folder is met, by default the actors below a process; they end no run."""

    def at_work():
        assert not out.exists(), "ended before it was killed"
        actors = hold_the_last_note(descendants(root, "ray::ScoringActor"), out)
        return actors if condition(out.with_name(out.name + ".parts")) and actors else None

    for pid in victims(wait_until(at_work, what, every=0.02)):
        os.kill(pid, signal.SIGKILL)


def rows_without_a_note(parts):
    """Whether the last chunk's rows are written and nobody says so."""
    return (parts / f"part-{LAST:06d}.jsonl").exists() and not (parts / ".done" / f"{LAST:06d}.json").exists()


def test_a_run_killed_again_and_again_has_every_response_exactly_once(cluster, make_checkpoint, tmp_path):
    """First its driver, of a cluster that lives on, then all of its node, then its actors between rows and note."""
    save_checkpoint(tmp_path / "model", make_checkpoint(max_length=256))
    responses = [["same", "same", "", f"number {i}"] for i in range(NUM_RECORDS)]
    with open(tmp_path / "records.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": "What?", "responses": own}) + "\n" for own in responses)
    out = tmp_path / "out.jsonl"
    arguments = ["score", "--model", tmp_path / "model", "--data", tmp_path / "records.jsonl", "--out", out]
    arguments = [*map(str, arguments), "--actors"]

    def killed(count, *options):
        command, log = [sys.executable, "-m", "mmrm_fast.cli", *arguments, *options], tmp_path / "log.txt"
        environment = os.environ | MISSED_SOON | ELSEWHERE | LOOPBACK  # the last, to join what listens there alone
        with open(log, "a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

        def enough_is_done(parts):
            assert process.poll() is None, f"ended before it was killed: {log.read_text()}"
            return len(list((parts / ".done").glob("0*.json"))) >= count

        if "--address" in options:
            kill_when(enough_is_done, log.read_text, os.getpid(), out, lambda actors: [process.pid])
        else:  # the raylet first: it would start a killed actor again
            raylet = partial(descendants, process.pid, "raylet/raylet")
            kill_when(enough_is_done, log.read_text, process.pid, out, lambda actors: raylet() + actors)
        assert process.wait(timeout=120) != 0 and not out.exists(), log.read_text()

    killed(1, "2", "--address", cluster)
    wait_until(lambda: not descendants(os.getpid(), "ray::ScoringActor"), "a dead driver's actors live on")
    killed(5, "1")
    with ThreadPoolExecutor(1) as pool:
        rows = pool.submit(kill_when, rows_without_a_note, "the last chunk is not written", os.getpid(), out)
        assert main([*arguments, "1"]) == 0
        rows.result()

    rows = [json.loads(line) for line in out.read_text().splitlines()]
    places = itertools.product(range(NUM_RECORDS), range(NUM_RESPONSES))
    assert [(row["record"], row["response_index"]) for row in rows] == list(places)
    assert [row["response"] for row in rows] == [response for own in responses for response in own]
    sample = range(0, NUM_RECORDS, 60)
    records = [{"prompt": "What?", "responses": responses[record]} for record in sample]
    for record, rewards in zip(sample, Scorer.from_pretrained(tmp_path / "model", "cpu").score(records), strict=True):
        got = [row["score"] for row in rows[record * NUM_RESPONSES : (record + 1) * NUM_RESPONSES]]
        assert got == pytest.approx(rewards, abs=1e-5)


# good and bad


def write_pictures(folder):
    """Pictures of all kinds."""
    Image.new("RGB", (60, 60), "red").save(folder / "good.png")
    content = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")
    Image.new("CMYK", (60, 60)).save(folder / "cmyk.jpg")
    Image.new("I;16", (60, 60)).save(folder / "deep.png")


KINDS = [  # a record or a line, and whether it gets scores
    ({"prompt": "p", "responses": ["a", "b"]}, True),
    ({"prompt": "p", "img_path": "good.png", "responses": ["a"]}, True),
    ({"prompt": "p", "img_path": "cmyk.jpg", "responses": ["", "naïve 图 😀"]}, True),
    ({"prompt": "p", "img_path": "deep.png", "responses": ["long " * 20_000]}, True),
    ({"prompt": "p", "img_path": "cut.png", "responses": ["a"]}, False),
    ({"prompt": "p", "img_path": "empty.png", "responses": ["a"]}, False),
    ({"prompt": "p", "img_path": "text.png", "responses": ["a"]}, False),
    ({"prompt": "p", "img_path": "none.png", "responses": ["a"]}, False),
    ({"prompt": "p", "img_path": "huge.png", "responses": ["a"]}, False),
    ({"prompt": "p", "img_path": 5, "responses": ["a"]}, False),
    ({"prompt": "p", "responses": []}, False),
    ({"prompt": "p" * 10_000, "responses": ["a"]}, False),
    ({"responses": ["a"]}, False),
    ("{", False),
    ("\x00", False),
    ("[]", False),
]


@pytest.fixture
def an_actor_that_never_starts(monkeypatch):
    """Beside those that do: no chunk may wait for it."""
    nowhere = ray.remote(resources={"a machine that is not there": 1})(ScoringActor)
    more = lambda config, shards, count: [  # noqa: E731
        partial(nowhere.remote, config, shards, num_threads=1), *actor_starts(config, shards, count)
    ]  # fmt: skip
    monkeypatch.setattr("mmrm_fast.score.command.actor_starts", more)


@pytest.mark.usefixtures("an_actor_that_never_starts")
def test_good_and_bad_records_are_all_accounted_for(make_checkpoint, tmp_path):
    save_checkpoint(tmp_path / "model", make_checkpoint(max_length=256))
    write_pictures(tmp_path)
    chosen = [KINDS[0 if i % 3 else i // 3 % len(KINDS)] for i in range(NUM_RECORDS)]
    lines = [record if isinstance(record, str) else json.dumps(record) for record, _ in chosen]
    (tmp_path / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "records.jsonl"), "--out", str(out)]
    assert main(["score", *arguments]) == 3
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    errors = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    expected = [(i, j) for i, (record, good) in enumerate(chosen) if good for j in range(len(record["responses"]))]
    assert [(row["record"], row["response_index"]) for row in rows] == expected
    assert [error["record"] for error in errors] == [i for i, (_, good) in enumerate(chosen) if not good]
    assert all(error["reason"] and error["error"] == "RecordError" for error in errors)
