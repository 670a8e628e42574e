"""Rewards and gradients of the shipped checkpoint on a device: packed, and padded by transformers' own modules.

Shapes: R responses, L tokens of the longest, D hidden size.
"""

import copy
import io
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import InternVLModel

from mmrm_fast.checkpoint.folder import Checkpoint, CheckpointFolder
from mmrm_fast.data.packing import pack_items
from mmrm_fast.data.records import Group, parse_group
from mmrm_fast.data.samples import Preparer
from mmrm_fast.doctor.checks import Check, Found, judged
from mmrm_fast.model.decoder import renew_rope
from mmrm_fast.model.vision import normalized
from mmrm_fast.train.command import TINY_CHECKPOINT

CPU = torch.device("cpu")
TIMES_PADDED = 3.0  # errors of the padded forward, which differ by chance
SAME = 1e-5  # of fp32 rewards

Path = Callable[[Checkpoint, torch.device], tuple[Tensor, list[Tensor]]]


def reward_checks(device: torch.device) -> Iterator[Check]:
    """Checks of rewards and gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        for number, what in enumerate(("rewards", "gradients")):
            name = f"packed against padded, {what}, {str(dtype).removeprefix('torch.')}"
            yield Check(name, partial(against_padded, device, dtype, number))
    yield Check("rewards of the shipped checkpoint against the CPU's, float32", partial(against_cpu, device))


def against_padded(device: torch.device, dtype: torch.dtype, number: int) -> Found:
    """How far the packed forward's rewards (or gradients) are from float64, in errors of the padded one's."""
    exact = computed(torch.float64, padded, CPU)[number]
    theirs, ours = ((computed(dtype, path, device)[number] - exact).norm() for path in (padded, packed))
    return judged(float(ours / (theirs + torch.finfo(dtype).eps * exact.norm())), TIMES_PADDED)


def against_cpu(device: torch.device) -> Found:
    """The largest difference of a reward, over the largest."""
    exact, rewards = computed(torch.float64, packed, CPU)[0], computed(torch.float32, packed, device)[0]
    return judged(float((rewards - exact).abs().max() / exact.abs().max()), SAME)


@cache
def computed(dtype: torch.dtype, path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rewards [R] and all gradients of their weighted sum, float64 on the CPU."""
    checkpoint = shipped(dtype)
    checkpoint.model.to(device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which convolutions use, and products do not
        rewards, parameters = path(checkpoint, device)
        (rewards * torch.arange(1.0, 1 + len(rewards), device=device)).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return rewards.detach().double().cpu(), torch.cat([grad.double().cpu().flatten() for grad in grads])


def packed(checkpoint: Checkpoint, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Rewards by packing, and the parameters."""
    preparer = preparer_of(checkpoint)
    batch = pack_items(preparer, records(3), preparer.whole).batch.to(device)
    return checkpoint.model(batch.main, batch.tiles), list(checkpoint.model.parameters())


def padded(checkpoint: Checkpoint, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Rewards of a right-padded batch whose rows have pixels of their own, and the parameters.

    No mask: under causal attention nothing sees the padding to its right.
    """
    model, twin = checkpoint.model, untouched(checkpoint.model.model)
    preparer, rows, tiles = preparer_of(checkpoint), [], []
    for group in records(3):
        sample, own = preparer.whole(group)
        for keys in sample.main.sequences:
            rows.append(torch.from_numpy(np.where(keys < 0, twin.config.image_token_id, keys)))
            tiles += map(torch.from_numpy, own)
    ids_RL = pad_sequence(rows, batch_first=True).to(device)
    pixels = normalized(torch.cat(tiles).to(device), model.pixel_mean, model.pixel_std, twin.dtype)
    hidden_RLD = twin(input_ids=ids_RL, pixel_values=pixels, use_cache=False).last_hidden_state
    last = torch.tensor([number * ids_RL.shape[1] + len(row) - 1 for number, row in enumerate(rows)], device=device)
    return model.score(hidden_RLD.flatten(0, 1), last), [*twin.parameters(), model.score.weight]


def untouched(model: InternVLModel) -> InternVLModel:
    """A model of transformers' own modules, with the weights and on the device of one that is prepared for packing."""
    config = copy.deepcopy(model.config)
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "sdpa"
    twin = InternVLModel(config).to(model.device, model.dtype)
    twin.load_state_dict(model.state_dict())
    renew_rope(twin.language_model, model.device)  # which a dtype of weights has rounded
    return twin


def shipped(dtype: torch.dtype) -> Checkpoint:
    """The shipped checkpoint on the CPU, whose weights bf16 holds exactly; its score is drawn, always the same."""
    torch.manual_seed(0)
    return CheckpointFolder(TINY_CHECKPOINT).load(dtype=dtype)


def records(count: int, side: int = 60) -> list[Group]:
    """Pairs about pictures of different shapes, the first of three about none."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side * (1 + number % 3), side, 3), np.uint8)).save(file, "JPEG")
        fields = {"prompt": f"What is in picture {number}? " * 4, "images": [file.getvalue()] * (number % 3 > 0)}
        fields |= {"chosen": "two red circles " * (1 + number % 9), "rejected": "I think it is blue"}
        found.append(parse_group(fields, source=f"record {number}", record=number))
    return found


def preparer_of(checkpoint: Checkpoint, *, with_text: bool = False) -> Preparer:
    """How records become a batch of a checkpoint's."""
    return Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, with_text=with_text, pairs="all")
