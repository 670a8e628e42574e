"""Triton backends, one file an op. Importing this costs nothing: Triton is imported by the first call on CUDA."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch


def use_triton(library: torch.library.Library, op: str, **references: Callable) -> None:
    """Fill an op's CUDA keys with its Triton kernels; without Triton installed its references stay.

    Args:
        library: that declares the schemas.
        op: file of the kernels in this folder.
        references: by schema name, for float64, which the kernels do not take.
    """
    if find_spec("triton") is None:
        return
    for name, reference in references.items():
        library.impl(name, partial(run_triton, op, name, reference), "CUDA")


def run_triton(op: str, name: str, reference: Callable, *arguments):
    """The schema `name` in Triton, or its reference where float64 is asked for."""
    if any(getattr(argument, "dtype", argument) is torch.float64 for argument in arguments):
        return reference(*arguments)
    return getattr(import_module(f"{__name__}.{op}"), f"{name}_triton")(*arguments)
