"""What the native module is given: tensors whose dtype, shape and layout it reads, and no others."""

from types import SimpleNamespace

import pytest
import torch
from ops.test_pair_loss import op_args

from mmrm_fast.ops.native import SOURCES, check_sources, contiguous, native
from mmrm_fast.ops.pair_loss import pair_loss_fwd_native


def call(margin, **changes):
    """The C++ of pair_loss on these margins and results of its sizes, with some arguments changed."""
    sizes = {"sums": 7, "sfc": len(margin), "slope": len(margin), "proxy_slope": len(margin)}
    arguments = {"margin": margin, "proxy_margin": margin, "demand": None, "weight": None, "mode": "paper"}
    arguments |= {"smoothing": 0.0, **{name: margin.new_empty(size) for name, size in sizes.items()}, "threads": 1}
    native().pair_loss_fwd_cpu(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(3, dtype=torch.float64)}, TypeError, "torch.float64"),
        ({"weight": torch.ones(3, 1)}, TypeError, r"torch.float32\[1d\]"),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "incompatible function arguments"),
        ({"weight": torch.ones(2)}, ValueError, "has not the shape"),
        ({"weight": torch.ones(6)[::2]}, ValueError, "is not contiguous"),
        ({"slope": torch.empty(2)}, ValueError, "has not the shape"),
        ({"mode": "robust"}, ValueError, "unknown mode robust"),
        ({"mode": "standard"}, ValueError, "mode standard"),
        ({"proxy_margin": None}, ValueError, "mode paper"),
    ],
)
def test_what_an_op_does_not_read_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(3), **changes)


def test_every_dtype_has_its_own_function():
    for dtype in (torch.float32, torch.float64):
        assert pair_loss_fwd_native(*op_args("paper", dtype=dtype))[0].dtype == dtype
        call(torch.zeros(3, dtype=dtype))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call(torch.zeros(3, dtype=torch.bfloat16))


def test_tensors_of_two_devices_are_refused():
    assert contiguous(torch.ones(2, 2).T, None)[0].is_contiguous()
    with pytest.raises(ValueError, match="on one device, got some on cpu and meta"):
        contiguous(torch.ones(2), torch.ones(2, device="meta"))


def test_a_module_of_other_sources_than_those_beside_it_is_not_loaded(monkeypatch, tmp_path):
    with pytest.raises(ImportError, match=f"from other sources than {SOURCES}: run `pip install -e .` again"):
        check_sources(SimpleNamespace(sources=native().sources[::-1]))
    monkeypatch.setattr("mmrm_fast.ops.native.SOURCES", tmp_path)
    check_sources(SimpleNamespace())  # an installed wheel has no sources
