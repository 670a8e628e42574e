"""Ranks and FSDP2: who runs where, and how a model is sharded over them."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.utils.logging import disable_progress_bar

from mmrm_fast.config import MemoryConfig
from mmrm_fast.model.reward_model import RewardModel

TIMEOUT = timedelta(minutes=10)
LONG = timedelta(hours=6)  # as the first rank may write hundreds of gigabytes
THIN = 8  # times its inner size are the columns of a product that is not worth keeping, at least
COMPILED_VARIANTS = 64  # of a block: of both branches, with and without images, in training and in evaluation


@contextmanager
def ranks(*, alone: bool = False):
    """This process's device; joins the group that torchrun started, or one of its own, and leaves it at the end."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        place = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", place % torch.cuda.device_count())  # launchers may show each process one GPU
        torch.cuda.set_device(device)
    is_alone = alone or "WORLD_SIZE" not in os.environ
    own = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if is_alone else {}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, **own)
    except RuntimeError as error:
        remedy = "of several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the one to take, see `ip addr`"
        raise OSError(f"ranks do not reach each other: {error}; {remedy}") from error
    if dist.get_rank():
        disable_progress_bar()
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def deterministic(asked: bool):
    """Where it is asked for, operations give the same bits again; raises `RuntimeError` at one that cannot."""
    if not asked:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it
    torch.use_deterministic_algorithms(True)  # to warn alone would leave FlashAttention's backward as it is
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def num_nodes(num_ranks: int) -> int:
    """Machines that so many ranks are on, as far as torchrun says."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    return 1 if num_ranks % here else num_ranks // here


def rank() -> int:
    return dist.get_rank()


def num_ranks() -> int:
    return dist.get_world_size()


def all_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def most(number: int) -> int:
    """The largest of the ranks' numbers."""
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def gather_lists(items: list) -> list:
    """Every rank's items, in the order of the ranks, on every rank."""
    gathered: list = [None] * num_ranks()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def on_first_rank(function: Callable[[], Any]) -> Any:
    """Call `function` on the first rank alone; its result, or its `ValueError` or `OSError`, on all of them."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def wait_for_all() -> None:
    """Wait until every rank is here, far longer than collectives on a GPU do."""
    group = dist.new_group(backend="gloo", timeout=LONG)
    dist.barrier(group)
    dist.destroy_process_group(group)


def compute_dtype(config: MemoryConfig, device: torch.device) -> torch.dtype:
    """What models compute in."""
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, automatic if config.dtype == "auto" else config.dtype)


def shard(model: RewardModel, device: torch.device, config: MemoryConfig) -> RewardModel:
    """Checkpoint, compile and shard a model: one FSDP2 group a block, one a score head, the root for the rest.

    Trained weights are fp32 shards, reduced in fp32 and computed with in `config.dtype`, in which frozen weights are
    kept; gradients are summed over ranks, not averaged, because the step divides by its global pair weight. Embedding,
    projector, patch embedding and final norm stay in the root's group, as they are used in its forward alone. One rank
    computing in fp32 needs no sharding. A model on the meta device stays there, for `CheckpointFolder.fill`.
    """
    dtype = compute_dtype(config, device)
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored_dtype(parameter, dtype))
    for block in model.blocks():
        if config.activation_checkpointing in ("selective", "full"):
            block.forward = partial(checkpoint, block.forward, **checkpoint_options(config.activation_checkpointing))
        if config.compile:  # the checkpoint within, whose recomputation the compiler plans; every batch has other sizes
            block.forward = torch.compile(block.forward, dynamic=True)
    offloaded = offloads(device, config)
    if not offloaded and not next(model.parameters()).is_meta:
        model.to(device)
    if not is_sharded(num_ranks(), dtype, offloaded):
        return model
    options = {"mesh": make_mesh(device, config.replicas or 1), "reshard_after_forward": config.reshard_after_forward}
    if offloaded:
        options["offload_policy"] = CPUOffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    groups = [fully_shard(block, mp_policy=policy, **options) for block in model.blocks()]
    groups += [fully_shard(head, mp_policy=exact, **options) for head in model.heads()]
    options["reshard_after_forward"] = False  # what the backward pass begins with need not be gathered twice
    for group in [*groups, fully_shard(model, mp_policy=policy, **options)]:
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    return model


def reduce_gradients(model: RewardModel, now: bool) -> None:
    """Whether backward passes of a sharded model add gradients up over ranks, with what they held back before."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def stored_dtype(parameter: nn.Parameter, dtype: torch.dtype) -> torch.dtype:
    """What a parameter is kept in where `dtype` is computed in."""
    return torch.float32 if parameter.requires_grad else dtype


def is_sharded(num_ranks: int, dtype: torch.dtype, offloaded: bool) -> bool:
    """Whether a model becomes FSDP groups."""
    return num_ranks > 1 or dtype != torch.float32 or offloaded


def offloads(device: torch.device, config: MemoryConfig) -> bool:
    """Whether weights and optimizer state wait in host memory."""
    return config.cpu_offload and device.type != "cpu"


def make_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """All ranks in a row, or `replicas` rows of them."""
    assert num_ranks() % replicas == 0
    if replicas == 1:
        return init_device_mesh(device.type, (num_ranks(),))
    return init_device_mesh(device.type, (replicas, num_ranks() // replicas), mesh_dim_names=("replicate", "shard"))


def checkpoint_options(mode: str) -> dict:
    """Arguments of `torch.utils.checkpoint` that recompute a whole block, or all but its expensive operations."""
    if mode == "full":
        return {"use_reentrant": False}
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, keep_expensive)}


def keep_expensive(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Selective checkpointing: matrix products and attention are kept; the rest, and thin products, are repeated."""
    kept = {"aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "mmrm_fast::trie_attention_fwd"}
    name = op.name().split(".")[0]
    is_kept = name in kept or "scaled_dot_product" in name
    if name in ("aten::mm", "aten::addmm"):  # an adapter's, which is little work and as large as the layer's own
        is_kept = THIN * args[-2].shape[-1] > args[-1].shape[-1]
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def full_state(model: RewardModel) -> dict[str, Tensor]:
    """All weights, gathered on the CPU (on rank 0 where sharded)."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def full_value(value: Tensor) -> Tensor:
    """A tensor that may be sharded, whole."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
