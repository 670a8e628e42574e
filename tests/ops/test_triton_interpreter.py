"""Every Triton kernel in the interpreter: triton_cases.py in a process of its own, where TRITON_INTERPRET is set."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

CASES = Path(__file__).with_name("triton_cases.py")


def test_importing_the_ops_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
import mmrm_fast.ops.pair_loss
print(torch._C._dispatch_has_kernel_for_dispatch_key("mmrm_fast::pair_loss_fwd", "CUDA"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("False\n", 0), result.stderr


def test_importing_the_ops_leaves_triton_alone():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import mmrm_fast.ops.pair_loss as _;"
        " print(before or 'triton' not in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


def interpreter_works() -> bool:
    """Before 3.7 it makes integers of one-element arrays, which numpy 2.4 refuses."""
    return Version(version("triton")) >= Version("3.7") or Version(version("numpy")) < Version("2.4")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(
    find_spec("triton") is not None and not interpreter_works(), reason="this Triton's interpreter needs numpy < 2.4"
)
def test_every_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--noconftest", CASES]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, cwd=CASES.parents[2], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
