"""The command that the README begins with, in a process of its own under torchrun."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from mmrm_fast.data.shapes import ShapesConfig, cache_folder, make_environments

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # a port of its own


def first_command() -> list[str]:
    """The script of the README's first torchrun, and its arguments."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if "torchrun " in line)
    return shlex.split(line.partition("torchrun ")[2])


def test_the_readme_s_first_command_ends_with_a_table_and_a_reward_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_environments(cache_folder(ShapesConfig()), ShapesConfig(num_train=100, num_test=8), progress=False)
    script, *arguments = first_command()
    assert (script, arguments) == ("scripts/train.py", ["--robust"])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, str(ROOT / script), *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in result.stdout.splitlines() if "│" in line]
    kinds = {"iid": "iid", "length": "ood", "hedging": "ood", "neutral": "probe", "reversed": "probe"}
    assert rows == [*([name, kind, "8"] for name, kind in kinds.items()), ["mean", "ood", "16"]]
    folder = tmp_path / "runs" / "robust"
    assert result.stdout.splitlines()[-1].split()[:4] == ["python", "scripts/score.py", "--model", "runs/robust/final"]
    assert (folder / "final" / "model.safetensors").is_file()
    assert json.loads((folder / "results.json").read_text()).keys() >= kinds.keys()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
