"""A model over several devices: blocks one after another, hidden states copied to where the next ones begin.

One process runs all of them, so that scoring and serving stay one path at any size, and a reward is the same bits. What
ends a forward is on the last device: the first need not wait for it, and begins the next forward meanwhile.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmrm_fast.model.reward_model import RewardModel

GIB = 1 << 30
FILLED = 0.9  # of a GPU at most, by the weights


def device_numbers(model: RewardModel, num_devices: int) -> dict[nn.Module, int]:
    """The number of each module's device: blocks are cut by bytes, embedding and projector are on the first."""
    numbers, total = dict.fromkeys(model.modules(), 0), nbytes(model)
    before = total - sum(map(nbytes, model.blocks()))
    for block in model.blocks():
        numbers |= dict.fromkeys(block.modules(), int((before + nbytes(block) / 2) / total * num_devices))
        before += nbytes(block)
    return numbers | dict.fromkeys(last_modules(model), num_devices - 1)


def last_modules(model: RewardModel) -> list[nn.Module]:
    """What ends a forward."""
    return [model.model.language_model.norm, *model.heads()]


def nbytes(module: nn.Module, **which: bool) -> int:
    return sum(parameter.nbytes for parameter in module.parameters(**which))


def shares(model: RewardModel, num_devices: int) -> list[int]:
    """Bytes of the weights on each device."""
    held = [0] * num_devices
    for module, number in device_numbers(model, num_devices).items():
        held[number] += nbytes(module, recurse=False)
    return held


def fewest_devices(model: RewardModel, memories: Sequence[float], *, path: object, at_least: int = 1) -> int:
    """How many of the GPUs with so many bytes hold a model and a forward of it; `ValueError` where all do not."""
    for count in range(at_least, len(memories) + 1):
        if has_room(shares(model, count), memories):
            return count
    held, least = shares(model, len(memories)), min(memories)
    more = range(len(memories) + 1, len(model.blocks()))
    enough = next((count for count in more if has_room(shares(model, count), [least] * count)), None)
    remedy = f", such as {enough} (--gpus-per-actor {enough})" if enough else ""
    raise ValueError(
        f"{path}: its weights take {sum(held) / GIB:.1f} GiB, on {len(memories)} GPU(s) up to {max(held) / GIB:.1f} of "
        f"the {least / GIB:.1f} of one, of which they may fill nine tenths: use GPUs with more memory, or more{remedy}"
    )


def has_room(held: Sequence[int], memories: Sequence[float]) -> bool:
    """Whether weights leave room for a forward on each device."""
    return all(size <= FILLED * memory for size, memory in zip(held, memories, strict=False))


def place(model: RewardModel, devices: Sequence[torch.device]) -> None:
    """Give a model of the meta device its memory on several others, and let what its modules are called with follow."""
    own = {module: devices[number] for module, number in device_numbers(model, len(devices)).items()}
    for module, device in own.items():
        module.to_empty(device=device, recurse=False)
    vision = [] if model.is_text else [model.model.vision_tower.layernorm, model.model.multi_modal_projector]
    copies = Copies()
    for module in (*model.blocks(), *vision, *last_modules(model)):
        module.register_forward_pre_hook(partial(copies.follow, own[module]), with_kwargs=True)
    model.register_forward_hook(copies.forget, always_call=True)


class Copies:
    """What modules are called with, on their own devices.

    Of a keyword argument, such as the packing plan, each device gets one copy a forward: a copy a block would let the
    first device wait for the last block.
    """

    def __init__(self):
        self.made: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # with its source, whose id is the key

    def follow(self, device: torch.device, module: nn.Module, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        return (
            tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), args),
            tree_map_only(Tensor, partial(self.once, device), kwargs),
        )

    def once(self, device: torch.device, tensor: Tensor) -> Tensor:
        key = id(tensor), device
        if key not in self.made:
            self.made[key] = tensor, tensor.to(device, non_blocking=True)
        return self.made[key][1]

    def forget(self, *about) -> None:
        self.made.clear()
