"""`mmrm-fast serve` as a user starts it: on loopback, with its token, and drained when it is told to end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from runs import descendants

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.cli import main
from mmrm_fast.client import RewardClient
from mmrm_fast.score.scorer import Scorer


@pytest.fixture
def model(make_checkpoint, tmp_path):
    save_checkpoint(tmp_path / "model", make_checkpoint())
    return tmp_path / "model"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(model, log, *options):
    """A server of its own; its process and URL."""
    port = str(free_port())
    command = [sys.executable, "-m", "mmrm_fast.cli", "serve", "--model", model, "--port", port, *options]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        while f"serving {model} on {url}" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, url
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, log.read_text()


def test_a_server_answers_by_the_token_and_drains_on_sigterm(model, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    responses = [f"{'two red circles ' * 10}{i}" for i in range(150)]
    body, headers = {"queries": "What?", "documents": responses}, {"authorization": "Bearer secret"}
    options = ["--token-file", tmp_path / "token", "--max-delay-ms", "5000"]
    with ThreadPoolExecutor(4) as pool:
        with serving(model, tmp_path / "log.txt", *options) as (_, url):
            assert httpx.post(f"{url}/score", json=body).status_code == 401
            assert re.search(r"float32, rewards within \de-\d\d whatever shares", (tmp_path / "log.txt").read_text())
            assert httpx.get(f"{url}/readyz").json() == {"status": "ready", "model": "model"}
            waiting = [pool.submit(httpx.post, f"{url}/score", json=body, headers=headers, timeout=60) for _ in "1234"]
            while "mmrm_requests_in_flight 5.0" not in httpx.get(f"{url}/metrics", headers=headers).text:
                assert not any(future.done() for future in waiting)
                time.sleep(0.05)
        answers = [future.result() for future in waiting]
    (expected,) = Scorer.from_pretrained(model, "cpu").score([{"prompt": "What?", "responses": responses}])
    for answer in answers:
        assert [item["score"] for item in answer.json()["data"]] == pytest.approx(expected, abs=1e-5)


def test_a_killed_replica_s_requests_are_refused_the_other_s_answered_and_replicas_come_back(model, tmp_path):
    body = {"queries": "What?", "documents": ["two", "red"]}
    (expected,) = Scorer.from_pretrained(model, "cpu").score([{"prompt": "What?", "responses": ["two", "red"]}])
    options = ["--replicas", "2", "--max-delay-ms", "5000"]
    with ThreadPoolExecutor(8) as pool, serving(model, tmp_path / "log.txt", *options) as (process, url):
        waiting = [pool.submit(httpx.post, f"{url}/score", json=body, timeout=60) for _ in range(8)]
        while "mmrm_requests_in_flight 9.0" not in httpx.get(f"{url}/metrics").text:
            assert not any(future.done() for future in waiting)
            time.sleep(0.05)
        os.kill(descendants(process.pid, "ray::ServeReplica")[0], signal.SIGKILL)
        answers = [future.result() for future in waiting]
        assert {answer.status_code for answer in answers} == {200, 503}
        for answer in answers:
            if answer.status_code == 200:
                assert [item["score"] for item in answer.json()["data"]] == pytest.approx(expected, abs=1e-5)
            else:
                assert "no replica answered" in answer.json()["error"]["message"]
        for replica in descendants(process.pid, "ray::ServeReplica"):
            os.kill(replica, signal.SIGKILL)
        while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
            time.sleep(0.1)
        assert RewardClient(url).score("What?", ["two", "red"]) == pytest.approx(expected, abs=1e-5)


def test_more_requests_than_queue_and_replica_hold_are_refused_with_a_reason_and_may_be_sent_again(model, tmp_path):
    body = {"queries": "What?", "documents": ["two", "red"]}
    options = ["--max-requests", "2", "--max-delay-ms", "100"]
    with ThreadPoolExecutor(64) as pool, serving(model, tmp_path / "log.txt", *options) as (_, url):
        answers = list(pool.map(lambda _: httpx.post(f"{url}/score", json=body, timeout=60), range(128)))
        expected = RewardClient(url).score("What?", ["two", "red"])
    assert {200, 503} <= {answer.status_code for answer in answers} <= {200, 429, 503}  # 503 is Ray's full queue
    for answer in answers:
        if answer.status_code == 200:
            assert [item["score"] for item in answer.json()["data"]] == pytest.approx(expected, abs=1e-5)
        else:
            assert answer.headers["retry-after"] == "1"
            assert "try again later" in answer.json()["error"]["message"]


def test_a_second_replica_starts_under_load(model, tmp_path):
    options = ["--max-replicas", "2", "--max-requests", "8", "--max-delay-ms", "50"]  # one replica per open request
    with ThreadPoolExecutor(4) as pool, serving(model, tmp_path / "log.txt", *options) as (process, url):
        client = RewardClient(url)
        while len(descendants(process.pid, "ray::ServeReplica")) < 2:  # Ray waits 30 s for the load to last
            answers = list(pool.map(lambda _: client.score("What?", ["two", "red"]), range(16)))
            assert answers == [pytest.approx(answers[0], abs=1e-5)] * 16


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--image-root", "/nowhere"], "no such folder"),
        (["--token-file", "/dev/null"], "the token file is empty"),
        (["--replicas", "2", "--max-replicas", "1"], "--max-replicas"),
    ],
)
def test_what_cannot_work_is_refused_at_once(model, options, reason, capsys):
    assert main(["serve", "--model", str(model), *options]) == 2
    assert reason in capsys.readouterr().err
