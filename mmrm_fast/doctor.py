"""`mmrm-fast doctor`: what was built here, what each op runs on and why, and a remedy where something is missing."""

import ctypes
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

import mmrm_fast
from mmrm_fast.ops.native import native, runs_on, takes

PACKAGES = ("torch", "transformers", "triton", "flash-attn", "ray")
OPS = {  # backends beside the reference
    "pair_loss": ("C++", "CUDA C++", "Triton"),
    "reward_head": ("C++", "Triton"),
    "pack_image_tokens": ("C++", "CUDA C++", "Triton"),
    "pixel_shuffle_norm": ("C++", "Triton"),
    "patchify": ("C++", "Triton"),
    "plan_trie": ("C++",),
    "resize_bicubic": ("C++",),
    "trie_attention": ("C++", "SDPA", "flash-attn"),
}
HOST_OPS = ("plan_trie", "resize_bicubic")  # of data preparation, on the CPU everywhere
REBUILD = "pip install -e . -v shows why; it needs a C++17 compiler"


@dataclass(frozen=True)
class Machine:
    """What decides which backend an op runs on."""

    native: str | None  # file of the module; None where it did not load
    openmp: bool
    attention: bool  # the native module's attention runs on this CPU
    architectures: tuple[int, ...]  # of the CUDA kernels in the native module, 80 is sm_80
    cudart: int  # 1000 * major + 10 * minor, linked statically; 0 without CUDA kernels
    driver: int  # in the same units; 0 without one
    torch_cuda: str | None  # that torch was built with
    devices: tuple[tuple[str, int, int], ...]  # name and compute capability of the GPUs that torch sees
    packages: dict[str, str | None]  # versions, None where not installed


class Choice(NamedTuple):
    """The backend of an op on this machine."""

    backend: str
    why: str


def inspect() -> Machine:
    """This machine."""
    module = native()
    count = torch.cuda.device_count()
    return Machine(
        native=None if module is None else module.__file__,
        openmp=hasattr(module, "openmp"),
        attention=module is not None and module.has_trie_attention_cpu(),
        architectures=tuple(getattr(module, "cuda_architectures", ())),
        cudart=module.cuda_versions()[1] if hasattr(module, "cuda_versions") else 0,
        driver=driver_version(),
        torch_cuda=torch.version.cuda,
        devices=tuple((torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)) for i in range(count)),
        packages={name: installed(name) for name in PACKAGES},
    )


