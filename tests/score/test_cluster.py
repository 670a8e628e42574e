"""Where Ray cannot start, the error says what it lacks and what it needs."""

import multiprocessing
import os

import pytest
import ray

from mmrm_fast.score.cluster import ray_cluster


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
