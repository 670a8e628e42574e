"""`mmrm-fast serve` as a user starts it: its token, its limits, its replicas killed and added, drained when it ends.

One server for all of it: it takes half a minute to start and to end on a busy machine. The last test ends it.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import grpc
import httpx
import pytest
from runs import descendants, listening, wait_until

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.cli import main
from mmrm_fast.client import RewardClient
from mmrm_fast.config import ServeConfig
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.serve import command

MAX_REQUESTS = 8  # of a replica; under load it asks for another with one request in flight
BODY = {"queries": "What?", "documents": [f"{'two red circles ' * 10}{i}" for i in range(400)]}  # seen in flight

pytestmark = pytest.mark.xdist_group("serve")


@dataclass(frozen=True)
class Server:
    """A running server, its client and what it should answer to BODY."""

    process: subprocess.Popen
    client: httpx.Client
    log: Path
    expected: list[float]

    def ask(self, _=None):
        return self.client.post("/score", json=BODY)

    def replicas(self):
        return descendants(self.process.pid, "ray::ServeReplica")

    @contextmanager
    def held(self):
        """Meanwhile the replicas stand still, and requests wait."""
        replicas = self.replicas()
        try:
            for replica in replicas:
                os.kill(replica, signal.SIGSTOP)
            yield
        finally:
            for replica in replicas:
                os.kill(replica, signal.SIGCONT)

    def check(self, answer):
        """The rewards of an answer are the scorer's."""
        assert [item["score"] for item in answer.json()["data"]] == pytest.approx(self.expected, abs=1e-5)

    def in_flight(self):
        """Requests at work."""
        (number,) = re.findall(r"^mmrm_requests_in_flight (\d+)", self.client.get("/metrics").text, flags=re.M)
        return int(number)


