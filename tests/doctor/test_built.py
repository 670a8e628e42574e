"""doctor: its report here, and what it would say on machines that are not at hand."""

from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mmrm_fast import machine, ops
from mmrm_fast.cli import main
from mmrm_fast.doctor.built import CUDA_OPS, HOST_OPS, OPS, Built, choose, lines, remedies
from mmrm_fast.ops.native import cuda_native, native

H100 = ("NVIDIA H100", 9, 0)
SERVER = Built(
    cpu="Xeon",
    cpus=8,
    native="_native.so",
    openmp=True,
    attention=True,
    architectures=(80, 90, 100),
    cudart=13000,
    driver=13000,
    torch_cuda="13.0",
    devices=(H100,),
    packages={"torch": "2.13.0", "transformers": "5.23", "triton": "3.9.0", "ray": "2.60"},
)


def without(machine, package):
    return replace(machine, packages=machine.packages | {package: None})


def test_report_of_this_machine(capsys):
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert f"torch               {version('torch')}\n" in report
    assert native().__file__ in report
    for op in OPS:
        assert op in report
    if not torch.cuda.is_available():
        assert "gpus                none" in report
        assert "pair_loss           C++             torch sees no GPU" in report


def test_the_dispatcher_agrees():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in set(OPS) - {*HOST_OPS}:
        import_module(f"mmrm_fast.ops.{op}")
        schema = f"mmrm_fast::{op}_fwd"
        compiled = op == "trie_attention" or (op in CUDA_OPS and cuda_native() is not None)
        assert has_kernel(schema, "CPU")
        assert has_kernel(schema, "CUDA") == (compiled or find_spec("triton") is not None)


@pytest.mark.parametrize(
    ("machine", "backend", "reason"),
    [
        (SERVER, "CUDA C++", "the driver takes its cudart"),
        (replace(SERVER, driver=12080), "Triton", "takes CUDA 12.8, the kernels were built with CUDA 13.0"),
        (replace(SERVER, devices=(H100, ("V100", 7, 0))), "Triton", "sm_70 (V100)"),
        (replace(SERVER, devices=(("RTX 4090", 8, 9),)), "CUDA C++", "compiled for these GPUs"),
        (replace(SERVER, architectures=(), cudart=0), "Triton", "has no CUDA kernels"),
        (without(SERVER, "triton"), "CUDA C++", "the driver takes its cudart"),
        (replace(without(SERVER, "triton"), driver=12080), "reference", "13.0, and Triton is not installed"),
        (replace(SERVER, devices=()), "C++", "torch sees no GPU"),
        (replace(SERVER, devices=(), native=None), "reference", "did not load"),
    ],
)
def test_choices(machine, backend, reason):
    assert choose("pair_loss", machine).backend == backend
    for op in HOST_OPS:
        assert choose(op, machine).backend == ("C++" if machine.native else "reference")
    assert reason in choose("pair_loss", machine).why


CPU_SERVER = replace(SERVER, devices=())


@pytest.mark.parametrize(
    ("machine", "backend", "reason"),
    [
        (SERVER, "FlashAttention", "torch's own; fp32 runs node by node"),
        (replace(SERVER, devices=(H100, ("T4", 7, 5))), "torch", "T4 is sm_75, FlashAttention needs sm_80: the slow"),
        (CPU_SERVER, "C++", "torch sees no GPU"),
        (replace(CPU_SERVER, attention=False), "SDPA", "C++ needs a CPU with AVX-512 BF16"),
        (replace(CPU_SERVER, attention=False, native=None), "SDPA", "the native module did not load"),
    ],
)
def test_choices_of_attention(machine, backend, reason):
    choice = choose("trie_attention", machine)
    assert choice.backend == backend and reason in choice.why


def test_every_op_is_reported():
    files = (Path(ops.__file__).parent).glob("*.py")
    assert set(OPS) == {path.stem for path in files} - {"__init__", "native", "trie_attention_cuda"}


@pytest.mark.parametrize(
    ("machine", "remedy"),
    [
        (SERVER, None),
        (replace(SERVER, devices=(), driver=0), None),
        (replace(SERVER, native=None, architectures=()), "pip install -e . -v"),
        (replace(SERVER, openmp=False), "OpenMP library"),
        (replace(SERVER, driver=12080), "update the driver"),
        (replace(SERVER, architectures=(), cudart=0), "put nvcc on PATH"),
        (replace(SERVER, devices=(("B300", 10, 3), ("GTX", 6, 1))), "a CUDA toolkit that knows this GPU"),
        (replace(SERVER, devices=(), torch_cuda=None), "the driver takes CUDA 13.0: install a torch for it"),
        (without(SERVER, "triton"), "pip install 'triton>=3.5'"),
    ],
)
def test_remedies(machine, remedy):
    found = list(remedies(machine))
    assert [remedy in line for line in found] == ([] if remedy is None else [True])
    assert ("nothing is missing" in "\n".join(lines(machine))) == (remedy is None)


def test_driver_against_cudart_is_said():
    old = "\n".join(lines(replace(SERVER, driver=12080)))
    assert "CUDA 12.8, is too old for the kernels' CUDA 13.0" in old
    assert "NVIDIA driver       none" in lines(replace(SERVER, driver=0))


# what is recorded beside figures


def test_results_say_which_code_they_are_of(monkeypatch, tmp_path):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(machine, "CLONE", tmp_path)
    answers = {"describe": "abc1234", "diff": ""}
    monkeypatch.setattr(machine.subprocess, "check_output", lambda command, **_: answers[command[1]])
    commits = []
    for answers["diff"] in ("", "+ one", "+ another"):
        commits.append(machine.commit())
    assert commits[0] == "abc1234" and len(set(commits)) == 3
    assert all(commit.startswith("abc1234-") for commit in commits[1:])


def test_a_package_outside_of_a_clone_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CLONE", tmp_path)
    assert machine.commit() == ""


def test_a_machine_is_recorded_as_text():
    record = machine.this_machine().record()
    assert record["torch"] == version("torch") and record["cpu"] and int(record["cpus"]) >= 1
    assert all(isinstance(value, str) for value in record.values())