def driver_version() -> int:
    """The newest CUDA that the NVIDIA driver takes, 1000 * major + 10 * minor; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int(0)
    return found.value if driver.cuDriverGetVersion(ctypes.byref(found)) == 0 else 0


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def choose(op: str, machine: Machine) -> Choice:
    """What an op runs on where its tensors are: the GPUs that torch sees, otherwise the CPU."""
    if op in HOST_OPS or not machine.devices:
        return choose_on_cpu(op, machine)
    if op == "trie_attention":
        if machine.packages["flash-attn"]:
            return Choice("flash-attn", "it is installed; fp32 runs node by node in torch")
        return Choice("torch", "flash-attn is not installed: the slow path, node by node")
    obstacle = cuda_obstacle(machine) if "CUDA C++" in OPS[op] else "it has no CUDA C++ kernel"
    if obstacle is None:
        return Choice("CUDA C++", "compiled for these GPUs, and the driver takes its cudart")
    if machine.packages["triton"]:
        return Choice("Triton", obstacle)
    return Choice("reference", f"{obstacle}, and Triton is not installed")


def choose_on_cpu(op: str, machine: Machine) -> Choice:
    where = "host code" if op in HOST_OPS else "torch sees no GPU"
    if machine.native is None:
        return Choice("SDPA" if op == "trie_attention" else "reference", f"{where}, and the native module did not load")
    if op == "trie_attention" and not machine.attention:
        return Choice("SDPA", f"{where}, and C++ needs a CPU with AVX-512 BF16: torch's kernel, node by node")
    return Choice("C++", where)


def cuda_obstacle(machine: Machine) -> str | None:
    """Why the CUDA kernels of the native module do not run here, None where they do."""
    if not machine.architectures:
        return "the native module has no CUDA kernels"
    for name, major, minor in machine.devices:
        if not runs_on(list(machine.architectures), major, minor):
            return f"no CUDA kernel is compiled for sm_{major}{minor} ({name})"
    if not takes(machine.driver, machine.cudart):
        return f"the driver takes CUDA {dotted(machine.driver)}, the kernels were built with {dotted(machine.cudart)}"
    return None


def remedies(machine: Machine) -> Iterator[str]:
    """One line a missing piece: what to do and what it brings."""
    packages = machine.packages
    if machine.native is None:
        yield f"native module: {REBUILD}; without it every op runs its slower reference"
    elif not machine.openmp:
        yield "OpenMP: install the compiler's OpenMP library (libgomp or libomp) and rebuild; ops use one thread"
    if machine.driver and not machine.devices:
        torch_is = f"for CUDA {machine.torch_cuda}" if machine.torch_cuda else "a CPU build"
        takes = f"the driver takes CUDA {dotted(machine.driver)}"
        yield f"GPU: torch ({torch_is}) sees none, {takes}: install a torch for it"
    if not machine.devices:
        return
    obstacle = cuda_obstacle(machine)
    if machine.native and obstacle:
        yield f"CUDA kernels: {obstacle}: {cuda_remedy(machine)}"
    if not packages["triton"]:
        yield "Triton: pip install 'triton>=3.5'; without it ops run their references on the GPU"
    if not packages["flash-attn"]:
        yield "flash-attn: pip install 'mmrm_fast[cuda]'; without it attention on the GPU takes the slow path"


def cuda_remedy(machine: Machine) -> str:
    if not machine.architectures:
        return "put nvcc on PATH and run pip install -e . again"
    if not takes(machine.driver, machine.cudart):
        return "update the driver, or rebuild with an older CUDA toolkit"
    return "rebuild with a CUDA toolkit that knows this GPU"


def dotted(cuda: int) -> str:
    """13.0 of 13000."""
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def lines(machine: Machine) -> Iterator[str]:
    """The report."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"mmrm_fast {mmrm_fast.__version__}, {system}"
    yield ""
    yield from built(machine)
    yield ""
    for name, found in machine.packages.items():
        yield f"{name:<20}{found or 'not installed'}"
    yield ""
    yield f"{'op':<20}{'runs here on':<14}why"
    for op in OPS:
        choice = choose(op, machine)
        yield f"{op:<20}{choice.backend:<14}{choice.why}"
    yield ""
    missing = list(remedies(machine))
    yield "nothing is missing" if not missing else "to do:"
    yield from (f"  {remedy}" for remedy in missing)


def built(machine: Machine) -> Iterator[str]:
    """The native module and what it finds of CUDA."""
    yield f"{'native module':<20}{machine.native or 'did not load'}"
    if machine.native:
        yield f"{'OpenMP':<20}{'yes' if machine.openmp else 'no: one thread'}"
    names = ", ".join(f"sm_{architecture}" for architecture in machine.architectures)
    kernels = f"{names}, static cudart {dotted(machine.cudart)}" if names else "not compiled"
    yield f"{'CUDA kernels':<20}{kernels}"
    if not machine.driver:
        driver = "none"
    elif machine.cudart:
        verdict = "takes" if takes(machine.driver, machine.cudart) else "is too old for"
        driver = f"CUDA {dotted(machine.driver)}, {verdict} the kernels' cudart {dotted(machine.cudart)}"
    else:
        driver = f"CUDA {dotted(machine.driver)}"
    yield f"{'NVIDIA driver':<20}{driver}"
    gpus = ", ".join(f"{name} (sm_{major}{minor})" for name, major, minor in machine.devices)
    yield f"{'GPUs torch sees':<20}{gpus or 'none'}"


def doctor() -> None:
    """Print the report of this machine."""
    print("\n".join(lines(inspect())))
