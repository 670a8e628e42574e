"""Scoring: one image of 7 tiles and 1, 8 or 64 responses of 150 tokens, and a mixed set, batches ready.

`padded`: every response with its own image and prompt, right-padded batches of 8, SDPA, no vocabulary head.
`reference`: one response at a time, with the vocabulary head.

Errors are relative to the largest reward, and to the norm of the score's weight where that is larger: the standard
deviation of its rewards, since normed hidden states have a mean square of one. A single reward may be near zero.

Bound: FLOPs that our forward needs at the rate of their matrix products, measured in the same run (flops.py).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import PaddedRewardModel, ReferenceRewardModel
from benchmarks.flops import Sizes, batch_work, bound_seconds, products_run
from benchmarks.harness import Case, Check, Options, Row, interleaved, make_row, peak_bytes, relative_error
from benchmarks.models import cast, geometry, make_model, make_records
from mmrm_fast.data.packing import PackedBatch

BATCH = 8  # sequences of a padded forward
DTYPES = (torch.float32, torch.bfloat16)
EXACT_BOUND, FLOOR = 1e-5, 2**-8  # in fp32; in bf16 twice the baseline's error and this, against our fp32 rewards
MIXED = ((3, (120, 60)), (7, (150,) * 8), (1, (200,)), (5, (90, 170, 40, 150)))
SETS = {"1x1": ((7, (150,)),), "1x8": ((7, (150,) * 8),), "1x64": ((7, (150,) * 64),), "mixed": MIXED}


def cases(options: Options) -> Iterator[Case]:
    """Every set in fp32 and bf16; `--quick` leaves out the 64 responses."""
    for name, records in SETS.items():
        for dtype in DTYPES:
            if not (options.quick and name == "1x64"):
                title = f"score {name}"
                yield Case(f"{title}, {dtype}", partial(case_rows, "score", title, records, dtype, options))


def case_rows(
    suite: str,
    title: str,
    sets: Sequence,
    dtype: torch.dtype,
    options: Options,
    *,
    with_reference: bool = True,
    **details,
) -> Iterator[Row]:
    """Verify, measure memory and time ours against per-response scoring."""
    records, device = make_records(geometry(options), sets), options.device
    model = cast(make_model(records.sizes), dtype, device).eval()
    batch = records.pack().to(device)
    number = sum(batch.num_responses)
    sides = {"ours": torch.inference_mode()(partial(model, batch.main, batch.tiles))}
    kinds = {"padded": (PaddedRewardModel, BATCH), "reference": (ReferenceRewardModel, 1)}
    for name, (kind, size) in kinds.items():
        if name == "padded" or with_reference:
            chunks = [range(at, min(at + size, number)) for at in range(0, number, size)]
            batches = [records.padded("main", chunk, dtype, device) for chunk in chunks]
            sides[name] = partial(padded_rewards, kind(model.model, model.score.weight).eval(), batches)
    results = {name: side() for name, side in sides.items()}
    peaks = {name: peak_bytes(side) for name, side in sides.items()}
    work = batch_work(Sizes.of(model.model.config), batch, trained=False)
    timed = [*sides.values(), products_run(work, dtype, device)]
    *timings, products = interleaved(timed, repeats=options.model_repeats, min_seconds=0)
    timings = dict(zip(sides, timings, strict=True))
    fraction = bound_seconds(work, products) / timings["ours"].median
    exact = exact_rewards(model, batch) if dtype != torch.float32 else None
    error = partial(relative_error, least=float(model.score.weight.detach().norm()))
    for name in list(sides)[1:]:
        yield make_row(
            suite, title, str(dtype).removeprefix("torch."), ours=timings["ours"], baseline=name, theirs=timings[name],
            checks=[check(results["ours"], results[name], exact, error)], device=device.type, peak_bytes=peaks["ours"],
            baseline_peak_bytes=peaks[name], bound_fraction=fraction,
            details={**details, "responses": number, "responses/s": number / timings["ours"].median},
        )  # fmt: skip


@torch.inference_mode()
def padded_rewards(model: PaddedRewardModel, batches: list) -> Tensor:
    """Rewards of all batches."""
    return torch.cat([model(batch) for batch in batches])


@torch.inference_mode()
def exact_rewards(model: torch.nn.Module, batch: PackedBatch) -> Tensor:
    """Our rewards in fp32 from the same weights; the model is fp32 afterwards."""
    return model.float()(batch.main, batch.tiles)


def check(ours: Tensor, theirs: Tensor, exact: Tensor | None, error: Callable[[Tensor, Tensor], float]) -> Check:
    """The error of our rewards."""
    if exact is None:
        return Check(error(ours, theirs), EXACT_BOUND)
    return Check(error(ours, exact), 2 * error(theirs, exact) + FLOOR)
