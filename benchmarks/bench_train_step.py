"""A training step, forward and backward, against padded sequences through transformers' own model with SDPA.

All sides have the same weights, a frozen vision tower and a batch that is ready: padding, pixel normalisation and
duplication are not timed on the baselines' side, nor is packing on ours (normalisation is).

`padded`: one right-padded pass over chosen and rejected of every pair, without a vocabulary head; one more for a proxy.
`reference`: the reference implementation's way, a padded pass for chosen and one for rejected, with vocabulary head,
and two more for the proxy, which sees a white image.
The robust rows run the white image and the reference's SFC on both sides; `text-only proxy` is ours by default, whose
proxy sees no image: against `reference, white proxy` it is another proxy, and its time alone is compared.

In fp32 both sides' rewards and gradients must be equal. In bf16 both are compared with our fp32 step of equal weights:
ours may err twice as much as the baseline does, plus a floor.

Bound: FLOPs that our step needs at the rate of their matrix products, measured in the same run (flops.py). The ratio of
FLOP is what the algorithm alone gives: the ratio of times if both sides came equally near to their bounds.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from benchmarks.baselines import PaddedRewardModel, ReferenceRewardModel, robust_loss
from benchmarks.flops import Work, counted, work_bound
from benchmarks.harness import Baseline, Case, Comparison, Options, Row, check, compare, gradient_error, relative_error
from benchmarks.models import DTYPES, PROBE, Records, cast, geometry, make_backbone, make_model, make_records
from mmrm_fast.data.packing import PackedBatch
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.train.loss import margins, preference_loss

EXACT_BOUNDS = (1e-5, 1e-4)  # of rewards and gradients in fp32
FLOORS = (2**-8, 2**-6)  # of the errors in bf16
ANOTHER_PROXY = ", white proxy"  # of a side whose proxy is not ours
K_WISE = ((7, (150, 150, 150, 150)),)


@dataclass(frozen=True)
class Result:
    """Of a step."""

    rewards: Tensor
    gradients: dict[str, Tensor]  # of the parameters that have one
    work: Work


@dataclass(frozen=True)
class Side:
    """One way to run the step."""

    name: str
    modules: nn.ModuleList  # main model, then the proxy where there is one
    run: Callable[[], Tensor]  # forward and backward; rewards of both branches by pair, chosen and rejected in turns

    def step(self) -> Tensor:
        """Forward and backward; returns the rewards, leaves the gradients."""
        self.modules.zero_grad(set_to_none=True)
        return self.run()

    def result(self) -> Result:
        """What a step comes to; the modules keep no gradients."""
        rewards, work = counted(self.step)
        named = self.modules.named_parameters()
        gradients = {name: parameter.grad.float() for name, parameter in named if parameter.grad is not None}
        self.modules.zero_grad(set_to_none=True)
        return Result(rewards.float(), gradients, work)


def cases(options: Options) -> Iterator[Case]:
    """Standard, robust with both proxies, K-wise; in fp32 and bf16. `--quick` leaves out the slowest."""
    sizes = geometry(options)
    pairwise = partial(make_records, sizes, PROBE)
    kwise = partial(make_records, sizes, K_WISE, all_pairs=True)
    for name, make, branch in (
        ("standard", pairwise, None),
        ("robust", pairwise, "white"),
        ("robust, text-only proxy", pairwise, "text"),
        ("k-wise robust", kwise, "white"),
    ):
        for dtype in DTYPES:
            slow = branch == "text" or (make is kwise and dtype == torch.float32)
            if not (options.quick and slow):
                title = f"train-step {name}"
                yield Case(f"{title}, {dtype}", partial(rows, title, make, branch, dtype, options))


def rows(title: str, make_records, branch: str | None, dtype: torch.dtype, options: Options) -> Iterator[Row]:
    """Verify, measure memory and time our side against each of the others."""
    records, device = make_records(), options.device
    ours, work, baselines = compared(records, branch, dtype, device)
    comparison = Comparison(
        "train-step", title, dtype, ours.step, baselines, device, partial(work_bound, work, dtype, device),
        (work.flops / 1e9, "GFLOP"), whole_model=True,
    )  # fmt: skip
    yield from compare(comparison, options)


def compared(
    records: Records, branch: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Side, Work, dict[str, Baseline]]:
    """Our side, the work of its step, and the other sides, with which its results have been compared."""
    ours, *others = make_sides(records, branch, dtype, device)
    result = ours.result()
    exact = None if dtype == torch.float32 else exact_side(ours, records, branch, device).result()
    return ours, result.work, {side.name: baseline(side, result, exact) for side in others}


def baseline(side: Side, ours: Result, exact: Result | None) -> Baseline:
    """A side that our result has been compared with, unless its proxy is another."""
    theirs = side.result()
    flops, baseline_flops = ours.work.flops, theirs.work.flops
    details = {"GFLOP": flops / 1e9, "baseline GFLOP": baseline_flops / 1e9, "ratio of FLOP": baseline_flops / flops}
    checks = check(errors, ours, theirs, exact, bounds=EXACT_BOUNDS, floors=FLOORS)
    return Baseline(side.step, [] if side.name.endswith(ANOTHER_PROXY) else checks, details)


def errors(result: Result, expected: Result) -> tuple[float, float]:
    """Of the rewards and of the gradients."""
    rewards = relative_error(result.rewards, expected.rewards)
    return rewards, gradient_error(result.gradients, expected.gradients)


def exact_side(side: Side, records: Records, branch: str | None, device: torch.device) -> Side:
    """Our step in fp32 from the same weights."""
    models = list(copy.deepcopy(side.modules).float())
    batch = records.pack(with_text=branch is not None, white=branch == "white").to(device)
    return our_side(batch, models, "reference" if branch == "white" else "paper")


def make_sides(records: Records, branch: str | None, dtype: torch.dtype, device: torch.device) -> list[Side]:
    """Ours, `padded` and `reference`; the proxy sees what `branch` says, None for no proxy."""
    models = [cast(make_model(records.sizes, seed=seed), dtype, device) for seed in range(1 if branch is None else 2)]
    if branch == "text":
        models[1].drop_vision()
    batch = records.pack(with_text=branch is not None, white=branch == "white").to(device)
    chosen, rejected, both = responses_by_pair(batch)
    sides = [our_side(batch, models, "reference" if branch == "white" else "paper")]
    for name, kind, passes, proxy in (
        ("padded", PaddedRewardModel, [both], branch),
        ("reference", ReferenceRewardModel, [chosen, rejected], branch and "white"),
    ):
        branches = ["main", proxy][: len(models)]
        batches = [[records.padded(each, which, dtype, device) for which in passes] for each in branches]
        backbones = [make_backbone(records.sizes, seed=seed).to(device, dtype) for seed in range(len(models))]
        modules = nn.ModuleList(map(kind, backbones, [model.score.weight for model in models]))
        step = partial(padded_step, modules, batches, "paper" if proxy == "text" else "reference")
        sides.append(Side(name if proxy == branch else name + ANOTHER_PROXY, modules, step))
    return sides


def responses_by_pair(batch: PackedBatch) -> tuple[list[int], list[int], list[int]]:
    """The pairs' chosen responses, their rejected ones, and both in turns."""
    chosen, rejected = batch.chosen_P.tolist(), batch.rejected_P.tolist()
    return chosen, rejected, [response for pair in zip(chosen, rejected, strict=True) for response in pair]


