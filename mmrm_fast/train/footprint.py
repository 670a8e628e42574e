"""Bytes that a model takes while it trains, counted on the meta device, which has shapes and no memory.

Weights, gradients and optimizer state follow from the parameters. Activations are counted by running one and two blocks
and adding up what autograd saves; what is saved a block is the difference.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.config import MemoryConfig, TrainConfig
from mmrm_fast.model.lora import MAIN, PROXY, TwoAdapterModel, add_lora
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.train.proxy import adapt, freeze, proxy_file
from mmrm_fast.train.sharding import blocks

GIB = 1 << 30
WORKSPACE = GIB  # the CUDA context, libraries' workspaces, fragments
KEPT = ("aten::mm", "aten::addmm", "aten::bmm", "mmrm_fast::trie_attention_fwd", "scaled_dot_product")


@dataclass(frozen=True)
class Memory:
    """Bytes a GPU."""

    weights: float  # sharded: fp32 where trained, else in the dtype that is computed in
    gradients: float  # sharded, fp32
    optimizer: float  # sharded, fp32: two moments
    gathered: float  # whole weights in use, and their gradients before they are reduced
    activations: float  # what the backward pass needs of a full micro-batch

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def needed(memories: Collection[Memory]) -> float:
    """Bytes of all branches: a step holds the activations of one at a time."""
    activations = [memory.activations for memory in memories]
    return sum(memory.total for memory in memories) - sum(activations) + max(activations)


def make_models(config: TrainConfig, num_layers: int | None = None) -> dict[str, RewardModel]:
    """Main model and, where there is one, proxy, as the training makes them but on the meta device.

    Args:
        num_layers: build only so many blocks of vision tower and language model.
    """
    with torch.device("meta"):
        dtype = torch.float32 if config.memory.dtype == "float32" else torch.bfloat16
        main = CheckpointFolder(config.weights.model).model(dtype, num_layers=num_layers)
        freeze(main, config.weights)
        models = {MAIN: main}
        if config.proxy.robust and config.proxy.proxy_model != "lora" and not proxy_file(config.proxy):
            folder = config.weights.model if config.proxy.proxy_model == "full" else Path(config.proxy.proxy_model)
            models[PROXY] = CheckpointFolder(folder).model(dtype, num_layers=num_layers)
            if config.proxy.proxy_image == "none":
                models[PROXY].drop_vision()
            else:
                freeze(models[PROXY], replace(config.weights, freeze_llm=False))
        for model in models.values():
            adapt(model, config.weights)
        if config.proxy.robust and config.proxy.proxy_model == "lora":
            add_lora(main.model.language_model, config.weights, PROXY)
            models = {MAIN: TwoAdapterModel(main)}
    return models


def compute_bytes(config: MemoryConfig) -> int:
    """Bytes of a number that is computed with, on a GPU."""
    return 4 if config.dtype == "float32" else 2


def memory(config: TrainConfig, name: str, model: RewardModel, *, num_gpus: int, tokens: int, tiles: int) -> Memory:
    """What a GPU holds of one model, sharded as `sharding.shard` does it; micro-batches of `tokens` and `tiles`."""
    shards, width = num_gpus / config.memory.replicas, compute_bytes(config.memory)
    trained, frozen = (count(model, trains) / shards for trains in (True, False))
    on_gpu = not config.memory.cpu_offload
    return Memory(
        weights=on_gpu * (4 * trained + width * frozen),
        gradients=on_gpu * 4 * trained,
        optimizer=on_gpu * 8 * trained,
        gathered=0 if num_gpus == 1 and width == 4 and on_gpu else gathered(config.memory, model),
        activations=activations(config, name, tokens, tiles),
    )


def gathered(config: MemoryConfig, model: RewardModel) -> float:
    """Bytes of gathered weights (two blocks, one of them on its way, and the root's) and of unreduced gradients."""
    width = compute_bytes(config)
    parts = list(blocks(model))
    root = count(model) - sum(map(count, parts))
    largest = max(map(count, parts))
    weights = root + 2 * largest if config.reshard_after_forward else count(model)
    root_trained = count(model, True) - sum(count(part, True) for part in parts)
    gradients = max(root_trained, max(count(part, True) for part in parts))
    return width * weights + (width + 4) * gradients  # reduced in fp32


def activations(config: TrainConfig, name: str, tokens: int, tiles: int) -> float:
    """Bytes saved for the backward pass of a micro-batch: language model over `tokens`, vision part over `tiles`."""
    one, two, whole = (make_models(config, layers)[name] for layers in (1, 2, None))
    total = stack_bytes(
        config.memory, len(whole.model.language_model.layers), *(text_pass(m, tokens) for m in (one, two))
    )
    if whole.model.vision_tower is not None:
        layers = len(whole.model.vision_tower.encoder.layer)
        total += stack_bytes(config.memory, layers, *(vision_pass(m, tiles) for m in (one, two)))
    return total


def stack_bytes(config: MemoryConfig, layers: int, one: "Pass", two: "Pass") -> float:
    """Bytes saved by `layers` blocks and what surrounds them, from passes of one and two."""
    mode, block = config.activation_checkpointing, two.saved() - one.saved()
    outside = max(0, one.saved() - block)
    if mode == "none" or not block:
        return layers * block + outside
    kept = one.block_input + (two.kept() - one.kept() if mode == "selective" else 0)
    return layers * kept + block + outside  # one block is recomputed at a time


@dataclass(frozen=True)
class Pass:
    """A forward pass on the meta device."""

    run: Callable[[], torch.Tensor]
    model: RewardModel
    block_input: int  # bytes

    def saved(self) -> int:
        """Bytes that autograd saves, without weights."""
        weights = {parameter.untyped_storage()._cdata for parameter in self.model.parameters()}
        saved = {}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage  # held, so that its address is not used again
            return tensor

        with saved_tensors_hooks(save, lambda tensor: tensor):
            self.run()
        return sum(storage.nbytes() for storage in saved.values())

    def kept(self) -> int:
        """Bytes that selective checkpointing keeps: outputs of matrix products and attention."""
        with OutputCounter() as counter:
            self.run()
        return counter.bytes


class OutputCounter(TorchDispatchMode):
    """Adds up the outputs of the operations in `KEPT`."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if any(name in op.name() for name in KEPT):
            outputs = out if isinstance(out, tuple) else (out,)
            self.bytes += sum(value.nbytes for value in outputs if isinstance(value, torch.Tensor))
        return out


def text_pass(model: RewardModel, tokens: int) -> Pass:
    """The language model over `tokens`."""
    hidden = model.model.config.text_config.hidden_size
    with torch.device("meta"):
        ends, places = torch.zeros(2, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int64)
        embeds = torch.zeros(1, tokens, hidden, dtype=model.model.dtype, requires_grad=True)
    plan = {"cu_seqlens_q": ends, "kv_index": places, "cu_seqlens_k": ends}
    plan |= {"max_seqlen_q": tokens, "max_seqlen_k": tokens}

    def run() -> torch.Tensor:
        return model.model.language_model(
            inputs_embeds=embeds, position_ids=places[None], use_cache=False, **plan
        ).last_hidden_state

    return Pass(run, model, embeds.nbytes)


def vision_pass(model: RewardModel, tiles: int) -> Pass:
    """Vision tower and projector over `tiles`."""
    vision = model.model.config.vision_config
    side, patch = vision.image_size[0], vision.patch_size[0]
    pixels = torch.zeros(tiles, side, side, 3, dtype=torch.uint8, device="meta")
    rows = tiles * ((side // patch) ** 2 + 1)
    return Pass(
        lambda: model.project(model.tower_output(pixels)), model, rows * vision.hidden_size * model.model.dtype.itemsize
    )


def count(module: nn.Module, trained: bool | None = None) -> int:
    """Parameters of a module, all or those that are (not) trained."""
    return sum(p.numel() for p in module.parameters() if trained is None or p.requires_grad == trained)
