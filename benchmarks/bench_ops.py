"""The table of ops and the loader: each on the same inputs as its baselines, verified against them in the same run.

Results are what an op returns and, of what trains, the gradients. The bound is a copy into new memory of the bytes that
the op must read and write; for `pair_loss` behind a dot product of the two margins and its gradients, the least that
autograd does with them. At P = 100,000 that is not a tight bound: there are two exponentials, two logarithms and five
divisions a pair. The loader's two sides hash every bit of their micro-batches; its workers start anew in every pass.

Shapes: P pairs; T packed tokens, F image features, V embeddings, D hidden size; I tiles, S pixels a tile side.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache, partial
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding
from tqdm import tqdm

from benchmarks.baselines import reference_pixels, robust_loss
from benchmarks.harness import (
    CPU,
    Baseline,
    Bound,
    Case,
    Check,
    Comparison,
    Options,
    Row,
    compare,
    interleaved,
    relative_error,
)
from benchmarks.models import encoded_image, photograph
from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.data.images import NORMALIZATION, Tiling, load_image, load_tiles
from mmrm_fast.data.mixture import PreferenceDataset, unknown_samples
from mmrm_fast.data.packing import Packed, map_tensors
from mmrm_fast.data.records import Records
from mmrm_fast.data.samples import Preparer
from mmrm_fast.data.schedule import load
from mmrm_fast.data.shapes import cached_environments
from mmrm_fast.model.vision import normalized
from mmrm_fast.ops.pack_image_tokens import SourceIndex, pack_image_tokens, source_index
from mmrm_fast.ops.pair_loss import pair_loss
from mmrm_fast.ops.plan_trie import plan_trie, plan_trie_ref
from mmrm_fast.ops.resize_bicubic import resize_bicubic, resize_bicubic_ref
from mmrm_fast.train.command import TINY_CHECKPOINT


@dataclass(frozen=True)
class Op:
    """One op at one size. All its functions are called with the same inputs; the first result is differentiated."""

    name: str
    dtype: torch.dtype
    inputs: Callable[[], Sequence]
    ours: Callable
    baselines: dict[str, Callable]
    tolerance: float  # of a result's relative error
    trained: tuple[int, ...] = ()  # inputs whose gradients are results
    bound_bytes: int = 0  # that it must read and write
    least: tuple[str, Callable] | None = None  # what the bound takes beside a copy of those bytes
    index: Callable | None = None  # what packing builds for it once a micro-batch, timed for the details
    count: tuple[float, str] | None = None  # what a call handles, as `Comparison` has it
    suite: str = "ops"  # what is in another one is the host's to do


Run = Callable[[Callable], tuple]  # an implementation to its results


def cases(suite: str, options: Options) -> Iterator[Case]:
    """One case an op of the suite."""
    for op in OPS:
        if op.suite == suite:
            yield Case(f"{op.name}, {op.dtype}", partial(rows, op, options))


def rows(op: Op, options: Options) -> Iterator[Row]:
    """One row a baseline that runs here."""
    device = options.device if op.suite == "ops" else CPU
    run = prepare(op, device)
    details = {"index seconds": median(*interleaved([op.index], repeats=options.repeats))} if op.index else {}
    baselines = {
        name: Baseline(partial(run, baseline), checks(op, run, baseline), details)
        for name, baseline in op.baselines.items()
        if runs(op, run, name)
    }
    bound = partial(make_bound, op, run, device) if op.bound_bytes or op.least else None
    comparison = Comparison(op.suite, op.name, op.dtype, partial(run, op.ours), baselines, device, bound, op.count)
    yield from compare(comparison, options)


def prepare(op: Op, device: torch.device = CPU) -> Run:
    """Make the inputs; what comes back runs an implementation on them."""
    inputs = [each.to(device) if isinstance(each, Tensor | SourceIndex) else each for each in op.inputs()]
    trained = [inputs[at].requires_grad_() for at in op.trained]
    first = results(op.ours(*inputs))[0] if trained else torch.empty(0)
    gradient = normal(*first.shape, seed=1).to(first)

    def run(function: Callable) -> tuple:
        found = results(function(*inputs))
        return (*found, *torch.autograd.grad(found[0], trained, gradient)) if trained else found

    return run


def results(found: object) -> tuple:
    """What a function returned, as a tuple."""
    return found if isinstance(found, tuple) else (found,)


def runs(op: Op, run: Run, name: str) -> bool:
    """Whether a baseline runs here: torch.compile does not where it finds no C++ compiler, which is said."""
    try:
        run(op.baselines[name])
    except RuntimeError as error:
        if name != "torch.compile":
            raise
        reason = str(error).partition("\n")[0]
        tqdm.write(f"{op.name}: no row against torch.compile, {reason}")
        return False
    return True


def checks(op: Op, run: Run, baseline: Callable) -> list[Check]:
    """Errors of our results."""
    pairs = zip(tensors(run(op.ours)), tensors(run(baseline)), strict=True)
    return [Check(relative_error(result, expected), op.tolerance) for result, expected in pairs]


def tensors(found: tuple) -> list[Tensor]:
    """The tensors and arrays of results, also those inside of a plan, in float64."""
    parts = [part for result in found for part in (vars(result).values() if is_dataclass(result) else [result])]
    assert parts, "nothing to verify"
    return [torch.as_tensor(part).detach().double() for part in parts]


def make_bound(op: Op, run: Run, device: torch.device) -> Bound:
    """The least that the op can take."""
    half = torch.ones(op.bound_bytes // 2, dtype=torch.uint8, device=device)  # a copy reads and writes each byte
    if op.least is None:
        return Bound(half.clone, "copy", num_bytes=op.bound_bytes)
    what, least = op.least
    return Bound(lambda: (run(least), half.clone()), f"{what} and copy" if op.bound_bytes else what)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


FLOATS_PER_PAIR = 2 + 1 + 2 + 4  # margins, SFC, gradient factors written, read by the backward and written again


def fused(margin_P: Tensor, proxy_margin_P: Tensor) -> tuple[Tensor, ...]:
    """The loss of both branches and what training logs."""
    loss = pair_loss(margin_P, proxy_margin_P, mode="paper")
    return loss.main + loss.proxy, loss.weighted_sfc, loss.main_correct, loss.proxy_correct


compiled_loss = cache(lambda: torch.compile(robust_loss, dynamic=False))  # whose import takes seconds


def pair_loss_op(num_pairs: int) -> Op:
    """The loss, what training logs, and the gradients of both branches."""
    return Op(
        f"pair_loss P={num_pairs:,}", torch.float32, lambda: (normal(num_pairs), normal(num_pairs, seed=1)),
        fused, {"eager": robust_loss, "torch.compile": lambda *given: compiled_loss()(*given)}, tolerance=1e-5,
        trained=(0, 1), bound_bytes=4 * FLOATS_PER_PAIR * num_pairs, least=("dot product", torch.dot),
    )  # fmt: skip


NUM_TOKENS, NUM_FEATURES, NUM_EMBEDDINGS, WIDTH = 8192, 7168, 32_768, 2048


def stream_source() -> Tensor:
    """Where the stream's tokens come from [T]."""
    source_T = torch.randint(NUM_EMBEDDINGS, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    source_T[NUM_TOKENS - NUM_FEATURES - 100 : -100] = -1 - torch.arange(NUM_FEATURES)
    return source_T


def stream_inputs() -> tuple:
    """The table, the features, the sources with their index; what the baseline has of them."""
    table_VD, features_FD = (normal(rows, WIDTH, dtype=torch.bfloat16) for rows in (NUM_EMBEDDINGS, NUM_FEATURES))
    source_T = stream_source()
    return table_VD, features_FD, source_T, source_index(source_T), source_T.clamp(min=0), (source_T < 0)[:, None]


def scattered(table_VD: Tensor, features_FD: Tensor, _, __, ids_T: Tensor, is_image_T1: Tensor) -> Tensor:
    """As transformers does it."""
    stream_TD = embedding(ids_T, table_VD)
    return stream_TD.masked_scatter(is_image_T1.expand_as(stream_TD), features_FD)


def stream_op(case: str, trained: tuple[int, ...], bound_bytes: int = 0) -> Op:
    return Op(
        f"pack_image_tokens {NUM_TOKENS:,} x {WIDTH:,}, {case}", torch.bfloat16, stream_inputs,
        lambda *given: pack_image_tokens(*given[:4]), {"masked_scatter": scattered}, tolerance=2**-7,
        trained=trained, bound_bytes=bound_bytes, index=partial(source_index, stream_source()),
    )  # fmt: skip


SIDE = 448
MEAN, STD = NORMALIZATION["imagenet"]


def preprocess_op(tiles: int, width: int, height: int, most_tiles: int) -> Op:
    """A JPEG file to normalised tiles, compared pixel by pixel.

    Ours: Pillow decodes, `resize_bicubic` stretches and cuts to uint8 tiles, which are normalised, in training on the
    device. The bound is the decoding, which is on both sides.
    """
    tiling = Tiling(tile_size=SIDE, max_tiles=most_tiles)
    reference = partial(reference_pixels, tiling=tiling, mean=MEAN, std=STD)

    def ours(photograph: bytes) -> Tensor:
        tiles_ISSC = torch.from_numpy(np.require(load_tiles(photograph, tiling), requirements="W"))
        return normalized(tiles_ISSC, MEAN, STD, torch.float32)

    return Op(
        f"preprocess {tiles} tiles", torch.float32, lambda: [encoded_image(photograph(width, height), "JPEG")], ours,
        {"reference": reference}, tolerance=1e-5, least=("Pillow's decoding", load_image), count=(1, "images"),
        suite="preprocess",
    )  # fmt: skip


NUM_SEQUENCES, LENGTH, SHARED, MIN_SHARED = 64, 2300, 2100, 32


def sequences() -> tuple[np.ndarray, np.ndarray]:
    """Keys and boundaries."""
    keys = np.random.default_rng(0).integers(0, 150_000, (NUM_SEQUENCES, LENGTH))
    keys[:, :SHARED] = keys[0, :SHARED]
    return keys.reshape(-1), np.arange(0, keys.size + 1, LENGTH)


RECORDS, BUDGET = 512, 6_144  # records of an epoch; work of a step, as training on the tiny checkpoint has it


def epoch() -> tuple[PreferenceDataset, np.ndarray]:
    """A data set and an order of some of its records."""
    checkpoint = CheckpointFolder(TINY_CHECKPOINT).load()
    records = Records(cached_environments()["opening"] / "train.jsonl", need_pairs=True)
    preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, with_text=True, pairs="all")
    dataset = PreferenceDataset(records, preparer, unknown_samples(range(len(records))))
    return dataset, np.random.default_rng(0).permutation(len(dataset))[:RECORDS]


