"""CUDA C++ without a GPU: machine code without spills, and the same kernel text run on the CPU under sanitizers.

The emulation (csrc/emulation.h) gives each array exactly its bytes, and NaN to shared memory before every block.
"""

import os
import re
import shutil
import struct
import subprocess
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ops.common import DTYPES
from ops.test_pair_loss import assert_pair_loss_as_exact, op_args

from mmrm_fast.ops import pack_image_tokens, pair_loss
from mmrm_fast.ops.native import native, runs_on
from mmrm_fast.ops.pack_image_tokens import source_index
from mmrm_fast.ops.pair_loss import MODES

CSRC = Path(__file__).parents[2] / "csrc"
MAIN = Path(__file__).parent / "cuda_emulation" / "main.cpp"
NUM_KERNELS = {"pair_loss.cu": 4, "pack_image_tokens.cu": 7}
NVCC, TRITON = shutil.which("nvcc"), find_spec("triton")
CUOBJDUMP = TRITON and Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
COMPILER = [
    "g++", "-x", "c++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-fno-strict-aliasing", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DMMRM_EMULATION",
    f"-I{CSRC}",
]  # fmt: skip

pytestmark = pytest.mark.xdist_group("emulation")  # built once
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None, reason="Triton, which brings cuobjdump, is not installed")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_cuda_build = pytest.mark.skipif(
    not hasattr(native(), "cuda_architectures"), reason="the native module was built without CUDA"
)


def known_architectures() -> list[int]:
    codes = subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [architecture for architecture in (80, 90, 100) if f"sm_{architecture}" in codes]


def dumped(what: str) -> dict[tuple[int, str], str]:
    """What cuobjdump says of each kernel of the module, by architecture and name."""
    found = {}
    report = subprocess.run([CUOBJDUMP, what, native().__file__], check=True, capture_output=True, text=True).stdout
    for part in re.split(r"^arch = sm_", report, flags=re.M)[1:]:
        architecture, _, kernels = part.partition("\n")
        for kernel in re.split(r"\bFunction (?:: )?", kernels)[1:]:
            found[int(architecture), kernel.split()[0]] = kernel
    return found


@needs_cuda_build
@needs_cuobjdump
def test_kernels_use_no_stack_and_spill_nothing():
    usage = dumped("-res-usage")
    assert len(usage) == sum(NUM_KERNELS.values()) * len(native().cuda_architectures)
    for kernel, text in usage.items():
        assert "STACK:0 " in text and "LOCAL:0 " in text, kernel


@needs_cuda_build
@needs_cuobjdump
def test_pack_image_tokens_reads_and_writes_16_bytes_at_a_time():
    kernels = {name: text for name, text in dumped("-sass").items() if "pack_image_tokens" in name[1]}
    assert len(kernels) == NUM_KERNELS["pack_image_tokens.cu"] * len(native().cuda_architectures)
    for kernel, text in kernels.items():
        assert {"LDG", "STG"} <= set(re.findall(r"(LDG|STG)\S*\.128\b", text)), kernel


@needs_nvcc
@needs_cuda_build
def test_the_module_has_every_architecture_that_nvcc_knows():
    assert native().cuda_architectures == known_architectures()


def test_machine_code_runs_on_later_devices_of_its_generation():
    assert runs_on([80, 90], 8, 0) and runs_on([80, 90], 8, 9) and runs_on([80, 90], 9, 0)
    assert not runs_on([80, 90], 7, 5) and not runs_on([80, 90], 10, 0) and not runs_on([], 8, 0)


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_errors_are_raised_with_their_message(monkeypatch):
    rows, source = torch.ones(3, 8), torch.tensor([0, -1])
    calls = [
        (pair_loss.pair_loss_fwd_native, op_args("paper", "plain")),
        (pack_image_tokens.pack_image_tokens_fwd_native, (rows, rows, source)),
        (pack_image_tokens.pack_image_tokens_bwd_native, (rows[:2], *segments(source), 3, 3, True)),
    ]

    def run_on_cuda(name, *arguments, on):
        scratch = [torch.empty(native().pair_loss_scratch_size(len(on)), dtype=torch.float64)]
        getattr(native(), f"{name}_cuda")(*arguments, *(scratch if name == "pair_loss_fwd" else []), 0)

    for module in (pair_loss, pack_image_tokens):
        monkeypatch.setattr(module, "run", run_on_cuda)
    for function, arguments in calls:
        with pytest.raises(RuntimeError, match=r"CUDA: .*(driver|device)"):
            function(*arguments)
    assert native().cuda_devices() == []


