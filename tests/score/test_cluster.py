"""A Ray of our own: no other machine reaches it, nothing of it outlives the process that started it; where it cannot
start, the error says what it lacks and what it needs."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import ray
from runs import listening, wait_until

from mmrm_fast.score.cluster import ray_cluster
from mmrm_fast.score.watchdog import of_session

CODE = """
import os, time, ray
from mmrm_fast.score.cluster import ray_cluster
with ray_cluster():
    niceness = ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0)
    print(ray._private.worker.global_worker.node.get_session_dir_path(), niceness, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=-1, stderr=-1, text=True) as process:
        yield process
        process.kill()


def test_it_listens_on_this_machine_alone_and_what_a_kill_leaves_of_it_is_ended_by_name(process):
    session, _, niceness = process.stdout.readline().strip().partition(" ")
    assert niceness == "0", process.stderr.read()  # what it runs is no background work
    found = listening(process.pid)
    assert len(found) > 5 and {"127.0.0.1"} == {address for _, address, _ in found}, found
    assert len(of_session(session)) > 3
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: not of_session(session), lambda: of_session(session), seconds=60)
    said = process.stderr.read()  # the watchdog's, until it ends
    assert f"process {process.pid} was killed; ended what it left of Ray: " in said


HANGS = """
import psutil
from mmrm_fast.score import cluster
cluster.SECONDS_TO_END = 1.0
with cluster.ray_cluster():
    servers = [child for child in psutil.Process().children(recursive=True) if child.name() == "gcs_server"]
    servers[0].suspend()
print("ended")
"""


def test_a_server_of_rays_that_hangs_holds_no_run_at_its_end():
    done = subprocess.run([sys.executable, "-c", HANGS], timeout=120, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("ended\n", 0), done.stderr


def fails_to_start(variables, reason):
    os.environ.update(variables)
    with pytest.raises(OSError, match=rf"Ray does not start: (?s:.*){reason}(?s:.*)\nRay needs a HOME"), ray_cluster():
        pass


PLACES = {
    "a long RAY_TMPDIR": ({"RAY_TMPDIR": "TMP/" + "x" * 90}, "path length cannot exceed 107 bytes"),
    "a HOME that cannot be made": ({"HOME": "/proc/none"}, "/proc/none"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_machine_on_which_ray_does_not_start_is_told_what_it_lacks(tmp_path, place):
    variables, reason = PLACES[place]
    variables = {name: value.replace("TMP", str(tmp_path)) for name, value in variables.items()}
    process = multiprocessing.get_context("spawn").Process(target=fails_to_start, args=(variables, reason))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_whatever_ray_does_not_find_is_said(monkeypatch):
    def init(**options):
        raise FileNotFoundError(2, "No such file or directory", "/dev/shm")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(OSError, match=r"Ray does not start: .*/dev/shm'\nRay needs a HOME"),
        ray_cluster(),
    ):
        pass
