"""This machine and its software: recorded beside figures, to judge them by later; `doctor` reasons from it."""

import ctypes
import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mmrm_fast import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "triton", "ray")
CLONE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Machine:
    """What figures depend on besides the code that made them."""

    cpu: str
    cpus: int  # that this process may use
    devices: tuple[tuple[str, int, int], ...]  # name and compute capability of the GPUs that torch sees
    driver: int  # newest CUDA that the NVIDIA driver takes, 1000 * major + 10 * minor; 0 without one
    torch_cuda: str | None  # that torch was built with
    packages: dict[str, str | None]  # versions, None where not installed

    def record(self) -> dict[str, str]:
        """Names and versions as text: environment.json of a run, and the head of a file of results."""
        return {
            "mmrm_fast": __version__,
            "commit": commit(),
            "python": platform.python_version(),
            **{name: found or "none" for name, found in self.packages.items()},
            "system": platform.platform(),
            "host": platform.node(),
            "cpu": self.cpu,
            "cpus": str(self.cpus),
            "gpus": ", ".join(name for name, *_ in self.devices) or "none",
            "cuda": self.torch_cuda or "none",
        }


def this_machine() -> Machine:
    """The machine that this process runs on."""
    gpus, info = range(torch.cuda.device_count()), Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    return Machine(
        cpu=named[1] if named else platform.processor(),
        cpus=len(os.sched_getaffinity(0)),
        devices=tuple((torch.cuda.get_device_name(gpu), *torch.cuda.get_device_capability(gpu)) for gpu in gpus),
        driver=driver_version(),
        torch_cuda=torch.version.cuda,
        packages={name: installed(name) for name in PACKAGES},
    )


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver_version() -> int:
    """The newest CUDA that the NVIDIA driver takes, 1000 * major + 10 * minor; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int(0)
    return found.value if driver.cuDriverGetVersion(ctypes.byref(found)) == 0 else 0


def commit() -> str:
    """The commit of the clone that the package stands in, with a hash of what is changed; empty outside of one."""
    if not (CLONE / ".git").exists():
        return ""
    git = partial(subprocess.check_output, cwd=CLONE, text=True, stderr=subprocess.DEVNULL)
    try:
        head = git(["git", "describe", "--always"]).strip()
        changes = git(["git", "diff", "HEAD", "--", "*.py", "csrc", "CMakeLists.txt"]).strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed
        return ""
    return f"{head}-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else head
