"""The compiled module `mmrm_fast._native`, or None where it was not built. Loads without torch."""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


SOURCES = Path(__file__).parents[2] / "csrc"  # only in a source tree


@functools.cache
def native() -> ModuleType | None:
    """Return the compiled module; without it, warn once and return None, so that callers use their reference."""
    try:
        from mmrm_fast import _native

        check_sources(_native)
    except ImportError as error:
        warnings.warn(f"mmrm_fast runs its slower references, the native module did not load: {error}", stacklevel=2)
        return None
    return _native


def check_sources(module: ModuleType) -> None:
    """Raise `ImportError` unless a compiled module is of the sources beside it, where they are, as CMake read them."""
    files = sorted(path for suffix in ("*.h", "*.cpp", "*.cu") for path in SOURCES.glob(suffix))
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    if files and getattr(module, "sources", None) != hashlib.sha256(digests.encode()).hexdigest():
        raise ImportError(f"it was compiled from other sources than {SOURCES}: run `pip install -e .` again")


@functools.cache
def cuda_native() -> ModuleType | None:
    """The compiled module if its CUDA kernels run on every visible device, else None; creates no CUDA context."""
    module = native()
    if not hasattr(module, "cuda_architectures"):
        return None
    devices, (driver, runtime) = module.cuda_devices(), module.cuda_versions()
    has_code = devices and all(runs_on(module.cuda_architectures, *capability) for capability in devices)
    return module if has_code and takes(driver, runtime) else None


def runs_on(architectures: list[int], major: int, minor: int) -> bool:
    """Whether machine code of one of the architectures (80 is sm_80) runs on a device of this compute capability."""
    return any(a // 10 == major and a % 10 <= minor for a in architectures)


def takes(driver: int, runtime: int) -> bool:
    """Whether a driver's CUDA runs kernels that were built with this one, both 1000 * major + 10 * minor."""
    return driver // 1000 >= runtime // 1000


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors of one device as the native module reads them; None stays."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"every tensor must be on one device, got some on {' and '.join(sorted(map(str, devices)))}")
    return [None if t is None else t.contiguous() for t in tensors]


def run(name: str, *arguments: object, on: Tensor) -> None:
    """Run a function of the native module where a tensor is: with torch's threads, or on the caller's CUDA stream."""
    import torch

    if on.is_cuda:
        getattr(native(), f"{name}_cuda")(*arguments, torch.cuda.current_stream(on.device).cuda_stream)
    else:
        getattr(native(), f"{name}_cpu")(*arguments, torch.get_num_threads())
