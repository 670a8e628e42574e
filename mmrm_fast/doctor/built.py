"""What was built here, what each op runs on and why, and a remedy where something is missing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mmrm_fast.machine import Machine, this_machine
from mmrm_fast.ops.native import native, runs_on, takes

CUDA_OPS = ("pair_loss", "pack_image_tokens")
HOST_OPS = ("plan_trie", "resize_bicubic")  # of data preparation, on the CPU everywhere
OPS = (*CUDA_OPS, "trie_attention", *HOST_OPS)


@dataclass(frozen=True)
class Built(Machine):
    """A machine with what was compiled there: what decides which backend an op runs on."""

    native: str | None  # file of the module; None where it did not load
    openmp: bool
    attention: bool  # the native module's attention runs on this CPU
    architectures: tuple[int, ...]  # of the CUDA kernels in the native module, 80 is sm_80
    cudart: int  # in the units of `driver`, linked statically; 0 without CUDA kernels


class Choice(NamedTuple):
    """The backend of an op on this machine."""

    backend: str
    why: str


def inspect() -> Built:
    """This machine."""
    module = native()
    return Built(
        **vars(this_machine()),
        native=None if module is None else module.__file__,
        openmp=hasattr(module, "openmp"),
        attention=module is not None and module.has_trie_attention_cpu(),
        architectures=tuple(getattr(module, "cuda_architectures", ())),
        cudart=module.cuda_versions()[1] if hasattr(module, "cuda_versions") else 0,
    )


def choose(op: str, machine: Built) -> Choice:
    """What an op runs on where its tensors are: the GPUs that torch sees, otherwise the CPU."""
    if op in HOST_OPS or not machine.devices:
        return choose_on_cpu(op, machine)
    if op == "trie_attention":
        old = [f"{name} is sm_{major}{minor}" for name, major, minor in machine.devices if major < 8]
        if old:
            return Choice("torch", f"{old[0]}, FlashAttention needs sm_80: the slow path, node by node")
        return Choice("FlashAttention", "torch's own; fp32 runs node by node in torch")
    obstacle, _ = cuda_obstacle(machine)
    if not obstacle:
        return Choice("CUDA C++", "compiled for these GPUs, and the driver takes its cudart")
    if machine.packages["triton"]:
        return Choice("Triton", obstacle)
    return Choice("reference", f"{obstacle}, and Triton is not installed")


def choose_on_cpu(op: str, machine: Built) -> Choice:
    where = "host code" if op in HOST_OPS else "torch sees no GPU"
    if machine.native is None:
        return Choice("SDPA" if op == "trie_attention" else "reference", f"{where}, and the native module did not load")
    if op == "trie_attention" and not machine.attention:
        return Choice("SDPA", f"{where}, and C++ needs a CPU with AVX-512 BF16: torch's kernel, node by node")
    return Choice("C++", where)


def cuda_obstacle(machine: Built) -> tuple[str, str]:
    """Why the CUDA kernels of the native module do not run here, and what to do; empty where they run."""
    if not machine.architectures:
        return "the native module has no CUDA kernels", "put nvcc on PATH and run pip install -e . again"
    for name, major, minor in machine.devices:
        if not runs_on(list(machine.architectures), major, minor):
            remedy = "rebuild with a CUDA toolkit that knows this GPU"
            return f"no CUDA kernel is compiled for sm_{major}{minor} ({name})", remedy
    if not takes(machine.driver, machine.cudart):
        versions = f"the driver takes {cuda(machine.driver)}, the kernels were built with {cuda(machine.cudart)}"
        return versions, "update the driver, or rebuild with an older CUDA toolkit"
    return "", ""


def remedies(machine: Built) -> Iterator[str]:
    """One line a missing piece: what to do and what it brings."""
    if machine.native is None:
        why = "pip install -e . -v shows why; it needs a C++17 compiler"
        yield f"native module: {why}; without it every op runs its slower reference"
    elif not machine.openmp:
        yield "OpenMP: install the compiler's OpenMP library (libgomp or libomp) and rebuild; ops use one thread"
    if not machine.devices:
        if machine.driver:
            torch_is = f"for CUDA {machine.torch_cuda}" if machine.torch_cuda else "a CPU build"
            yield f"GPU: torch ({torch_is}) sees none, the driver takes {cuda(machine.driver)}: install a torch for it"
        return
    obstacle, remedy = cuda_obstacle(machine)
    if machine.native and obstacle:
        yield f"CUDA kernels: {obstacle}: {remedy}"
    if not machine.packages["triton"]:
        yield "Triton: pip install 'triton>=3.5'; without it ops run their references on the GPU"


def cuda(version: int) -> str:
    """CUDA 13.0 of 13000."""
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def facts(machine: Built) -> dict[str, str]:
    """What is here, and what was built for it."""
    names = ", ".join(f"sm_{architecture}" for architecture in machine.architectures)
    driver = cuda(machine.driver) if machine.driver else "none"
    if machine.driver and machine.cudart:
        verdict = "takes" if takes(machine.driver, machine.cudart) else "is too old for"
        driver += f", {verdict} the kernels' {cuda(machine.cudart)}"
    return machine.record() | {
        "NVIDIA driver": driver,
        "native module": machine.native or "did not load",
        "OpenMP": "yes" if machine.openmp else "no: one thread",
        "CUDA kernels": f"{names}, static cudart of {cuda(machine.cudart)}" if names else "not compiled",
    }


def lines(machine: Built) -> Iterator[str]:
    """The report."""
    yield from (f"{name:<20}{value}" for name, value in facts(machine).items())
    yield f"\n{'op':<20}{'runs here on':<16}why"
    yield from (f"{op:<20}{backend:<16}{why}" for op in OPS for backend, why in [choose(op, machine)])
    missing = list(remedies(machine))
    yield "\nto do:" if missing else "\nnothing is missing"
    yield from (f"  {remedy}" for remedy in missing)
