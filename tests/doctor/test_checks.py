"""`doctor --cpu` on two ranks: what of `doctor --gpu` needs no GPU; what fails, raises, hangs or cannot be done."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from ranks import run_ranks

from mmrm_fast.cli import main
from mmrm_fast.doctor import checks, kernels, ranks, rewards, training
from mmrm_fast.doctor.checks import Check, Found, judged, left_out, outcome

CPU = torch.device("cpu")
LEFT_OUT = {"MFU of decoder layers that these predict"}
MEASURED = {
    "robust steps on one rank, float32", "robust steps on one rank, bfloat16", "robust steps on all ranks",
    "matrix product", "copy", "decoder layer, forward and backward", "loader; what a GPU takes",
    "all-gather of a decoder layer; what its time hides",
}  # fmt: skip


def doctor(path):
    """The command on a rank, in a process of its own."""
    checks.watched = ranks.watched = lambda *about: nullcontext()  # this machine may be busy
    kernels.HEAD_SIZES, kernels.NODES, ranks.reward_checks = (64,), (1, 3), lambda device: ()
    raise SystemExit(main(["doctor", "--cpu", "--json", str(path)]))


def test_what_needs_no_gpu_passes_on_two_ranks(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ranks.TIMEOUT_SECONDS", 600)
    assert run_ranks(doctor, tmp_path / "doctor.json") == [0, 0]
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert [own["machine"]["host"] for own in written] == [os.uname().nodename] * 2
    for own in written:
        found = {name: Found(**came) for name, came in own["checks"].items()}
        assert {name for name, came in found.items() if came.passed is None} == LEFT_OUT | MEASURED
        assert all(came.passed for name, came in found.items() if name not in LEFT_OUT | MEASURED)
        assert all(found[name].figure > 0 for name in MEASURED) and all(found[name].note for name in LEFT_OUT)
    (count,) = re.findall(
        r"^(\d+) passed, 0 failed, (\d+) measured or left out; ranks: 2$", capfd.readouterr().out, re.MULTILINE
    )
    assert sum(map(int, count)) == len(found) and not list(tmp_path.glob("doctor-*"))


def test_packed_rewards_and_gradients_are_those_of_padded_ones():
    found = {check.name: check.run() for check in rewards.reward_checks(CPU)}
    assert len(found) == 5 and all(came.passed for came in found.values()), found


def test_without_a_gpu_it_refuses_with_a_remedy(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor", "--gpu"]) == 2
    said = capsys.readouterr().err
    assert "mmrm-fast doctor: --gpu: " in said and "install" in said and "`mmrm-fast doctor --cpu`" in said
    assert main(["doctor", "--gpu", "--cpu"]) == 2 and "one of the two" in capsys.readouterr().err


def raises():
    raise RuntimeError("no kernel image")


def test_a_check_that_fails_or_raises_stops_no_other_and_is_told():
    found = {
        name: outcome(Check(name, run), 0)
        for name, run in {
            "over": lambda: judged(2.0, 1.0),
            "NaN": lambda: judged(float("nan"), 1.0),
            "raises": raises,
            "absent": lambda: left_out("there is one GPU"),
            "fine": lambda: judged(0.5, 1.0),
        }.items()
    }
    assert [came.passed for came in found.values()] == [False, False, False, None, True]
    *rows, count = ranks.lines([found, found | {"fine": judged(3.0, 1.0)}])
    assert "rank 0: RuntimeError: no kernel image; rank 1: RuntimeError" in rows[3]
    assert (
        "FAIL" in rows[5] and "0.5 to 3" in rows[5] and count == "0 passed, 4 failed, 1 measured or left out; ranks: 2"
    )


HANG = """
import time
from mmrm_fast.doctor.checks import watched
with watched("rank 3: a check that hangs", 0.1, grace=0.1):
    time.sleep(600)
"""


def test_a_hang_ends_the_process_with_the_name_of_the_check_and_the_stacks():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "rank 3: a check that hangs: not done after 0.1 s" in done.stderr and "in <module>" in done.stderr


@pytest.mark.parametrize("fault", ["an output", "a gradient"])
def test_a_kernel_that_is_wrong_is_found(fault):
    """An output off by a percent in one value, and a gradient left out."""

    def wrong(*inputs):
        outputs = list(kernels.attention_kernels(CPU, torch.float32)["node by node"](*inputs))
        if fault == "an output":
            outputs[0][-1, -1, -1] += 0.01 * outputs[0].abs().max()
        else:
            outputs[2] = torch.zeros_like(outputs[2])
        return tuple(outputs)

    cases = lambda: kernels.attention_cases(torch.float32, 64)[:1]  # noqa: E731
    (check,) = kernels.everywhere("attention", wrong, cases, CPU)
    assert check.run().passed is False


def test_ranks_that_train_on_something_else_are_found():
    expected = [1.0, 0.5]
    assert training.furthest([1.0, 0.5], expected) == 0 and training.furthest([1.0, 0.6], expected) > 0.1
    assert not judged(training.furthest([1.0, float("nan")], expected), 1.0).passed
