"""What the Triton ops share: a kernel launch as data, block sizes, and the second pass of a sum.

An op is planned before it runs: outputs and launches. The plan of meta tensors compiles where no GPU is.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a block that is read and summed
SUM_COLUMNS = 64


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid, its arguments by name (constants included) and its warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4

    def run(self) -> None:
        """Launch on the current stream of the current device; an empty grid launches nothing."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, enable_fp_fusion=True)


class Plan(NamedTuple):
    """An op's outputs, allocated, and the launches that fill them."""

    outputs: tuple[Tensor, ...]
    launches: tuple[Launch, ...]

    def run(self) -> tuple[Tensor, ...]:
        """Fill the outputs."""
        device = self.outputs[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for launch in self.launches:
                launch.run()
        return self.outputs


def block_size(length: int, largest: int = 1024) -> int:
    """The power of two that holds a row of this length, or as much of it as `largest`."""
    return min(triton.next_power_of_2(max(length, 1)), largest)


def warps(block: int) -> int:
    """8 elements a thread, 16 bytes of half precision."""
    return min(max(block // 256, 1), 16)


@triton.jit(do_not_specialize=["num_chunks"])
def sum_chunks_kernel(chunks, out, num_chunks, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, num_chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        mask = (chunk < num_chunks)[:, None] & (column < num_columns)[None, :]
        total += tl.load(chunks + chunk.to(tl.int64)[:, None] * num_columns + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < num_columns)


def sum_chunks(chunks: Tensor, out: Tensor) -> Launch:
    """Second pass of a sum: out [columns] from chunks [chunks, columns] float32, always in the same order."""
    num_chunks, num_columns = chunks.shape
    block = block_size(num_columns, SUM_COLUMNS)
    arguments = {
        "chunks": chunks,
        "out": out,
        "num_chunks": num_chunks,
        "num_columns": num_columns,
        "ROWS": block_size(num_chunks, TILE // 2 // block),
        "BLOCK": block,
    }
    return Launch(sum_chunks_kernel, (triton.cdiv(num_columns, block),), arguments)
