"""`mmrm-fast serve` as a user starts it: on loopback, with its token, and drained when it is told to end."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mmrm_fast.cli import main
from mmrm_fast.scorer import Scorer
from mmrm_fast.weights import save_checkpoint


@pytest.fixture
def model(make_checkpoint, tmp_path):
    save_checkpoint(tmp_path / "model", make_checkpoint())
    return tmp_path / "model"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_answers_by_the_token_and_drains_on_sigterm(model, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    port = free_port()
    options = ["--model", model, "--port", str(port), "--token-file", tmp_path / "token", "--replicas", "1"]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmrm_fast.cli", "serve", *options], stdout=file, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    while f"serving {model} on {url}" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    responses = [f"{'two red circles ' * 10}{i}" for i in range(150)]
    body, headers = {"queries": "What?", "documents": responses}, {"authorization": "Bearer secret"}
    assert httpx.post(f"{url}/score", json=body).status_code == 401
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready", "model": "model"}
    assert "mmrm_requests_total" in httpx.get(f"{url}/metrics", headers=headers).text

    ask = lambda _: httpx.post(f"{url}/score", json=body, headers=headers, timeout=60)  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, None) for _ in range(4)]
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in waiting]
    assert process.wait(timeout=60) == 0, log.read_text()
    (expected,) = Scorer.from_pretrained(model, "cpu").score([{"prompt": "What?", "responses": responses}])
    for answer in answers:
        assert [item["score"] for item in answer.json()["data"]] == pytest.approx(expected, abs=1e-5)


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
