"""A model's parameters from a folder's tensors: filled one by one, of a sharded model this rank's rows alone."""

import math
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mmrm_fast.checkpoint import internvl_chat
from mmrm_fast.checkpoint.internvl_chat import EMBEDDING, LM_HEAD, SCORE, Source
from mmrm_fast.checkpoint.tensors import TensorFolder
from mmrm_fast.model.decoder import renew_rope
from mmrm_fast.model.lora import begun, is_stored
from mmrm_fast.model.placement import place
from mmrm_fast.model.reward_model import RewardModel, new_score

POSITIONS = "vision_tower.embeddings.position_embeddings"
VISION_PARTS = ("vision_model.", "mlp1.", "vision_tower.", "multi_modal_projector.")
UNUSED = re.compile(r"^(language_model\.)?(lm_head|output)\.|rotary_emb\.\w*inv_freq$|\.position_ids$")
VALUES_AT_A_TIME = 1 << 24


def native_name(name: str) -> str:
    """A parameter of `RewardModel`, of which layers may have adapters, as its folder names it."""
    return name.removeprefix("model.").replace(".base_layer.", ".")


class NativeTensors:
    """A folder's tensors under the native names of a model's parameters, adapters merged, packed ones taken apart.

    Raises `ValueError` where a tensor is missing, has another shape, or has no place in the model.
    """

    def __init__(self, tensors: TensorFolder, model: RewardModel, *, is_original: bool):
        self.tensors = tensors
        own = filter(lambda named: is_stored(named[0]), model.named_parameters())
        self.shapes = {native_name(name): tuple(parameter.shape) for name, parameter in own}
        config = model.model.config
        find = (lambda name: internvl_chat.source(name, config)) if is_original else Source
        self.sources = {name: find(name) for name in (*self.shapes, LM_HEAD)}
        self.check_shapes()
        self.check_all_used(has_vision=model.model.vision_tower is not None)

    def __contains__(self, name: str) -> bool:
        return self.sources[name].name in self.tensors

    def stored(self) -> list[str]:
        """Native names of what is stored: of a score and a vocabulary head where the folder has them."""
        return [name for name in self.sources if name in self]

    def shape(self, name: str) -> tuple[int, ...]:
        """A native tensor's shape."""
        return self.shapes[EMBEDDING if name == LM_HEAD else name]

    def check_shapes(self) -> None:
        """Raise `ValueError` unless every parameter but a score has its tensor, in its shape."""
        packed_rows: dict[str, int] = {}
        for where in self.sources.values():
            if where.spans:
                packed_rows[where.name] = max(packed_rows.get(where.name, 0), where.spans[-1][1])
        for name, expected in self.shapes.items():
            where = self.sources[name]
            if where.spans:
                expected = (packed_rows[where.name], *expected[1:])
            if name in self:
                actual = self.tensors.shape(where.name)
                grows = name == EMBEDDING and actual[0] < expected[0] and actual[1:] == expected[1:]
                if actual == expected or grows or name == POSITIONS:
                    continue
                found = f"{where.name} is {list(actual)}"
            elif name == SCORE:
                continue
            else:
                found = f"no tensor {where.name}"
            raise ValueError(f"{self.tensors.folder}: {found}, expected {list(expected)} for {name}")

    def check_all_used(self, *, has_vision: bool) -> None:
        """Raise `ValueError` for a tensor that is no parameter's, but for the vocabulary head and such."""
        known = {where.name for where in self.sources.values()}
        left = [name for name in self.tensors.names() if name not in known and not UNUSED.search(name)]
        left = [name for name in left if has_vision or not name.startswith(VISION_PARTS)]
        if left:
            folder = self.tensors.folder
            raise ValueError(f"{folder}: {len(left)} tensors have no place in the model, such as {min(left)}")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        return self.tensors.dtype(self.sources[name].name)

    def value(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        value = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.copy_to(value, name)
        return value

    @torch.no_grad()
    def copy_to(self, parameter: Tensor, name: str) -> None:
        """Copy a tensor's rows, or those that this rank holds of a sharded parameter; a score may be drawn."""
        where, (local, start) = self.sources[name].name, local_rows(parameter)
        stop = start + len(local)
        if where not in self.tensors:
            local.copy_(new_score(parameter.shape[1])[start:stop])
        elif name == POSITIONS:
            local.copy_(resized_positions(self.tensors.whole(where), parameter.shape[1])[start:stop])
        elif name in (EMBEDDING, LM_HEAD):
            present = min(self.tensors.shape(where)[0], stop)
            copy_spans(local, [(start, present)], where, self.tensors)
            if present < stop:
                local[max(present - start, 0) :] = mean_row(where, self.tensors)
        else:
            spans = self.sources[name].spans or ((0, parameter.shape[0]),)
            copy_spans(local, part_of_spans(spans, start, stop), where, self.tensors)


def fill_model(model: RewardModel, native: NativeTensors, *devices: torch.device | str) -> None:
    """Fill a model on the meta device, possibly frozen, sharded and with adapters; over several devices, see `place`.

    A new score head and adapters are drawn from torch's generator, the same on every rank for the same seed. Token
    embedding rows that the folder does not have are the mean of those it has.
    """
    if len(devices) > 1:
        place(model, devices)
    else:
        model.to_empty(device=devices[0])
    renew_rope(model.model.language_model, devices[0])
    for name, parameter in model.named_parameters():
        if is_stored(name):
            native.copy_to(parameter, native_name(name))
    for name, parameter in model.named_parameters():
        if not is_stored(name):
            local, start = local_rows(parameter)
            local.copy_(begun(name, tuple(parameter.shape))[start : start + len(local)])


@torch.no_grad()
def vision_output(model: RewardModel, native: NativeTensors, tiles_ISSC: Tensor) -> Tensor:
    """What a model's vision tower makes of tiles, on the CPU; it alone is filled of a model on the meta device."""
    tower = model.model.vision_tower.to_empty(device="cpu")
    for name, parameter in tower.named_parameters():
        native.copy_to(parameter, f"vision_tower.{name}")
    return model.tower_output(tiles_ISSC)


def local_rows(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """The part of a parameter that this rank holds, and its first row in the whole (FSDP2 shards rows)."""
    if not hasattr(parameter, "placements"):
        return parameter.data, 0
    mesh, start, rows = parameter.device_mesh, 0, parameter.shape[0]
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            assert placement.dim == 0
            chunk = -(-rows // mesh.size(dim))
            first = min(mesh.get_local_rank(dim) * chunk, rows)
            start, rows = start + first, min(chunk, rows - first)
    return parameter.data.to_local(), start


def part_of_spans(spans: tuple[tuple[int, int], ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The source rows that hold rows `start` to `stop` of the spans' concatenation."""
    place = 0
    for first, last in spans:
        low, high = max(start - place, 0), min(stop - place, last - first)
        if low < high:
            yield first + low, first + high
        place += last - first


def pieces(name: str, first: int, last: int, tensors: TensorFolder) -> Iterator[Tensor]:
    """Rows of a tensor, a bounded number of values at a time."""
    step = max(VALUES_AT_A_TIME // max(math.prod(tensors.shape(name)[1:]), 1), 1)
    for start in range(first, last, step):
        yield tensors.rows(name, start, min(start + step, last))


def copy_spans(local: Tensor, spans: Iterable[tuple[int, int]], name: str, tensors: TensorFolder) -> None:
    """Copy spans of a tensor's rows one after another."""
    place = 0
    for rows in (rows for first, last in spans for rows in pieces(name, first, last, tensors)):
        local[place : place + len(rows)].copy_(rows)
        place += len(rows)


def mean_row(name: str, tensors: TensorFolder) -> Tensor:
    """The mean of a tensor's rows in float64."""
    count = tensors.shape(name)[0]
    return sum(part.sum(0, dtype=torch.float64) for part in pieces(name, 0, count, tensors)) / count


def resized_positions(positions: Tensor, count: int) -> Tensor:
    """Position embeddings [1, 1 + patches, D] for another number of patches, CLS kept, bicubic as InternVL does it."""
    if positions.shape[1] == count:
        return positions
    old, new = (math.isqrt(size - 1) for size in (positions.shape[1], count))
    grid = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], 1)
