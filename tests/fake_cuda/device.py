# ruff: noqa: E402
"""Fake CUDA tensors on a CPU build of torch, and what a GPU would wait for or hold: import it before torch.

`guard.cpp`, built and named by FAKE_CUDA_GUARD, is loaded first; then torch.cuda's streams are stubbed for FSDP2.
"""

import contextlib
import ctypes
import importlib.util
import os
import traceback
import weakref
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np

for library in ("libgomp.so.1", "libc10.so", "libtorch_cpu.so"):
    path = Path(importlib.util.find_spec("torch").origin).parent / "lib" / library
    if path.exists():
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
ctypes.CDLL(os.environ["FAKE_CUDA_GUARD"], ctypes.RTLD_GLOBAL)

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


class Stream:
    """A stream or an event on which nothing ever waits."""

    stream_id = 0

    def __init__(self, *args, **options):
        pass

    def record_event(self, event=None):
        return event or Stream()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def nothing(self, *args):
        return self

    def synchronize(self):
        for watch in Watch.all:
            watch.waits.append(("event", where()))

    record = wait = query = wait_stream = wait_event = nothing


@contextlib.contextmanager
def no_stream(stream):
    yield


def stub_streams() -> None:
    """torch.cuda's Python surface as FSDP2 uses it."""
    cuda, stream = torch.cuda, Stream()
    cuda.Stream = cuda.Event = torch.Event = Stream
    cuda.current_stream = torch.accelerator.current_stream = lambda *device: stream
    cuda.stream, cuda.current_device, cuda.set_device = no_stream, lambda: 0, lambda device: None
    cuda.device_count, cuda.manual_seed_all = lambda: 1, lambda seed: None
    Tensor.record_stream = lambda self, stream: None


stub_streams()


def where() -> str:
    """The line of the package that is running, or of whatever calls torch."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "fake_cuda" not in f.filename]
    own = [f for f in frames if "/mmrm_fast/" in f.filename] or frames
    return f"{Path(own[-1].filename).name}: {own[-1].line}"


class Watch(TorchDispatchMode):
    """What would make a host wait for the GPU, by kind and line; the collectives and copies between GPUs, in order."""

    all: ClassVar[list] = []  # those that are open

    def __init__(self):
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.collectives: list[str] = []
        self.copies: list[tuple[str, str]] = []
        self.num_ops = 0

    def __enter__(self):
        self.tolist, FakeTensor.tolist = FakeTensor.tolist, lambda tensor: self.read(tensor, Watch.ones)
        Watch.all.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        FakeTensor.tolist = self.tolist
        Watch.all.remove(self)
        return super().__exit__(*error)

    @staticmethod
    def ones(tensor: Tensor):
        return np.ones(tensor.shape).tolist()

    def read(self, tensor: Tensor, value):
        if tensor.device.type == "cuda":
            self.waits.append(("read", where()))
        return value(tensor)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op.name()
        self.num_ops += 1
        if name == "aten::_local_scalar_dense":
            return self.read(args[0], lambda tensor: 1.0)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name.startswith("mmrm_fast::") and len({x.device.type for x in tensors}) > 1:
            raise RuntimeError(f"{name} has tensors on several devices: {where()}")
        if any(part in name for part in ("nonzero", "masked_select", "unique")) and tensors[0].device.type == "cuda":
            self.waits.append((name, where()))
        if name.startswith(("c10d::", "_c10d_functional::", "fsdp::")):
            self.collectives.append(name)
        out = op(*args, **kwargs)
        if name.partition(".")[0] in ("aten::_to_copy", "aten::copy_", "aten::to"):  # the last in inference mode
            source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], out)
            is_async = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            if source.device.type == target.device.type and source.device != target.device:
                self.copies.append((str(source.device), str(target.device)))
            if source.device.type != target.device.type and not is_async and source.numel():
                self.waits.append((f"{source.device.type} to {target.device.type}", where()))
        return out

    def counts(self) -> dict[str, int]:
        """How often each wait came."""
        return {f"{kind} in {line}": count for (kind, line), count in Counter(self.waits).items()}


class Memory(TorchDispatchMode):
    """Bytes of live storages on the GPU; looks every few operations."""

    def __init__(self, tensors=()):
        super().__init__()
        self.live: dict[int, weakref.ref] = {}
        self.peak = self.num_ops = 0
        self.note(tensors)

    def note(self, values) -> None:
        for tensor in tree_leaves(values):
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = weakref.ref(storage)

    def total(self) -> int:
        self.live = {key: storage for key, storage in self.live.items() if storage() is not None}
        return sum(storage().nbytes() for storage in self.live.values())

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.note(out)
        self.num_ops += 1
        if self.num_ops % 4 == 0:
            self.peak = max(self.peak, self.total())
        return out
