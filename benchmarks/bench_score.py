"""Scoring: one image of 7 tiles and 1, 8 or 64 responses of 150 tokens, and a mixed set, batches ready.

`padded`: every response with its own image and prompt, right-padded batches of 8, SDPA, no vocabulary head.
`reference`: one response at a time, with the vocabulary head.

Errors are relative to the largest reward, and to the norm of the score's weight where that is larger: the standard
deviation of its rewards, since normed hidden states have a mean square of one. A single reward may be near zero.

Bound: FLOPs that our forward needs at the rate of their matrix products, measured in the same run (flops.py).
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import PaddedRewardModel, ReferenceRewardModel
from benchmarks.flops import counted, work_bound
from benchmarks.harness import Baseline, Case, Comparison, Options, Row, check, compare, relative_error
from benchmarks.models import DTYPES, Records, cast, geometry, make_backbone, make_model, make_records
from mmrm_fast.model.reward_model import RewardModel

KINDS = {"padded": (PaddedRewardModel, 8), "reference": (ReferenceRewardModel, 1)}  # sequences of a forward
EXACT_BOUND, FLOOR = 1e-5, 2**-8  # in fp32; in bf16 twice the baseline's error and this, against our fp32 rewards
MIXED = ((3, (120, 60)), (7, (150,) * 8), (1, (200,)), (5, (90, 170, 40, 150)))
SETS = {"1x1": ((7, (150,)),), "1x8": ((7, (150,) * 8),), "1x64": ((7, (150,) * 64),), "mixed": MIXED}


def cases(options: Options) -> Iterator[Case]:
    """Every set in fp32 and bf16; `--quick` leaves out the 64 responses."""
    for name, sets in SETS.items():
        for dtype in DTYPES:
            if not (options.quick and name == "1x64"):
                yield Case(f"score {name}, {dtype}", partial(rows, "score", f"score {name}", sets, dtype, options))


def rows(
    suite: str, title: str, sets: tuple, dtype: torch.dtype, options: Options, *, kinds: Iterable = KINDS, **details
) -> Iterator[Row]:
    """Verify, measure memory and time ours against per-response scoring."""
    records, device = make_records(geometry(options), sets), options.device
    model = cast(make_model(records.sizes), dtype, device).eval()
    batch = records.pack().to(device)
    ours, number = rewards_of(model, batch.main, batch.tiles), sum(batch.num_responses)
    result, work = counted(ours)
    exact = None if dtype == torch.float32 else rewards_of(copy.deepcopy(model).float(), batch.main, batch.tiles)()
    least = float(model.score.weight.detach().norm())
    error = lambda rewards, expected: [relative_error(rewards, expected, least=least)]  # noqa: E731
    baselines = {}
    for name in kinds:
        side = padded_side(name, model, records, dtype, device)
        checks = check(error, result, side(), exact, bounds=[EXACT_BOUND], floors=[FLOOR])
        baselines[name] = Baseline(side, checks, {**details, "responses": number})
    comparison = Comparison(
        suite, title, dtype, ours, baselines, device, partial(work_bound, work, dtype, device), (number, "responses"),
        whole_model=True,
    )  # fmt: skip
    yield from compare(comparison, options)


def rewards_of(model: torch.nn.Module, *inputs) -> Callable[[], Tensor]:
    """A forward without gradients."""
    return torch.inference_mode()(partial(model, *inputs))


def padded_side(
    name: str, model: RewardModel, records: Records, dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """A baseline's rewards of all records, forward by forward."""
    kind, size = KINDS[name]
    number = sum(len(sample.main.sequences) for sample in records.samples)
    chunks = [range(at, min(at + size, number)) for at in range(0, number, size)]
    padded = kind(make_backbone(records.sizes).to(device, dtype), model.score.weight).eval()
    forwards = [rewards_of(padded, records.padded("main", chunk, dtype, device)) for chunk in chunks]
    return lambda: torch.cat([forward() for forward in forwards])