PLANTED = {  # errors by file and name: what is replaced, and by what
    "pair_loss.cu": {
        "global": ("pair < end;", "pair < end + PLANTED;"),
        "shared": ("warp_sums[thread * kNumWarps + i]", "warp_sums[thread * kNumWarps + i + PLANTED]"),
        "barrier": ("  __syncthreads();\n", "  if (!PLANTED) __syncthreads();\n"),
    },
    "pack_image_tokens.cu": {
        "tail": ("store(T* values, int64_t count, const Vector<T>& vector) {\n  if (count >= Vector<T>::kSize &&",
                 "store(T* values, int64_t count, const Vector<T>& vector) {\n"
                 "  if ((PLANTED || count >= Vector<T>::kSize) &&"),
        "alignment": ("% sizeof(uint4) == 0", "% (PLANTED ? 1 : sizeof(uint4)) == 0"),
        "offset": ("(-1 - source) * width", "(PLANTED ? int(-1 - source) * int(width) : (-1 - source) * width)"),
    },
}  # fmt: skip


class Emulation:
    """The kernels as a program: one process a launch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.objects = {path.name: self.compile(path) for path in [MAIN, *(CSRC / name for name in NUM_KERNELS)]}
        self.program = self.link(self.objects, "emulate")
        self.mutant = cache(self.mutant)

    def compile(self, source: Path) -> Path:
        out = self.folder / f"{source.parent.name}-{source.name}.o"
        subprocess.run([*COMPILER, "-c", str(source), "-o", str(out)], check=True)
        return out

    def link(self, objects: dict[str, Path], name: str) -> Path:
        out = self.folder / name
        subprocess.run(["g++", "-fsanitize=address,undefined", *map(str, objects.values()), "-o", str(out)], check=True)
        return out

    def mutant(self, source: str) -> Path:
        """The program with every error of `PLANTED` in a .cu file, each made when the environment names it."""
        text = (CSRC / source).read_text()
        for name, (before, after) in PLANTED[source].items():
            assert text.count(before) == 1, before
            text = text.replace(before, after.replace("PLANTED", f'(std::getenv("{name}") != nullptr)'))
        (self.folder / "mutant").mkdir(exist_ok=True)
        copy = self.folder / "mutant" / source
        copy.write_text(text)
        return self.link(self.objects | {source: self.compile(copy)}, f"mutant-{copy.stem}")

    def start(self, op, dtype, *arguments, mutant=None, planted="none", reverse=False) -> subprocess.CompletedProcess:
        """A launch; of a .cu file's `mutant`, with one error or with none."""
        program = self.mutant(mutant) if mutant else self.program
        command = [str(program), op, str(dtype).removeprefix("torch."), *["reversed"] * reverse]
        data = b"".join(struct.pack("q", len(a)) + a for a in map(to_bytes, arguments))
        return subprocess.run(command, input=data, capture_output=True, env=os.environ | {planted: "1"})

    def run(self, op, dtype, *arguments, results, **options) -> list[torch.Tensor]:
        """The result arrays, in the given dtypes."""
        process = self.start(op, dtype, *arguments, **options)
        assert process.returncode == 0, process.stderr.decode()
        out, place = [], 0
        for result in results:
            (size,) = struct.unpack_from("q", process.stdout, place)
            data = bytearray(process.stdout[place + 8 : place + 8 + size])
            out.append(torch.frombuffer(data, dtype=result) if size else torch.empty(0, dtype=result))
            place += 8 + size
        assert place == len(process.stdout)
        return out


