"""A model's parameters from a folder's tensors: filled one by one, of a sharded model this rank's rows alone."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrm_fast.checkpoint import internvl_chat
from mmrm_fast.checkpoint.internvl_chat import EMBEDDING, LM_HEAD, SCORE, Source
from mmrm_fast.checkpoint.tensors import TensorFolder
from mmrm_fast.model.decoder import renew_rope
from mmrm_fast.model.reward_model import RewardModel, new_score

ORIGINAL = "internvl_chat"
PROXY = "bias_reward_model."
POSITIONS = "vision_tower.embeddings.position_embeddings"
VISION_PARTS = ("vision_model.", "mlp1.", "vision_tower.", "multi_modal_projector.")
UNUSED = re.compile(r"^(language_model\.)?(lm_head|output)\.|rotary_emb\.\w*inv_freq$|\.position_ids$")
VALUES_AT_A_TIME = 1 << 24


def load_weights(
    model: RewardModel, folder: str | Path, *, device: torch.device | str = "cpu", proxy: bool = False
) -> None:
    """Fill a model on the meta device from a folder; of sharded parameters only this rank's rows are read.

    A new score head is drawn from torch's generator, the same on every rank for the same seed. Token embedding rows
    that the folder does not have are the mean of those it has.

    Args:
        model: built by `load_checkpoint(folder, with_weights=False)`, then possibly without its vision part, frozen,
            sharded.
        device: where the weights go.
        proxy: see `weights.load_checkpoint`.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the model.
    """
    tensors = read_tensors(Path(folder), proxy=proxy)
    sources = weight_sources(model, is_original=is_original(Path(folder)))
    check_tensors(tensors, sources, model)
    model.to_empty(device=device)
    renew_rope(model.model.language_model, device)
    for name, parameter in model.named_parameters():
        name = native_name(name)
        fill(parameter, name, sources[name], tensors)


def is_original(folder: Path) -> bool:
    """Whether a folder is of the original `internvl_chat` layout."""
    return read_json(folder / "config.json").get("model_type") == ORIGINAL


def read_json(path: Path) -> dict:
    """A JSON object from a file of a checkpoint folder."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name}; expected a checkpoint folder")
    return json.loads(path.read_text(encoding="utf-8"))


def native_name(name: str) -> str:
    """A parameter of `RewardModel` as its folder names it."""
    return name.removeprefix("model.")


def read_tensors(folder: Path, *, proxy: bool = False) -> TensorFolder:
    """A folder's tensors: of the main branch or of the proxy, under the names of `convert` or of `InternVLModel`."""
    settings = read_json(folder / "config.json")
    if settings.get("model_type") == ORIGINAL:
        return TensorFolder(folder, original_name(PROXY if proxy else ""), lora_scale=lora_scale(folder, settings))
    return TensorFolder(folder, plain_name)


def original_name(prefix: str) -> Callable[[str], str | None]:
    """Names of an original folder: those of the branch under `prefix`, without it."""

    def rename(name: str) -> str | None:
        if name.startswith(PROXY) != bool(prefix):
            return None
        return name.removeprefix(prefix)

    return rename


def plain_name(name: str) -> str:
    """A native folder's name as `InternVLModel` has it; transformers saved three layouts over time."""
    name = name.removeprefix("model.")
    for part in (LM_HEAD, SCORE):
        if name == "language_model." + part:
            return part
    return re.sub(r"^language_model\.model\.", "language_model.", name)


def lora_scale(folder: Path, settings: dict) -> float:
    """alpha / rank of LoRA adapters: adapter_config.json says it, else config.json, else InternVL's own 2."""
    path = folder / "adapter_config.json"
    adapter = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    if "lora_alpha" not in adapter:
        return 2.0
    rank = (
        adapter.get("r") or adapter.get("lora_r") or settings.get("use_llm_lora") or settings.get("use_backbone_lora")
    )
    return adapter["lora_alpha"] / (rank**0.5 if adapter.get("use_rslora") else rank)


