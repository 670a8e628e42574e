"""Every Triton kernel in the interpreter against its op's reference; `test_triton_interpreter.py` runs this file.

TRITON_INTERPRET=1 must be set before kernels are imported, so these cases have a process of their own.
"""

from functools import partial

import numpy as np
import pytest
import torch
import triton
from ops.test_pair_loss import op_args
from triton.runtime import interpreter

from mmrm_fast.ops.pack_image_tokens import pack_image_tokens_bwd_ref, pack_image_tokens_ref, source_index
from mmrm_fast.ops.pair_loss import MODES, pair_loss_ref
from mmrm_fast.ops.triton import pack_image_tokens as pack
from mmrm_fast.ops.triton import pair_loss as pairs
from mmrm_fast.ops.triton import run_triton
from mmrm_fast.ops.triton.launch import sum_chunks

FLOAT32_SUM = 1e-6  # of a sum whose terms cancel, relative to the largest result
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

packed_by_triton = partial(run_triton, "pack_image_tokens", "pack_image_tokens_fwd", None)
grads_by_triton = partial(run_triton, "pack_image_tokens", "pack_image_tokens_bwd", None)
losses_by_triton = partial(run_triton, "pair_loss", "pair_loss_fwd", None)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    assert triton.knobs.runtime.interpret
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_exact(kernel, reference, *args):
    """The kernel's errors are at most twice torch's own in the same dtypes, plus a floor; same dtypes and shapes."""
    exact = reference(*(widened(a) for a in args))
    outputs = [kernel(*args), reference(*args), exact]
    for actual, plain, truth in zip(*([o] if isinstance(o, torch.Tensor) else o for o in outputs), strict=True):
        assert actual.dtype == plain.dtype
        assert actual.shape == plain.shape
        largest = truth.abs().max() if truth.numel() else 0.0
        bound = 2 * (plain - truth).abs() + torch.finfo(actual.dtype).eps * truth.abs() + FLOAT32_SUM * largest + 1e-7
        assert torch.all((actual - truth).abs() <= bound), f"{(actual - truth).abs().max()} off"


def widened(value):
    if value in DTYPES:
        return torch.float64
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def strided(tensor):
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@by_dtype
@pytest.mark.parametrize(
    ("source", "width"),
    [([0, 2, -1, -4, 2, 2, 2, -2, 2, 2, 0], 63), ([-3, 1], 1100), ([1, 1, 1], 8), ([-1, -1], 5), ([], 16)],
)
def test_pack_image_tokens(source, width, dtype):
    embedding, features = random(4, width, dtype=dtype), random(5, width, dtype=dtype, seed=1)
    source = torch.tensor(source).long()
    packed = packed_by_triton(strided(embedding), strided(features), source)
    assert torch.equal(packed, pack_image_tokens_ref(embedding, features, source))
    index, grad = source_index(source), random(len(source), width, dtype=dtype, seed=2)
    index = (index.order, index.segment_ptr, index.segment_source)
    for need_embedding in (True, False):
        args = (strided(grad), *index, 4, 5, need_embedding)
        assert_as_exact(grads_by_triton, pack_image_tokens_bwd_ref, *args)


@by_dtype
@pytest.mark.parametrize("width", [0, 4])
def test_pack_image_tokens_of_one_kind(width, dtype):
    table, none = random(3, width, dtype=dtype), torch.empty(0, width, dtype=dtype)
    assert torch.equal(packed_by_triton(table, none, torch.tensor([2, 0])), table[[2, 0]])
    assert torch.equal(packed_by_triton(none, table, torch.tensor([-3, -1])), table[[2, 0]])


@pytest.mark.parametrize(("num_chunks", "width"), [(700, 5), (70, 130), (1, 3), (0, 3)])
def test_sum_of_chunks(num_chunks, width):
    chunks, out = random(num_chunks, width), torch.empty(width)
    sum_chunks(chunks, out).run()
    torch.testing.assert_close(out, chunks.double().sum(0).float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 3.0, 10.0, 1e4])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_pair_loss(mode, options, scale):
    for num_pairs in (0, 1, 30):
        args = [strided_tensor(a) for a in op_args(mode, options, num_pairs=num_pairs, scale=scale)]
        assert_as_exact(losses_by_triton, pair_loss_ref, *args)


