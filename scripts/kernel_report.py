"""Registers, spills, shared memory and roofline time of every GPU kernel, computed without a GPU; needs Triton.

T packed tokens, V vocabulary, D hidden size, P pairs, N image tokens.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no machine code

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmrm_fast.ops.native import native
from mmrm_fast.ops.triton.launch import Launch, Plan
from mmrm_fast.ops.triton.pack_image_tokens import pack_image_tokens_bwd_plan, pack_image_tokens_fwd_plan
from mmrm_fast.ops.triton.pair_loss import pair_loss_fwd_plan

ARCHITECTURES = (80, 90, 100)
H100_BYTES_PER_SECOND = 3.35e12
H100_FLOPS = 67e12  # float32, outside of the tensor cores
MODELS = {"InternVL2-2B": 2048, "InternVL2-8B": 4096}  # hidden size; vision tower and vocabulary are the same
VOCABULARY = 92_553
NUM_TOKENS, NUM_PAIRS, NUM_TILES = 8192, 1024, 4 * 7  # four images of seven tiles
NUM_IMAGE_TOKENS = NUM_TILES * 256
NUM_TEXT_ROWS = NUM_TOKENS - NUM_IMAGE_TOKENS
PAIR_FLOPS = 60
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


class Case(NamedTuple):
    """One pass of an op at one model's sizes: every input byte it needs read once, every output byte written once."""

    name: str
    plan: Plan  # of meta tensors
    num_bytes: int
    flops: int

    @property
    def seconds(self) -> float:
        """At the roofline of an H100: launches and latencies, which bound the smallest, are not in it."""
        return max(self.num_bytes / H100_BYTES_PER_SECOND, self.flops / H100_FLOPS)


class Row(NamedTuple):
    """Resources of one pass on one backend and target: the largest over its kernels and the models."""

    name: str
    backend: str
    target: str
    resources: Resources


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(hidden_size: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Every pass at a model's sizes."""
    D, T, P, V, N = hidden_size, NUM_TOKENS, NUM_PAIRS, VOCABULARY, NUM_IMAGE_TOKENS
    row = D * dtype.itemsize
    plan = pair_loss_fwd_plan(*[meta(P, dtype=torch.float32)] * 2, None, None, "paper", 0.0)
    yield Case("pair_loss_fwd", plan, 4 * (5 * P + 7), PAIR_FLOPS * P)
    plan = pack_image_tokens_fwd_plan(meta(V, D, dtype=dtype), meta(N, D, dtype=dtype), meta(T))
    yield Case("pack_image_tokens_fwd", plan, 2 * T * row + 8 * T, 0)
    index = meta(T), meta(N + NUM_TEXT_ROWS + 1), meta(N + NUM_TEXT_ROWS)
    plan = pack_image_tokens_bwd_plan(meta(T, D, dtype=dtype), *index, V, N, True)
    yield Case("pack_image_tokens_bwd", plan, (T + V + N) * row + 8 * 3 * T, T * D)


def passes() -> Iterator[tuple[Case, ...]]:
    """The cases of each pass, one a model."""
    return zip(*map(cases, MODELS.values()), strict=True)


def report(architectures: Sequence[int] = ARCHITECTURES) -> Iterator[Row]:
    """Resources of every pass, Triton's and, where the native module has them, CUDA C++'s."""
    compiled = native_resources()
    for sides in passes():
        name = sides[0].name
        for architecture in architectures:
            target = f"sm_{architecture}"
            launches = [launch for case in sides for launch in case.plan.launches]
            yield Row(name, "Triton", target, largest(launch_resources(launch, architecture) for launch in launches))
            of_native = [found for built, kernel, found in compiled if built == target and is_of(kernel, name)]
            if of_native:
                yield Row(name, "CUDA C++", target, largest(of_native))


def is_of(kernel: str, name: str) -> bool:
    """Whether a mangled kernel belongs to a pass; pair_loss has one pass and a kernel beside it that adds up."""
    return (name if name != "pair_loss_fwd" else "pair_loss_") in kernel


def largest(resources: Iterable[Resources]) -> Resources:
    return Resources(*map(max, zip(*resources, strict=True)))


def native_resources() -> list[tuple[str, str, Resources]]:
    """Target, mangled name and resources of the native module's CUDA kernels."""
    return read_resources(native().__file__) if hasattr(native(), "cuda_architectures") else []


def table(found: Iterable[Row]) -> Table:
    """One line a pass, backend and target."""
    cases_of = {sides[0].name: sides for sides in passes()}
    title = "GPU kernels: resources of the machine code; time computed from bytes and FLOPs, not measured"
    caption = (
        f"{' / '.join(MODELS)}: bf16, {NUM_TOKENS:,} packed tokens, {NUM_TILES // 7} images of 7 tiles,"
        f" {NUM_PAIRS} pairs. Time: the longer of bytes at {H100_BYTES_PER_SECOND / 1e12} TB/s and FLOPs at"
        f" {H100_FLOPS / 1e12:.0f} TFLOP/s; launches, a few µs each, are not in it. Resources: the largest of a pass's"
        " kernels, CUDA C++ over every dtype and, from sm_90 on, with the 1,024 shared bytes that the system keeps."
    )
    result = Table(title=title, caption=caption)
    for name in ("op", "backend", "target"):
        result.add_column(name, no_wrap=True)
    for name in ("registers", "spills B", "shared B", "moved MB", "MFLOP", "H100 µs (computed)"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in found:
        r, sides = row.resources, cases_of[row.name]
        amounts = ([c.num_bytes / 1e6 for c in sides], [c.flops / 1e6 for c in sides], [c.seconds * 1e6 for c in sides])
        texts = (" / ".join(dict.fromkeys(f"{value:.3g}" for value in pair)) for pair in amounts)
        result.add_row(row.name, row.backend, row.target, *map(str, (r.registers, r.stack + r.local, r.shared)), *texts)
    return result


if __name__ == "__main__":
    Console(width=None if sys.stdout.isatty() else 140).print(table(report()))