@pytest.fixture(scope="module")
def model(make_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "model"
    save_checkpoint(folder, make_checkpoint())
    return folder


@pytest.fixture(scope="module")
def server(model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    token, log = model.parent / "token", model.parent / "log.txt"
    token.write_text("secret\n")
    options = {"model": model, "port": url.rpartition(":")[2], "token-file": token, "max-replicas": 2,
               "max-requests": MAX_REQUESTS}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "mmrm_fast.cli", "serve", *arguments]
    headers = {"authorization": "Bearer secret"}
    (expected,) = Scorer.from_pretrained(model, "cpu").score([{"prompt": "What?", "responses": BODY["documents"]}])
    with (
        started(command, log) as process,
        httpx.Client(base_url=url, headers=headers, timeout=120) as client,
    ):
        server = Server(process, client, log, expected)
        wait_until(lambda: f"serving {model} on {url}" in log.read_text() or process.poll() is not None, log.read_text)
        yield server


@contextmanager
def started(command, log):
    """A process that is told to end, and killed if it does not."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    finally:
        process.kill()


def test_a_server_answers_by_its_token_and_says_what_it_is(server):
    assert httpx.post(server.client.base_url.join("/score"), json=BODY).status_code == 401
    assert server.client.get("/readyz").json() == {"status": "ready", "model": "model"}
    assert re.search(r"float32, rewards within \de-\d\d whatever shares", server.log.read_text())


def test_more_requests_of_one_address_than_half_the_places_are_refused_with_a_reason_and_may_be_sent_again(server):
    with ThreadPoolExecutor(64) as pool:
        with server.held():
            waiting = [pool.submit(server.ask) for _ in range(64)]
            wait_until(lambda: sum(future.done() for future in waiting) == 64 - MAX_REQUESTS, "not refused")
        answers = [future.result() for future in waiting]
    assert Counter(answer.status_code for answer in answers) == {200: MAX_REQUESTS, 429: 64 - MAX_REQUESTS}
    for answer in answers:
        if answer.status_code == 200:
            server.check(answer)
        else:
            assert answer.headers["retry-after"] == "1"
            assert "try again later" in answer.json()["error"]["message"]


def test_everything_that_it_starts_listens_on_this_machine_alone(server):
    """All but one port of each replica, which Ray Serve gives no choice of and which asks for Ray's token."""
    found = listening(server.process.pid)
    elsewhere = [(pid, port) for pid, address, port in found if address != "127.0.0.1"]
    assert len(found) > 5 and [pid for pid, _ in elsewhere] == server.replicas(), found
    with grpc.insecure_channel(f"127.0.0.1:{elsewhere[0][1]}") as channel:
        for method in ("HandleRequest", "HandleRequestWithRejection"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/ray.serve.ASGIService/{method}")(b"", timeout=30)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def wait_for_two(server):
    """Wait for a second replica under load; every answer is right."""
    with ThreadPoolExecutor(4) as pool:
        with server.held():
            waiting = [pool.submit(server.ask) for _ in range(4)]
            wait_until(lambda: len(server.replicas()) == 2, "one replica")
        for future in waiting:
            server.check(future.result())


def test_a_second_replica_starts_under_load(server):
    wait_for_two(server)


def test_a_killed_replica_s_requests_are_refused_the_other_s_answered_and_replicas_come_back(server):
    wait_for_two(server)
    counts = Counter()

    def kill_one_at_work():
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            waiting = [pool.submit(server.ask) for _ in range(MAX_REQUESTS)]
            wait_until(lambda: server.in_flight() == len(waiting) or any(w.done() for w in waiting), "not in flight")
            os.kill(server.replicas()[0], signal.SIGKILL)
            answers = [future.result() for future in waiting]
        counts.update(answer.status_code for answer in answers)
        for answer in answers:
            if answer.status_code == 200:
                server.check(answer)
            elif answer.status_code == 503:
                assert "no replica answered" in answer.json()["error"]["message"]
        return {200, 503} <= set(counts)

    wait_until(kill_one_at_work, counts)
    assert set(counts) <= {200, 429, 503}
    for replica in server.replicas():
        os.kill(replica, signal.SIGKILL)
    wait_until(lambda: server.client.get("/readyz").status_code == 200, "no replica is ready")
    client = RewardClient(str(server.client.base_url), token="secret")
    assert client.score("What?", BODY["documents"]) == pytest.approx(server.expected, abs=1e-5)


def test_a_server_drains_on_sigterm(server):
    with ThreadPoolExecutor(4) as pool:
        with server.held():
            waiting = [pool.submit(server.ask) for _ in "1234"]
            wait_until(lambda: server.in_flight() == 4, "not in flight")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "draining" in server.log.read_text(), server.log.read_text)
        for future in waiting:
            server.check(future.result())
    assert server.process.wait(timeout=120) == 0, server.log.read_text()


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


def test_why_no_replica_starts_is_said_in_the_replica_s_own_words(model, monkeypatch):
    """Of a model that fills its GPUs: Ray Serve itself says that the deployments were not updated."""
    told = "Error:\n  raise RuntimeError()\nRuntimeError: Traceback\nValueError: final: its weights take 143.7 GiB\n"
    application = SimpleNamespace(deployments={"reward": SimpleNamespace(message=told)})
    monkeypatch.setattr(command.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
    for name, answer in {"start": None, "status": SimpleNamespace(applications={command.APP: application})}.items():
        monkeypatch.setattr(command.ray_serve, name, lambda *_, answer=answer, **options: answer)
    monkeypatch.setattr(command.ray_serve, "run", Mock(side_effect=RuntimeError("Failed to update")))
    with pytest.raises(ValueError, match=r"no replica starts: final: its weights take 143\.7 GiB$"):
        command.start_replicas(ServeConfig(model=model, gpus_per_actor=2))
    with pytest.raises(ValueError, match="2 replicas with 2 GPUs each: the cluster has 2; lower --replicas or --gpus"):
        command.start_replicas(ServeConfig(model=model, gpus_per_actor=2, replicas=2))
    with pytest.raises(ValueError, match=r"--gpus-per-actor 1\.5: expected a whole number"):
        command.start_replicas(ServeConfig(model=model, gpus_per_actor=1.5))