def to_bytes(values: torch.Tensor | list | None) -> bytes:
    if values is None:
        return b""
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    return tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return Emulation(tmp_path_factory.mktemp("emulation"))


@needs_gcc
@pytest.mark.parametrize("reverse", [False, True])
def test_the_emulation(emulation, reverse):
    emulation.run("self_test", "int32", results=[], reverse=reverse)


def emulated_pair_loss(emulation, args, *, offset=0, **options):
    """pair_loss_fwd_kernel; pairs [0, offset) exist as addresses only."""
    *tensors, mode, smoothing = args
    integers = [offset, MODES.index(mode)]
    reals, dtype = torch.tensor([smoothing], dtype=torch.float64), tensors[0].dtype
    return emulation.run("pair_loss", dtype, *tensors, integers, reals, results=[dtype] * 4, **options)


@needs_gcc
@pytest.mark.parametrize("num_pairs", [0, 1, 1023, 1026, 2400])  # 1,024 a block
@pytest.mark.parametrize(
    ("mode", "options", "dtype", "scale"),
    [
        ("standard", "plain", torch.float32, 3.0),
        ("paper", "all", torch.float32, 1e4),
        ("reference", "demand", torch.float64, 3.0),
        ("balanced", "all", torch.float32, 3.0),
        ("paper", "plain", torch.float32, 0.0),
    ],
)
def test_pair_loss(emulation, mode, options, dtype, scale, num_pairs):
    args = op_args(mode, options, dtype=dtype, scale=scale, num_pairs=num_pairs)
    assert_pair_loss_as_exact(emulated_pair_loss(emulation, args), args)


@needs_gcc
def test_pair_loss_has_the_same_bits_in_any_order_of_threads(emulation):
    args = op_args("paper", "all", num_pairs=1200)
    forwards, backwards = (emulated_pair_loss(emulation, args, reverse=reverse) for reverse in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@needs_gcc
def test_pair_loss_past_2_to_the_31(emulation):
    args = op_args("paper", "all", num_pairs=1200)
    _, *far = emulated_pair_loss(emulation, args, offset=2**32)
    _, *near = emulated_pair_loss(emulation, args)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def random_bits(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_sources(num_tokens, num_embeddings, num_features):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(-num_features, num_embeddings, (num_tokens,), generator=generator)


def shifted(rows: torch.Tensor, shift: int) -> torch.Tensor:
    return torch.cat([torch.zeros(shift, dtype=rows.dtype), rows.flatten()])


@needs_gcc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "shift"), [(1, 0), (7, 0), (20, 0), (64, 0), (64, 1), (1096, 0)])
@pytest.mark.parametrize("num_tokens", [0, 37])
def test_pack_image_tokens_fwd(emulation, dtype, width, shift, num_tokens):
    embedding, features = random_bits((11, width), dtype), random_bits((5, width), dtype, seed=1)
    source = random_sources(num_tokens, 11, 5)
    arguments = (shifted(embedding, shift), shifted(features, shift), source, [width, 0, shift])
    (out,) = emulation.run("pack_fwd", dtype, *arguments, results=[dtype])
    assert torch.equal(out[shift:].view(num_tokens, width), torch.cat([embedding, features.flip(0)])[source])


@needs_gcc
@pytest.mark.parametrize("width", [16, 17])
def test_pack_image_tokens_fwd_past_2_to_the_31(emulation, width):
    offset, dtype = 2**28, torch.bfloat16
    embedding, features = random_bits((11, width), dtype), random_bits((5, width), dtype, seed=1)
    source = random_sources(37, 11, 5)
    far = torch.where(source >= 0, source + offset, source - offset)
    (out,) = emulation.run("pack_fwd", dtype, embedding, features, far, [width, offset, 0], results=[dtype])
    assert torch.equal(out.view(37, width), torch.cat([embedding, features.flip(0)])[source])