def strided_tensor(value):
    return strided(value) if isinstance(value, torch.Tensor) else value


def test_pair_loss_in_chunks():
    args = op_args("paper", "all", num_pairs=3 * pairs.CHUNK + 100)
    assert_as_exact(losses_by_triton, pair_loss_ref, *args)
    runs = [losses_by_triton(*args) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_float64_takes_the_reference():
    function = partial(run_triton, "pair_loss", "pair_loss_fwd", pair_loss_ref)
    for dtype, expected in ((torch.float32, losses_by_triton), (torch.float64, pair_loss_ref)):
        args = op_args("paper", dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(function(*args), expected(*args), strict=True))


FAR = 2**26  # rows that exist as addresses only; of WIDTH values or more they are past 2^31 elements
WIDTH = 64


def run_far(launch, *, programs=0, missing=(), **changes):
    """Run a launch from program number `programs` on, of arrays whose first `missing[name]` elements do not exist."""
    arguments = {**launch.arguments, **changes}
    missing = {
        arguments[name].data_ptr(): size * arguments[name].element_size() for name, size in dict(missing).items()
    }
    convert, builder = interpreter._implicit_cvt, interpreter.interpreter_builder

    def convert_far(argument):
        converted = convert(argument)
        if isinstance(argument, torch.Tensor):
            converted.handle.data -= np.uint64(missing.get(argument.data_ptr(), 0))
        return converted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_implicit_cvt", convert_far)
        patched.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (x + programs, y, z)))
        launch.kernel[launch.grid](**arguments, num_warps=launch.num_warps)


def assert_same_far(plan, far_plan, *launches):
    """The launches of `far_plan`, each with the options of `run_far`, do what `plan` does."""
    expected = plan.run()
    for launch, options in zip(far_plan.launches, launches, strict=True):
        run_far(launch, **options)
    assert all(torch.equal(a, b) for a, b in zip(far_plan.outputs, expected, strict=True))


def test_pack_image_tokens_past_2_to_the_31():
    embedding, features, source = random(4, WIDTH), random(3, WIDTH, seed=1), torch.tensor([3, -1, -3, 0, 3])
    far_source = torch.where(source < 0, source - FAR, source + FAR)
    rows = {"embedding": FAR * WIDTH, "features": FAR * WIDTH, "out": FAR * WIDTH, "source": FAR}
    plans = [pack.pack_image_tokens_fwd_plan(embedding, features, s) for s in (source, far_source)]
    assert_same_far(*plans, {"programs": FAR, "missing": rows})
    grad, index = random(5, WIDTH, seed=2), source_index(source)
    rows = {"grad": FAR * WIDTH, "grad_embedding": FAR * WIDTH, "grad_features": FAR * WIDTH, "segment_source": FAR,
            "segment_ptr": FAR}  # fmt: skip
    segments = index.segment_source
    far_segments = torch.where(segments < 0, segments - FAR, segments + FAR)
    plans = [
        pack.pack_image_tokens_bwd_plan(grad, order, index.segment_ptr, sources, 4, 3, True)
        for order, sources in ((index.order, segments), (index.order + FAR, far_segments))
    ]
    assert_same_far(*plans, {"programs": FAR, "missing": rows})


def test_sum_of_chunks_past_2_to_the_31():
    chunks, out = random(1, WIDTH), torch.empty(WIDTH)
    far = {"chunks": FAR * WIDTH, "out": FAR * WIDTH}
    run_far(sum_chunks(chunks, out), programs=FAR, missing=far, num_columns=(FAR + 1) * WIDTH)
    assert torch.equal(out, chunks[0])


def test_pair_loss_past_2_to_the_31():
    args = op_args("paper", "all", num_pairs=600)  # blocks of 512
    plans = [pairs.pair_loss_fwd_plan(*args) for _ in range(2)]
    names = ("margin", "proxy_margin", "demand", "weight", "sfc", "slope", "proxy_slope")
    missing = dict.fromkeys(names, 512 * FAR) | {"sums": 7 * FAR}
    assert_same_far(*plans, {"programs": FAR, "missing": missing, "num_pairs": 512 * FAR + 600}, {})
