"""Every check on every rank: of each by itself, then of all together; one table."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
from tqdm import tqdm

from mmrm_fast.config import DoctorConfig
from mmrm_fast.doctor.checks import COMPILING, SECONDS, Found, outcome, watched
from mmrm_fast.doctor.kernels import kernel_checks
from mmrm_fast.doctor.rewards import reward_checks
from mmrm_fast.doctor.speed import Speed
from mmrm_fast.doctor.training import Figures, alone_checks, joint_checks
from mmrm_fast.files import write_json
from mmrm_fast.train import sharding

NAME, FIGURE = 62, 20  # characters of columns


def check(config: DoctorConfig, facts: dict[str, str]) -> int:
    """Run the checks, called on every rank, and print what came of them; the exit status."""
    rank, num_ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    found: dict[str, Found] = {}
    one: Figures = {}
    with sharding.ranks(alone=True) as own:
        device = torch.device("cpu") if config.cpu else own
        checks = [*kernel_checks(device), *reward_checks(device), *alone_checks(device, num_ranks, one)]
        found |= {check.name: outcome(check, rank) for check in tqdm(checks, disable=rank > 0, leave=False)}
    with ExitStack() as stack:
        with watched(f"rank {rank}: joining the others", COMPILING):  # which may be slower
            stack.enter_context(sharding.ranks())
        checks = [*joint_checks(device, one), *Speed(device).checks()]
        found |= {check.name: outcome(check, rank) for check in tqdm(checks, disable=rank > 0, leave=False)}
        with watched(f"rank {rank}: telling the others", SECONDS):
            ranks = sharding.gather_lists([(facts, found)])
    if rank == 0:
        print("\n".join(lines([found for _, found in ranks])))
        if config.json:
            rows = [(own, {name: came._asdict() for name, came in found.items()}) for own, found in ranks]
            write_json(config.json, [{"machine": own, "checks": checks} for own, checks in rows])
    return int(any(came.passed is False for _, found in ranks for came in found.values()))


def lines(ranks: list[dict[str, Found]]) -> Iterator[str]:
    """A line a check, of all ranks together, and how many passed."""
    verdicts = {name: verdict([found[name] for found in ranks]) for name in ranks[0]}
    yield f"{'check':<{NAME}} {'':<5}{'figure':>{FIGURE}}{'at most / computed':>{FIGURE}}"
    for name, own in verdicts.items():
        found = [rank[name] for rank in ranks]
        figure, bound = (span(values) for values in zip(*(came[:2] for came in found), strict=True))
        notes = [f"rank {rank}: {came.note}" for rank, came in enumerate(found) if came.note]
        yield f"{name:<{NAME}} {own:<5}{figure:>{FIGURE}}{bound:>{FIGURE}} {found[0].unit}{'; '.join(notes)}"
    count = Counter(verdicts.values())
    passed, failed, others = (count[verdict] for verdict in ("pass", "FAIL", "-"))
    yield f"{passed} passed, {failed} failed, {others} measured or left out; ranks: {len(ranks)}"


def verdict(found: list[Found]) -> str:
    """Whether all ranks passed; a dash where there is nothing to pass."""
    if any(own.passed is False for own in found):
        return "FAIL"
    return "pass" if all(own.passed for own in found) else "-"


def span(values: Iterable[float | None]) -> str:
    """From the least to the largest of what there is."""
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(f"{end(known):.3g}" for end in (min, max) if known))