def segments(source):
    index = source_index(source)
    return index.order, index.segment_ptr, index.segment_source


def summed_rows(grad, source, num_embeddings, num_features):
    """Both gradients, one token after another, in fp32 (float64 for float64)."""
    accumulated = torch.promote_types(grad.dtype, torch.float32)
    sums = torch.zeros(num_embeddings + num_features, grad.shape[1], dtype=accumulated)
    for token, row in enumerate(source.tolist()):
        sums[row] += grad[token]
    sums = sums.to(grad.dtype)
    return sums[:num_embeddings], sums[num_embeddings:].flip(0)


@needs_gcc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "shift"), [(1, 0), (20, 0), (64, 0), (64, 1), (1096, 0)])
@pytest.mark.parametrize("num_tokens", [0, 83])
def test_pack_image_tokens_bwd(emulation, dtype, width, shift, num_tokens):
    grad, source = random_bits((num_tokens, width), dtype), random_sources(num_tokens, 11, 5)
    expected = summed_rows(grad, source, 11, 5)
    for num_embeddings in (11, 0):  # a table that trains, one that does not
        sizes = [width, num_embeddings, 5, 0, shift]
        arguments = (shifted(grad, shift), *segments(source), sizes)
        to_embedding, to_features = emulation.run("pack_bwd", dtype, *arguments, results=[dtype] * 2)
        assert torch.equal(to_embedding[shift:].view(-1, width), expected[0][:num_embeddings])
        assert torch.equal(to_features[shift:].view(-1, width), expected[1])


@needs_gcc
@pytest.mark.parametrize("width", [16, 17])
def test_pack_image_tokens_bwd_past_2_to_the_31(emulation, width):
    offset, dtype = 2**28, torch.bfloat16
    grad, source = random_bits((83, width), dtype), random_sources(83, 11, 5)
    order, segment_ptr, sources = segments(source)
    far = torch.where(sources >= 0, sources + offset, sources)
    arguments = (grad, order + offset, segment_ptr, far, [width, 11, 5, offset, 0])
    to_embedding, _ = emulation.run("pack_bwd", dtype, *arguments, results=[dtype] * 2)
    assert torch.equal(to_embedding.view(11, width), summed_rows(grad, source, 11, 5)[0])


@needs_gcc
@pytest.mark.parametrize(
    ("planted", "message"), [("global", "heap-buffer-overflow"), ("shared", "heap-buffer-overflow"), ("barrier", None)]
)
def test_planted_errors_in_pair_loss_are_caught(emulation, planted, message):
    args = op_args("paper", "plain")
    run = partial(emulated_pair_loss, emulation, args, mutant="pair_loss.cu")
    assert_pair_loss_as_exact(run(), args)
    if message is None:
        assert run(planted=planted)[0].isnan().any()
    else:
        with pytest.raises(AssertionError, match=message):
            run(planted=planted)


@needs_gcc
@pytest.mark.parametrize(
    ("planted", "message"),
    [("tail", "heap-buffer-overflow"), ("alignment", "misaligned address"), ("offset", "signed integer overflow")],
)
def test_planted_errors_in_pack_image_tokens_are_caught(emulation, planted, message):
    width, offset = 20, 2**28
    embedding, features = random_bits((11, width), torch.bfloat16), random_bits((5, width), torch.bfloat16)
    source = random_sources(37, 11, 5)
    far = torch.where(source >= 0, source + offset, source - offset)
    arguments = ("pack_fwd", torch.bfloat16, embedding, features, far, [width, offset, 0])
    start = partial(emulation.start, *arguments, mutant="pack_image_tokens.cu")
    assert start().returncode == 0
    process = start(planted=planted)
    assert process.returncode != 0
    assert message in process.stderr.decode()
