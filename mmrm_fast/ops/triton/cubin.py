"""Machine code of a planned launch without a GPU, and what it takes of one: registers, stack, shared memory.

Needs TRITON_INTERPRET unset when the kernels are imported.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmrm_fast.ops.triton.launch import Launch

WARP_SIZE = 32
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
PATTERN = (
    r"arch = (?P<architecture>sm_\d+)"
    r"|Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)"
    r" LOCAL:(?P<local>\d+)"
)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Resources(NamedTuple):
    """Of one kernel's machine code."""

    registers: int  # a thread
    stack: int  # bytes a thread, spilled registers among them
    local: int  # bytes a thread
    shared: int  # bytes a block


def launch_resources(launch: Launch, architecture: int, *, max_registers: int | None = None) -> Resources:
    """Compile a launch for sm_`architecture` and read the resources of its cubin."""
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": True, "maxnreg": max_registers}
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", architecture, WARP_SIZE), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, _, resources),) = read_resources(Path(file.name))
    return resources._replace(shared=compiled.metadata.shared)


def _source(launch: Launch) -> ASTSource:
    """The source with the specialisation that Triton chooses at a launch: constants, and multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = kind = "constexpr" if parameter.is_constexpr else _kind(value)
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = ALIGNED
    return ASTSource(launch.kernel, signature, constants, attributes)


def _kind(value: Tensor | int | float | None) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def read_resources(path: Path) -> list[tuple[str, str, Resources]]:
    """Architecture ("" in a cubin), mangled name and resources of every kernel in a cubin or a library."""
    result = subprocess.run([str(CUOBJDUMP), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found, architecture = [], ""
    for match in re.finditer(PATTERN, result.stdout):
        architecture = match["architecture"] or architecture
        if match["name"]:
            numbers = (int(match[name]) for name in Resources._fields)
            found.append((architecture, match["name"], Resources(*numbers)))
    return found