def one_pass(dataset: PreferenceDataset, order: np.ndarray, *, num_workers: int) -> Tensor:
    """A hash of every micro-batch [B, 32] uint8."""
    batches = load(dataset, order, num_workers=num_workers, tokens_per_batch=BUDGET, tokens_per_micro_batch=BUDGET)
    return torch.stack([digest(packed) for packed in batches])


def digest(packed: Packed) -> Tensor:
    """A hash of every tensor and number of a micro-batch [32] uint8."""
    found = hashlib.sha256(repr(map_tensors(packed.batch, lambda tensor: (tensor.dtype, tensor.shape))).encode())
    map_tensors(packed.batch, lambda tensor: found.update(tensor.numpy().tobytes()))
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


OPS = (
    *map(pair_loss_op, (64, 4096, 100_000)),
    stream_op("forward", (), bound_bytes=2 * NUM_TOKENS * WIDTH * 2),
    stream_op("forward+backward, frozen table", (1,)),
    stream_op("forward+backward", (0, 1)),
    Op(
        f"plan_trie N={NUM_SEQUENCES} x {LENGTH:,}", torch.int64, sequences, partial(plan_trie, min_shared=MIN_SHARED),
        {"Python": lambda *inputs: plan_trie_ref(*inputs, MIN_SHARED)}, tolerance=0.0, suite="plan",
    ),
    preprocess_op(1, 1024, 1024, 1),
    preprocess_op(3, 1024, 512, 2),
    preprocess_op(7, 1024, 683, 6),
    Op(
        "resize_bicubic 1024 x 683 to 7 tiles", torch.uint8, lambda: [np.asarray(photograph(1024, 683))],
        partial(resize_bicubic, columns=3, rows=2, tile_size=SIDE, thumbnail=True),
        {"Pillow": lambda image: resize_bicubic_ref(image, 3, 2, SIDE, True)}, tolerance=0.0, suite="preprocess",
    ),
    Op(
        "loader shapes, 2 workers", torch.uint8, epoch, partial(one_pass, num_workers=2),
        {"1 process": partial(one_pass, num_workers=0)}, tolerance=0.0, count=(RECORDS, "samples"), suite="loader",
    ),
)  # fmt: skip
