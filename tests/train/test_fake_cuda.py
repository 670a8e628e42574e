"""Training and scoring over fake CUDA tensors: nothing waits for the GPU but where it must, ranks issue the same
collectives, and a step holds what the dry run says. What it takes is in `tests/fake_cuda`; no GPU is needed.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "fake_cuda"
TORCH = Path(torch.__file__).parent

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a CUDA of its own"),
    pytest.mark.xdist_group("fake cuda"),  # one process imports for all
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What a case of `cases.py` prints, each of a process of its own."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    command, log = [sys.executable, str(FOLDER / "cases.py")], folder / "log.txt"
    environment = os.environ | {"FAKE_CUDA_GUARD": str(built_guard(folder))}
    with (
        open(log, "w") as errors,
        subprocess.Popen(command, stdin=-1, stdout=-1, stderr=errors, env=environment, text=True) as server,
    ):

        @cache
        def ask(case):
            print(case, file=server.stdin, flush=True)
            found = server.stdout.readline()
            assert found not in ("", "null\n"), log.read_text()[-4000:]
            return json.loads(found)

        yield ask
        server.kill()


def built_guard(folder):
    """`guard.cpp`, built."""
    library = folder / "guard.so"
    includes = [f"-I{TORCH / 'include'}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    links = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    flags = ["-O0", "-std=c++20", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *includes, str(FOLDER / "guard.cpp"), *links], check=True, timeout=300)
    return library


def test_a_micro_batch_never_waits_and_a_step_only_for_its_sums_and_norms(result):
    """Standard, robust, two adapters, white, margins of a file and of n-grams, with checkpointing of every mode."""
    found = result("waits")
    assert len(found) == 8
    for way, counts in found.items():
        assert not counts["add"], way
        assert all(kind.startswith("read in ") for kind in counts["apply"]), way
        assert sum(counts["apply"].values()) == 1 + counts["branches"], way


def test_collectives_do_not_depend_on_what_is_in_a_batch_nor_on_the_number_of_ranks(result):
    """Nor on whether gradients are held, which leaves their reductions out of all micro-batches but a step's last."""
    found, by_mesh = dict(result("collectives")), {}
    held = found.pop("held, 8 ranks, 1 replicas")
    for name, collectives in found.items():
        by_mesh.setdefault(name.partition(", ")[2], []).append(collectives)
    for mesh, (pictures, *others) in by_mesh.items():
        assert others == [pictures, pictures], mesh
    assert by_mesh["8 ranks, 1 replicas"] == by_mesh["64 ranks, 1 replicas"]
    reduced = by_mesh["8 ranks, 1 replicas"][0]
    gathers = reduced.count("c10d::_allgather_base_")
    assert held == [name for name in reduced if name not in ("fsdp::chunk_cat", "c10d::_reduce_scatter_base_")]
    trained, frozen, roots, scores = 4, 1, 2, 2
    assert gathers == 2 * trained + frozen + roots + 2 * scores + 1  # FSDP2 fetches a frozen block for no backward


def test_a_step_holds_what_the_dry_run_says(result):
    """Peaks at the widths of 8B over 8 GPUs, to 15 %."""
    for way, peak in result("peaks").items():
        assert peak["dry run"] == pytest.approx(peak["allocated"], rel=0.15), way


def test_a_forward_of_scoring_is_begun_without_waiting_and_waited_for_once(result):
    """On one GPU, or with layers on two or three, each of which has one copy of the plan."""
    found = result("scoring")
    for count, scored in found.items():
        assert (count, scored["begin"]) == (count, {})
        assert scored["outcomes"] == {"event in scorer.py: self.done.synchronize()": 1}
    plan, hidden, tiles = 12, 1, 1  # the index that the score reads by among the plan
    assert found["1"]["copies"] == {}
    assert found["2"]["copies"] == {"cuda:0 to cuda:1": plan + hidden}
    assert found["3"]["copies"] == {
        "cuda:0 to cuda:1": tiles + plan - 1 + hidden, "cuda:1 to cuda:0": tiles,
        "cuda:1 to cuda:2": hidden, "cuda:0 to cuda:2": plan,
    }  # fmt: skip


def test_doctor_calls_a_gpu_as_torch_takes_it(result):
    """Its ops on streams and another device, FlashAttention, decoder layers of 8B, an all-gather over 8 ranks."""
    found = result("doctor")
    assert not {name: came["note"] for name, came in found.items() if came["passed"] is False}
    assert [name for name, came in found.items() if came["figure"] is None] == [*found][-1:] and len(found) == 24


def test_planted_faults_are_caught(result):
    found = {fault: " ".join(seen) for fault, seen in result("faults").items()}
    assert "same device" in found["host edges"]
    assert "trie_attention_fwd has tensors on several devices" in found["host plan"]
    assert "read in " in found["read"] and "nonzero" in found["boolean mask"]