def weight_sources(model: RewardModel, *, is_original: bool) -> dict[str, Source]:
    """Where each of the model's parameters is in a folder, by native name."""
    names = [native_name(name) for name, _ in model.named_parameters()]
    config = model.model.config
    return {name: internvl_chat.source(name, config) if is_original else Source(name) for name in names}


def check_tensors(tensors: TensorFolder, sources: dict[str, Source], model: RewardModel) -> None:
    """Raise `ValueError` unless every parameter has its tensor, in its shape, and every tensor a place."""
    folder = tensors.folder
    packed_rows = {}
    for where in sources.values():
        if where.spans:
            packed_rows[where.name] = max(packed_rows.get(where.name, 0), where.spans[-1][1])
    for name, parameter in model.named_parameters():
        name = native_name(name)
        where, expected = sources[name], tuple(parameter.shape)
        if where.spans:
            expected = (packed_rows[where.name], *expected[1:])
        if where.name not in tensors:
            if name == SCORE:
                continue
            raise ValueError(f"{folder}: no tensor {where.name}, expected {list(expected)} for {name}")
        actual = tensors.shape(where.name)
        grows = name == EMBEDDING and actual[0] < expected[0] and actual[1:] == expected[1:]
        if actual != expected and not grows and name != POSITIONS:
            raise ValueError(f"{folder}: {where.name} is {list(actual)}, expected {list(expected)} for {name}")
    check_all_used(tensors, sources, has_vision=model.model.vision_tower is not None)


def check_all_used(tensors: TensorFolder, sources: dict[str, Source], *, has_vision: bool) -> None:
    """Raise `ValueError` for a tensor that is no parameter's, but for the vocabulary head and such."""
    known = {where.name for where in sources.values()}
    left = [name for name in tensors.places if name not in known and not UNUSED.search(name)]
    left = [name for name in left if has_vision or not name.startswith(VISION_PARTS)]
    if left:
        raise ValueError(f"{tensors.folder}: {len(left)} tensors have no place in the model, such as {min(left)}")


@torch.no_grad()
def fill(parameter: Tensor, name: str, where: Source, tensors: TensorFolder) -> None:
    """Copy a parameter's rows, or this rank's, from the folder."""
    local, start = local_rows(parameter)
    stop = start + len(local)
    if where.name not in tensors:
        local.copy_(new_score(parameter.shape[1])[start:stop])
    elif name == POSITIONS:
        local.copy_(resized_positions(tensors.whole(where.name), parameter.shape[1])[start:stop])
    elif name in (EMBEDDING, LM_HEAD):
        present = min(tensors.shape(where.name)[0], stop)
        copy_spans(local, [(start, present)], where.name, tensors)
        if present < stop:
            local[max(present - start, 0) :] = mean_row(where.name, tensors)
    else:
        spans = where.spans or ((0, parameter.shape[0]),)
        copy_spans(local, list(part_of_spans(spans, start, stop)), where.name, tensors)


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


def copy_spans(local: Tensor, spans: list[tuple[int, int]], name: str, tensors: TensorFolder) -> None:
    """Copy spans of a tensor's rows one after another, a bounded number of values at a time."""
    step = max(VALUES_AT_A_TIME // max(local[:1].numel(), 1), 1)
    place = 0
    for first, last in spans:
        for start in range(first, last, step):
            rows = tensors.rows(name, start, min(start + step, last))
            local[place : place + len(rows)].copy_(rows)
            place += len(rows)


def mean_row(name: str, tensors: TensorFolder) -> Tensor:
    """The mean of a tensor's rows in float64."""
    rows, width = tensors.shape(name)
    step = max(VALUES_AT_A_TIME // width, 1)
    parts = (tensors.rows(name, start, min(start + step, rows)) for start in range(0, rows, step))
    return sum(part.sum(0, dtype=torch.float64) for part in parts) / rows


def resized_positions(positions: Tensor, count: int) -> Tensor:
    """Position embeddings [1, 1 + patches, D] for another number of patches, CLS kept, bicubic as InternVL does it."""
    if positions.shape[1] == count:
        return positions
    old, new = (math.isqrt(size - 1) for size in (positions.shape[1], count))
    grid = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], 1)
