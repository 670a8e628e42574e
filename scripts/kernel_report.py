"""Registers, spills, shared memory and roofline time of every GPU kernel, without a GPU; needs Triton installed."""

import os
import sys

from rich.console import Console

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no machine code
    from mmrm_fast.ops.kernel_report import report, table

    Console(width=None if sys.stdout.isatty() else 140).print(table(report()))