def our_side(batch: PackedBatch, models: list[RewardModel], mode: str) -> Side:
    """The packed step as training has it: the proxy's pass is over before the model's begins."""
    both = responses_by_pair(batch)[2]

    def run() -> Tensor:
        number, proxies = len(batch.chosen_P), []
        for proxy in models[1:]:
            proxies.append(proxy(batch.text, batch.text_tiles))
            (preference_loss(proxies[0], None, batch).main / number).backward()
        rewards = models[0](batch.main, batch.tiles)
        proxy_margin_P = margins(proxies[0].detach(), batch) if proxies else None
        (preference_loss(rewards, proxy_margin_P, batch, sfc_mode=mode).main / number).backward()
        return torch.cat([each.detach()[both] for each in (rewards, *proxies)])

    return Side("ours", nn.ModuleList(models), run)


def padded_step(modules: Iterable[PaddedRewardModel], batches: list, mode: str) -> Tensor:
    """A baseline's step: every module over its passes, one over all sequences or one a side of the pairs."""
    rewards_BP2 = []
    for module, passes in zip(modules, batches, strict=True):
        parts = [module(batch) for batch in passes]
        rewards_BP2.append(parts[0].view(-1, 2) if len(parts) == 1 else torch.stack(parts, dim=1))
    margins = [rewards_P2[:, 0] - rewards_P2[:, 1] for rewards_P2 in rewards_BP2]
    loss = robust_loss(*margins, mode=mode)[0] if len(margins) > 1 else -logsigmoid(margins[0]).sum()
    (loss / len(margins[0])).backward()
    return torch.cat(rewards_BP2).flatten().detach()
