"""The compiled module `mmrm_fast._native`, or None where it was not built. Loads without torch."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@functools.cache
def native() -> ModuleType | None:
    """Return the compiled module; without it, warn once and return None, so that callers use their reference."""
    try:
        from mmrm_fast import _native
    except ImportError as error:
        warnings.warn(f"mmrm_fast runs its slower references, the native module did not load: {error}", stacklevel=2)
        return None
    return _native


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


def addresses(*tensors: Tensor | None, device: torch.device) -> list[int]:
    """Where the tensors' memory on this device begins, 0 for none."""
    elsewhere = {t.device for t in tensors if t is not None} - {device}
    if elsewhere:
        raise ValueError(f"every tensor must be on {device}, got one on {elsewhere.pop()}")
    return [0 if t is None else t.data_ptr() for t in tensors]


def device_and_stream(tensor: Tensor) -> tuple[int, int]:
    """Where a kernel on this tensor is launched: its device and the caller's stream there."""
    import torch

    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
