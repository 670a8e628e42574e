"""The training loader over the shapes data: samples/s with 2 worker processes, which start anew in every pass.

`1 process`: the same loader without workers. Every bit of both sides' micro-batches must be the same, as must their
order; both hash them.
"""

import hashlib
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_ops import Op
from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.data.mixture import PreferenceDataset, unknown_samples
from mmrm_fast.data.packing import Packed, map_tensors
from mmrm_fast.data.records import Records
from mmrm_fast.data.samples import Preparer
from mmrm_fast.data.schedule import load
from mmrm_fast.data.shapes import cached_environments
from mmrm_fast.train.command import TINY_CHECKPOINT

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


OPS = [
    Op(
        "loader shapes, 2 workers", torch.uint8, epoch, partial(one_pass, num_workers=2),
        {"1 process": partial(one_pass, num_workers=0)}, tolerance=0.0, count=(RECORDS, "samples"), suite="loader",
    )
]  # fmt: skip
