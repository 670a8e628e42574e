"""Robust steps of the shipped checkpoint: on all ranks and on one, with every way to spend memory, and resumed."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch

from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import with_options
from mmrm_fast.data.packing import Packed, pack_items
from mmrm_fast.doctor.checks import COMPILING, SECONDS, Check, Found, judged
from mmrm_fast.doctor.rewards import preparer_of, records, shipped
from mmrm_fast.train import sharding
from mmrm_fast.train.branch import train_mode
from mmrm_fast.train.command import completed
from mmrm_fast.train.dry_run import MODES
from mmrm_fast.train.proxy import make_branches, parse_proxy
from mmrm_fast.train.resume import Checkpoints, RunState, load_tensors, newest_good
from mmrm_fast.train.step import Steps

NUM_RECORDS = 3  # of a micro-batch
DTYPES, PLAIN = ("float32", "bfloat16"), "plain"
SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of losses and gradient norms

Figures = dict[str, list[float]]  # by what was computed


def alone_checks(device: torch.device, num_ranks: int, found: Figures) -> Iterator[Check]:
    """Steps of this rank alone over the micro-batches of all; what they come to is put into `found`, by dtype."""
    for dtype in DTYPES:
        check = partial(told, device, found, dtype, range(num_ranks), dtype=dtype)
        yield Check(f"robust steps on one rank, {dtype}", check)


def joint_checks(device: torch.device, found: Figures) -> Iterator[Check]:
    """Checks that all ranks do together."""
    on_gpu, own = device.type == "cuda", [sharding.rank()]
    for dtype in DTYPES:
        check = partial(against, device, found, dtype, own, dtype=dtype)
        yield Check(f"robust steps on all ranks against one, {dtype}", check)
    (_, plain), *ways = product((False, True)[: 1 + on_gpu], MODES)
    yield Check("robust steps on all ranks", partial(told, device, found, PLAIN, own, activation_checkpointing=plain))
    for compiled, mode in ways:
        check = partial(against, device, found, PLAIN, own, activation_checkpointing=mode, compile=compiled)
        name = f"the same with activation checkpointing {mode}{', compiled' * compiled}"
        yield Check(name, check, COMPILING if compiled else SECONDS)
    yield Check("robust steps after saving and resuming against those without", partial(resumed, device))
    if on_gpu:
        yield Check("no wait for the GPU in a micro-batch", partial(waits, device))


def steps_of(device: torch.device, **options) -> Steps:
    """The branches and the optimizer of a robust training from the shipped checkpoint."""
    config = with_options(completed(TrainConfig()), robust=True, **options)
    torch.manual_seed(config.run.seed)
    proxy = parse_proxy(config)
    branches = make_branches(proxy, device)
    for branch in branches:
        train_mode(branch.root)
    return Steps(branches, proxy, config, device)


@cache
def micro_batch(rank: int) -> Packed:
    """A rank's records, in memory that a GPU reads from without a wait where there is one."""
    groups = records(NUM_RECORDS * (rank + 1))[-NUM_RECORDS:]
    preparer = preparer_of(shipped(torch.float32), with_text=True)
    found = pack_items(preparer, groups, preparer.whole)
    return found.pin_memory() if torch.cuda.is_available() else found


def figures(steps: Steps, batches: list[Packed], *numbers: int) -> list[float]:
    """Losses and gradient norms of the steps of these numbers, each over the same micro-batches."""
    found = []
    for number in numbers:
        for batch in batches:
            steps.add(batch, number)
        metrics = steps.apply(0.5).metrics
        found += [metrics[name] for name in ("loss", "loss_proxy", "grad_norm", "proxy_grad_norm")]
    return found


def furthest(actual: list[float], expected: list[float]) -> float:
    """The largest relative difference; NaN where any is."""
    own, others = torch.tensor(actual), torch.tensor(expected)
    return float(((own - others).abs() / others.abs()).max())


def told(device: torch.device, found: Figures, name: str, ranks: Sequence[int], **options) -> Found:
    """Two steps over the micro-batches of these ranks, kept under a name; the second shows what the first changed."""
    found[name] = figures(steps_of(device, **options), [*map(micro_batch, ranks)], 0, 1)
    return Found(found[name][0], None, "loss")


def against(device: torch.device, found: Figures, name: str, ranks: Sequence[int], **options) -> Found:
    """The same two steps computed in another way, against those kept under a name."""
    own = figures(steps_of(device, **options), [*map(micro_batch, ranks)], 0, 1)
    dtype = sharding.compute_dtype(with_options(TrainConfig(), **options).memory, device)
    return judged(furthest(own, found[name]), SAME[dtype])


def resumed(device: torch.device) -> Found:
    """Two steps after a checkpoint by the run that wrote it and by one that reads it, in the current folder."""
    folder = Path(sharding.on_first_rank(lambda: tempfile.mkdtemp(prefix="doctor-", dir=os.getcwd())))
    batches, steps = [micro_batch(sharding.rank())], steps_of(device, dtype="float32")
    figures(steps, batches, 0)
    try:
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.save(RunState({}), steps.tensors(), on_seal=lambda: None)
        problem = checkpoints.wait()
        checkpoints.close()
        path, problems = newest_good(folder)
        if problem or path is None:
            raise OSError("; ".join([problem or f"no checkpoint in {folder}", *problems]))
        again = steps_of(device, dtype="float32")
        load_tensors(path, again.tensors())
        return judged(furthest(figures(again, batches, 1, 2), figures(steps, batches, 1, 2)), SAME[torch.float32])
    finally:
        if sharding.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def waits(device: torch.device) -> Found:
    """A micro-batch in which a wait for the GPU raises, after one that sets up what is set up once."""
    steps, batch = steps_of(device), micro_batch(sharding.rank())
    steps.add(batch, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.add(batch, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return judged(0, 0)
