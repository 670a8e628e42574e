"""The example launchers: they call torchrun as it wants to be called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".slurm"))


@pytest.fixture
def run(tmp_path):
    """Run a script with commands that only say how they were called."""

    def run(script, *arguments, **environment):
        for name in ("torchrun", "srun", "scontrol"):
            command = tmp_path / name
            command.write_text('#!/bin/sh\necho "$(basename "$0") $*"\n')
            command.chmod(0o755)
        variables = {**os.environ, **environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run([script, *arguments], env=variables, capture_output=True, text=True, check=True)
        return done.stdout.split()

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_examples_are_clean(script):
    linter = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    subprocess.run([*linter, script], check=True)


def test_a_node_joins_the_others(run):
    words = run(EXAMPLES / "train_nodes.sh", "--robust", MASTER_ADDR="node0", NODES="2", NODE_RANK="1")
    assert {"--nnodes=2", "--node_rank=1", "--nproc_per_node=gpu", "--master_addr=node0"} <= set(words)
    assert words[-1] == "--robust" and words[-2].endswith("train.py") and Path(words[-2]).is_file()


def test_slurm_starts_one_torchrun_a_node_and_queues_again_what_has_no_results(run, tmp_path):
    job = {"SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    job |= {"SLURM_JOB_NAME": "mmrm", "RUN": str(tmp_path)}
    words = run(EXAMPLES / "train.slurm", "--data", "a b.jsonl", **job)
    assert words[-3:] == ["scontrol", "requeue", "7"]
    (tmp_path / "results.json").write_text("{}")
    assert "requeue" not in run(EXAMPLES / "train.slurm", "--data", "a b.jsonl", **job)
    assert words[0] == "srun" and {"torchrun", "--nnodes=2", "--nproc_per_node=8", "--rdzv_id=7"} <= set(words)
