"""Ranks and FSDP2: who runs where, and how a model is sharded over them."""

import os
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.utils.logging import disable_progress_bar

from mmrm_fast.model import RewardModel

TIMEOUT = timedelta(minutes=10)


@contextmanager
def ranks():
    """This process's device; joins the group that torchrun started (or one of its own), and leaves it at the end."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **alone)
    if dist.get_rank():
        disable_progress_bar()
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank."""
    return dist.get_rank()


def num_ranks() -> int:
    """Ranks in the group."""
    return dist.get_world_size()


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def gather_lists(items: list) -> list:
    """Every rank's items, in the order of the ranks, on every rank."""
    gathered: list = [None] * num_ranks()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def shard(model: RewardModel, device: torch.device, *, compute_dtype: torch.dtype) -> RewardModel:
    """Shard a model over all ranks: one FSDP2 group a block, one for the score head, the root for the rest.

    Master weights and reduction are fp32, compute is `compute_dtype`; gradients are summed over ranks, not averaged,
    because the step divides by its global pair weight. One rank computing in fp32 needs no sharding.
    """
    model.to(device)
    if num_ranks() == 1 and compute_dtype == torch.float32:
        return model
    mesh = init_device_mesh(device.type, (num_ranks(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    groups = [fully_shard(model.score, mesh=mesh, mp_policy=exact), fully_shard(model, mesh=mesh, mp_policy=policy)]
    for group in [*blocks(model), *groups]:
        sum_gradients(group)
    return model


def sum_gradients(group: nn.Module) -> None:
    """Reduce a group's gradients by summation."""
    group.set_gradient_divide_factor(1.0)
    group.set_force_sum_reduction_for_comms(True)


def blocks(model: RewardModel) -> Iterable[nn.Module]:
    """The repeated blocks: vision layers, then decoder layers."""
    if model.model.vision_tower is not None:
        yield from model.model.vision_tower.encoder.layer
    yield from model.model.language_model.layers


def full_state(model: RewardModel) -> dict[str, Tensor]:
    """All weights, gathered on the CPU (on rank 0 where sharded)."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def full_value(value: Tensor) -> Tensor:
    """A tensor that may be sharded, whole."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
