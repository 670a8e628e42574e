"""What a run ran on: recorded beside its config, so that its figures can be judged later."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from mmrm_fast import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "flash-attn", "triton", "ray")


def environment() -> dict[str, str]:
    """Names and versions of this machine and its software."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "mmrm_fast": __version__,
        "python": platform.python_version(),
        **{name: installed for name in PACKAGES if (installed := version_of(name))},
        "system": platform.platform(),
        "host": platform.node(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "gpus": ", ".join(gpus) or "none",
        "cuda": torch.version.cuda or "none",
        "ranks": os.environ.get("WORLD_SIZE", "1"),
    }


def version_of(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
