"""Bytes that a training takes, counted on the meta device, which has shapes and no memory.

Weights, gradients and optimizer state follow from the parameters. Activations are counted by running one and two blocks
and adding up what autograd saves; what is saved a block is the difference.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from mmrm_fast.checkpoint.folder import Checkpoint, CheckpointFolder
from mmrm_fast.config import MemoryConfig
from mmrm_fast.data.images import Tiling
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.train import sharding
from mmrm_fast.train.branch import Branch
from mmrm_fast.train.proxy import Proxy

GPU = torch.device("cuda")


@dataclass(frozen=True)
class Memory:
    """Bytes a GPU."""

    weights: float  # sharded: fp32 where trained, else in the dtype that is computed in
    gradients: float  # fp32, sharded; a whole copy more where they are held until a step's end
    optimizer: float  # sharded, fp32: two moments
    gathered: float  # whole weights in use, and a block's gradients before they are reduced
    activations: float  # what the backward pass needs of a full micro-batch, or at its end the root's gradients so

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def needed(memories: Collection[Memory]) -> float:
    """Bytes of all branches, of which one at a time is computed."""
    passes = [memory.gathered + memory.activations for memory in memories]
    return sum(memory.total for memory in memories) - sum(passes) + max(passes)


class Sized(NamedTuple):
    """A branch's model on the meta device, with one block, with two, and whole."""

    one: RewardModel
    two: RewardModel
    whole: RewardModel


def sized_models(proxy: Proxy) -> list[Sized]:
    """The models by branch; those of two adapters are the same."""
    by_size = [[branch.root for branch in sized_branches(proxy, layers)] for layers in (1, 2, None)]
    return [Sized(*models) for models in zip(*by_size, strict=True)]


def sized_branches(proxy: Proxy, num_layers: int | None = None) -> list[Branch]:
    """The branches as the training makes them, but on the meta device, in the dtype that a GPU computes in.

    Args:
        num_layers: build only so many blocks of vision tower and language model.
    """
    dtype = sharding.compute_dtype(proxy.config.memory, GPU)

    def open_sizes(folder: CheckpointFolder, is_text_only: bool) -> Checkpoint:
        model = folder.model(dtype, num_layers=num_layers)
        tiling = Tiling(folder.config.vision_config.image_size[0], 1, 1)
        return Checkpoint(model.drop_vision() if is_text_only else model, None, tiling, 0, 0)

    with torch.device("meta"):
        return proxy.branches(open_sizes)


def memory(config: MemoryConfig, model: RewardModel, activations: float, *, num_gpus: int) -> Memory:
    """What a GPU holds of one model, as `sharding.shard` shards it."""
    dtype, offloaded = sharding.compute_dtype(config, GPU), sharding.offloads(GPU, config)
    shards = num_gpus / (config.replicas or 1)
    trained = count(model, True) / shards
    stored = sum(p.numel() * sharding.stored_dtype(p, dtype).itemsize for p in model.parameters()) / shards
    is_sharded = sharding.is_sharded(num_gpus, dtype, offloaded)
    whole, root_gradients = gathered(config, model) if is_sharded else (0, 0)
    return Memory(
        weights=0 if offloaded else stored,
        gradients=(0 if offloaded else 4 * trained) + (4 * count(model, True) if config.hold_gradients else 0),
        optimizer=0 if offloaded else 8 * trained,
        gathered=whole,
        activations=max(activations, root_gradients),
    )


def gathered(config: MemoryConfig, model: RewardModel) -> tuple[float, float]:
    """Bytes of gathered weights (two blocks, one of them on its way, and the root's) with a block's unreduced
    gradients, and of the root's, which come when the activations are gone.
    """
    width, parts = sharding.compute_dtype(config, GPU).itemsize, model.blocks()
    root, root_trained = (count(model, own) - sum(count(part, own) for part in parts) for own in (None, True))
    weights = root + 2 * max(map(count, parts)) if config.reshard_after_forward else count(model)
    reduced = width + 4  # in fp32
    return width * weights + reduced * max(count(part, True) for part in parts), reduced * root_trained


