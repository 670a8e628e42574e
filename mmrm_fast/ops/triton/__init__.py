"""Triton backends, one file an op. Importing this costs nothing: Triton is imported by the first call on CUDA."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

from mmrm_fast.ops.native import cuda_native, native


def register(library: torch.library.Library, op: str, **passes: tuple[Callable, Callable]) -> None:
    """Give each pass of an op its backends: its reference, C++ on CPUs, on GPUs CUDA C++, else Triton where it is.

    `passes` are by schema name the reference and what calls the native module; `op` is the kernels' file here.
    """
    for name, (reference, compiled) in passes.items():
        library.impl(name, reference, "CompositeExplicitAutograd")
        if native() is not None:
            library.impl(name, compiled, "CPU")
        if cuda_native() is not None:
            library.impl(name, compiled, "CUDA")
        elif find_spec("triton") is not None:
            library.impl(name, partial(run_triton, op, name, reference), "CUDA")


def run_triton(op: str, name: str, reference: Callable, *arguments):
    """The schema `name` in Triton, or its reference where float64 is asked for, which kernels do not take."""
    if any(getattr(argument, "dtype", argument) is torch.float64 for argument in arguments):
        return reference(*arguments)
    outputs = getattr(import_module(f"{__name__}.{op}"), f"{name}_plan")(*arguments).run()
    return outputs if len(outputs) > 1 else outputs[0]
