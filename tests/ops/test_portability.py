"""The C++ ops give the same bits on every CPU, and one build has machine code for each generation of x86-64.

portability.cpp runs every op and prints digests. Here it is compiled as the module is, for the older generations alone,
and, where a cross compiler and qemu are installed (Debian: g++-aarch64-linux-gnu, qemu-user), for aarch64.
"""

import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
BINDINGS = {"module.cpp", "cuda_bindings.cpp"}
ATTENTION = CSRC / "trie_attention.cpp"  # for AVX-512 alone, by intrinsics
SOURCES = sorted(path for path in CSRC.glob("*.cpp") if path.name not in BINDINGS and path != ATTENTION)
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
AARCH64, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
HERE = platform.machine() == "x86_64" and Path("/proc/cpuinfo").read_text()

pytestmark = [
    pytest.mark.xdist_group("portability"),  # compiled once
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compares generations of x86-64"),
]


def run(command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def build(folder, *flags, compiler="g++"):
    """The program of all ops, compiled with these flags."""
    main, program = Path(__file__).with_name("portability.cpp"), folder / "portability"
    objects = [folder / f"{source.name}.o" for source in (main, *SOURCES)]
    commands = [[compiler, *FLAGS, *flags, f"-I{CSRC}", "-c", s, "-o", o]
                for s, o in zip((main, *SOURCES), objects, strict=True)]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))
    run([compiler, *objects, *(flag for flag in flags if flag == "-static"), "-o", program])
    return program


@pytest.fixture(scope="module")
def as_built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("as_built"))


@pytest.fixture(scope="module")
def digests(as_built):
    """One line an op and element type."""
    found = run([as_built]).splitlines()
    assert len(found) == 7
    return found


@pytest.mark.parametrize(
    ("generation", "needed"), [("x86-64", "avx2"), ("x86-64-v3", "avx512bw")], ids=["x86-64", "x86-64-v3"]
)
def test_older_generations_of_x86_64_give_the_same_bits(generation, needed, digests, tmp_path):
    if f" {needed} " not in HERE:
        pytest.skip(f"without {needed} this CPU runs {generation} or older anyway")
    program = build(tmp_path, "-DMMRM_CLONES=", f"-march={generation}")
    assert run([program]).splitlines() == digests


@pytest.mark.skipif(AARCH64 is None, reason="g++-aarch64-linux-gnu is not installed")
def test_aarch64_compiles_without_warnings_and_gives_the_same_bits(digests, tmp_path):
    run([AARCH64, *FLAGS, "-c", ATTENTION, "-o", tmp_path / "attention.o"])
    program = build(tmp_path, "-static", compiler=AARCH64)
    if QEMU is None:
        pytest.skip("compiled; qemu-user is not installed to run it")
    assert run([QEMU, program]).splitlines() == digests


def test_gcc_before_10_gets_no_attention_kernel_instead_of_a_failed_build():
    """It knows no BF16 instructions of AVX-512."""
    older = ["-Wno-builtin-macro-redefined", "-U__GNUC__", "-D__GNUC__=9"]
    preprocessed = [run(["g++", "-std=c++17", *flags, "-E", ATTENTION]) for flags in (older, [])]
    assert ["avx512bf16" in text for text in preprocessed] == [False, True]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
def test_one_build_has_code_for_every_generation(as_built):
    code = run(["objdump", "-d", "--no-show-raw-insn", as_built])
    for function in ("run_chunk", "sum_columns", "resize_line"):
        registers = {}
        for symbol, body in re.findall(rf"<(\S*\d{function}[IE]\S*)>:\n(.*?)(?:\n\n|\Z)", code, re.DOTALL):
            registers.setdefault(symbol.rpartition(".")[2], set()).update(re.findall(r"%([xyz])mm", body))
        assert registers["default"] == {"x"}, function
        assert "y" in registers["arch_x86_64_v3"] and "z" not in registers["arch_x86_64_v3"], function
        assert "z" in registers["arch_x86_64_v4"], function
