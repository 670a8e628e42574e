"""The training loader over the shapes data: samples/s with 2 worker processes.

`1 process`: the same loader without workers. Every bit of both sides' micro-batches must be the same, as must their
order.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.harness import Baseline, Case, Check, Comparison, Options, Row, compare
from mmrm_fast.checkpoint.folder import load_checkpoint
from mmrm_fast.data.mixture import PreferenceDataset, unknown_samples
from mmrm_fast.data.packing import Packed, map_tensors
from mmrm_fast.data.records import Records
from mmrm_fast.data.samples import Preparer
from mmrm_fast.data.schedule import load
from mmrm_fast.data.shapes import cached_environments
from mmrm_fast.train.defaults import TINY_CHECKPOINT

RECORDS, BUDGET = 512, 6_144  # records of an epoch; work of a step, as training on the tiny checkpoint has it


def cases(options: Options) -> Iterator[Case]:
    """One case."""
    yield Case("shapes", partial(rows, options))


def rows(options: Options) -> Iterator[Row]:
    """Verify and time one pass over the records, workers started anew."""
    checkpoint = load_checkpoint(TINY_CHECKPOINT)
    records = Records(cached_environments()["opening"] / "train.jsonl", need_pairs=True)
    preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, with_text=True, pairs="all")
    dataset = PreferenceDataset(records, preparer, unknown_samples(range(len(records))))
    order = np.random.default_rng(0).permutation(len(dataset))[:RECORDS]
    ours, theirs = (list(map(digest, one_pass(dataset, order, workers))) for workers in (2, 0))
    sides = [lambda workers=workers: deque(one_pass(dataset, order, workers), maxlen=0) for workers in (2, 0)]
    baseline = Baseline(sides[1], [Check(float(ours != theirs), 0)])
    comparison = Comparison(
        "loader", "loader shapes, 2 workers", torch.uint8, sides[0], {"1 process": baseline}, count=(RECORDS, "samples")
    )
    yield from compare(comparison, options)


def one_pass(dataset: PreferenceDataset, order: np.ndarray, num_workers: int) -> Iterator[Packed]:
    """Every micro-batch."""
    return load(dataset, order, num_workers=num_workers, tokens_per_batch=BUDGET, tokens_per_micro_batch=BUDGET)


def digest(packed: Packed) -> str:
    """A hash of every tensor and number of a micro-batch."""
    found = hashlib.sha256(repr(map_tensors(packed.batch, lambda tensor: (tensor.dtype, tensor.shape))).encode())
    map_tensors(packed.batch, lambda tensor: found.update(tensor.numpy().tobytes()))
    return found.hexdigest()