def activations(mode: str, models: Sized, tokens: int, tiles: int) -> float:
    """Bytes saved for a micro-batch's backward pass by a branch: language model over `tokens`, vision over `tiles`."""
    return sum(stack_bytes(mode, *stack) for stack in stacks(models, tokens, tiles))


def stacks(models: Sized, tokens: int, tiles: int) -> Iterator[tuple[int, "Pass", "Pass"]]:
    """The arguments of `stack_bytes` for a branch's language model and its vision part."""
    one, two, whole = models
    yield len(whole.model.language_model.layers), *(text_pass(model, tokens) for model in (one, two))
    if whole.model.vision_tower is not None:
        yield len(whole.model.vision_tower.encoder.layer), *(vision_pass(model, tiles) for model in (one, two))


@dataclass(frozen=True)
class Pass:
    """Bytes of a forward pass."""

    saved: int  # by autograd, without weights
    kept: int  # of it, by selective checkpointing
    block_input: int  # of each block


def stack_bytes(mode: str, layers: int, one: Pass, two: Pass) -> float:
    """Bytes saved by `layers` blocks and what surrounds them, from passes of one and two."""
    block = two.saved - one.saved
    outside = max(0, one.saved - block)
    if mode in ("auto", "none") or not block:
        return layers * block + outside
    kept = one.block_input + (two.kept - one.kept if mode == "selective" else 0)
    return layers * kept + block + outside  # one block is recomputed at a time


def text_pass(model: RewardModel, tokens: int) -> Pass:
    """The language model over `tokens`."""
    decoder = model.model.language_model
    block_input = tokens * decoder.config.hidden_size * decoder.dtype.itemsize
    return run_pass(lambda: run_decoder(decoder, tokens), model, block_input)


def run_decoder(decoder: nn.Module, tokens: int) -> torch.Tensor:
    """The last hidden states [1, tokens, D] of a decoder on the meta device, over one sequence."""
    with torch.device("meta"):
        ends, places = torch.zeros(2, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int64)
        embeds = torch.zeros(1, tokens, decoder.config.hidden_size, dtype=decoder.dtype, requires_grad=True)
    plan = {"cu_seqlens_q": ends, "kv_index": places, "cu_seqlens_k": ends}
    plan |= {"max_seqlen_q": tokens, "max_seqlen_k": tokens, "use_cache": False}
    return decoder(inputs_embeds=embeds, position_ids=places[None], **plan).last_hidden_state


def vision_pass(model: RewardModel, tiles: int) -> Pass:
    """Vision tower and projector over `tiles`."""
    vision = model.model.config.vision_config
    side, patch = vision.image_size[0], vision.patch_size[0]
    pixels = torch.zeros(tiles, side, side, 3, dtype=torch.uint8, device="meta")
    values = tiles * ((side // patch) ** 2 + 1) * vision.hidden_size
    block_input = values * model.model.dtype.itemsize
    return run_pass(lambda: model.project(model.tower_output(pixels)), model, block_input)


def run_pass(run: Callable, model: nn.Module, block_input: int = 0) -> Pass:
    """What a forward pass of a model, or of a part of it, saves."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor), KeptBytes() as kept:
        run()
    return Pass(sum(storage.nbytes() for storage in saved.values()), kept.bytes, block_input)


class KeptBytes(TorchDispatchMode):
    """Adds up the outputs of the operations that selective checkpointing keeps."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if sharding.keep_expensive(None, op, *args) == CheckpointPolicy.MUST_SAVE:
            outputs = out if isinstance(out, tuple) else (out,)
            self.bytes += sum(value.nbytes for value in outputs if isinstance(value, torch.Tensor))
        return out


def count(module: nn.Module, trained: bool | None = None) -> int:
    """Parameters of a module, all or those that are (not) trained."""
    return sum(p.numel() for p in module.parameters() if trained is None or p.requires_grad == trained)
