"""csrc/elementary.h against numpy in float64: errors in units in the last place, over every exponent."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = """
#include "elementary.h"
extern "C" void exp_negative(const float* x, float* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = mmrm::exp_negative(x[i]);
}
extern "C" void log1p_fraction(const float* x, float* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = mmrm::log1p_fraction(x[i]);
}
"""
STEP = 61  # of the bit patterns

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.xdist_group("elementary"),  # compiled once
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elementary")
    (folder / "elementary.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([*command, folder / "elementary.cpp", "-o", folder / "elementary.so"], check=True)
    return ctypes.CDLL(str(folder / "elementary.so"))


def evaluate(compiled, name, x):
    out = np.empty_like(x)
    getattr(compiled, name)(*(ctypes.c_void_p(a.ctypes.data) for a in (x, out)), ctypes.c_int64(x.size))
    return out


def floats_between_0_and(limit):
    """Every STEP-th float32, subnormals included, and the limit."""
    last = int(np.float32(limit).view(np.uint32))
    return np.append(np.arange(0, last, STEP, dtype=np.uint32), np.uint32(last)).view(np.float32)


@pytest.mark.parametrize(
    ("name", "exact", "limit", "sign", "bound"),
    [("exp_negative", np.exp, 87.0, -1, 1.0), ("log1p_fraction", np.log1p, 1.0, 1, 1.2)],
)
def test_errors_in_units_in_the_last_place(compiled, name, exact, limit, sign, bound):
    for part in np.array_split(sign * floats_between_0_and(limit), 8):
        expected = exact(part.astype(np.float64))
        _, exponent = np.frexp(expected.astype(np.float32))
        unit = np.ldexp(1.0, np.maximum(exponent - 24, -149))
        assert np.max(np.abs(evaluate(compiled, name, part) - expected) / unit) <= bound


def test_limits(compiled):
    odd_nan = np.uint32(0xFFC00001).view(np.float32)
    x = np.array([0.0, -0.0, -87.01, -104.5, -1e30, -np.inf, np.nan, odd_nan], dtype=np.float32)
    smallest = np.float32(1.4e-45)
    np.testing.assert_array_equal(evaluate(compiled, "exp_negative", x), [1, 1, 0, 0, 0, 0, np.nan, np.nan])
    x = np.array([0.0, 1e-45, 1.0, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(
        evaluate(compiled, "log1p_fraction", x), np.array([0, smallest, np.log(2), np.nan], dtype=np.float32)
    )
