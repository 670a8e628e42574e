"""Safetensors of a checkpoint folder: found by name, read by rows, written in shards. Nothing else is ever opened."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmrm_fast.files import read_json, refuse_pointer

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLE_REMEDY = (
    'python -c "import torch; from safetensors.torch import save_file as s;'
    " s({k: v.contiguous().clone() for k, v in torch.load('pytorch_model.bin', weights_only=True).items()},"
    " 'model.safetensors')\""
)
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")  # of LLaMA-Factory's reward models
SHARD_BYTES = 5 * 10**9
LORA = re.compile(r"\.lora_([AB])(?:\.\w+)?\.weight$")
PEFT = re.compile(r"base_model\.model\.|base_layer\.|modules_to_save\.default\.")  # what its wrappers put into a name
EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(?:gate|up|down)_proj\.weight$")
STACKED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # the weights of all experts of a layer
EXPERTS_APART = ("qwen2_moe", "qwen3_moe")  # text models whose experts transformers stores one by one


class TensorFolder:
    """The tensors of a folder's safetensors files, under the names that `rename` gives them.

    LoRA adapters of peft (`lora_A`, `lora_B` beside `base_layer`) are added to the weights they adapt as rows are read.
    A layer's experts that are stored one by one are a tensor of all, with one of them a row, as transformers computes.

    Args:
        rename: a stored name to the name it goes by; None leaves the tensor out.
        lora_scale: alpha / rank of adapters.

    Raises:
        ValueError: no safetensors, an index that names a file outside of the folder, an expert without its weights, or
            a reward head in a file of its own.
    """

    def __init__(
        self, folder: Path, rename: Callable[[str], str | None] = lambda name: name, *, lora_scale: float = 1.0
    ):
        self.folder, self.lora_scale, self.files = folder, lora_scale, {}
        self.places: dict[str, tuple[str, str]] = {}  # name: file, stored name
        self.adapters: dict[str, dict[str, tuple[str, str]]] = {}  # adapted name: "A" or "B": file, stored name
        for stored, file in stored_names(folder).items():
            adapter = LORA.search(stored)
            name = rename(PEFT.sub("", LORA.sub(".weight", stored)))
            if name is None or ".original_module." in stored:
                continue
            if adapter:
                self.adapters.setdefault(name, {})[adapter[1]] = (file, stored)
            else:
                self.places[name] = (file, stored)
        self.stacks = expert_stacks(self.places)  # name: each expert's parts
        missing = [
            part for stack in self.stacks.values() for parts in stack for part in parts if part not in self.places
        ]
        if missing:
            raise ValueError(f"{folder}: no tensor {missing[0]}")
        if found := [head for head in VALUE_HEADS if (folder / head).is_file() and "score.weight" not in self.places]:
            raise ValueError(
                f"{folder}: {found[0]} holds the reward head; put its v_head.summary.weight into {WEIGHTS} as"
                " score.weight, which leaves its bias out of all rewards, or remove it to begin with a new head"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.places or name in self.stacks

    def names(self) -> list[str]:
        """The names of all tensors."""
        return [*self.stacks, *(name for name in self.places if not EXPERT.match(name))]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it. Raises `ValueError` for experts of different shapes."""
        if name not in self.stacks:
            return tuple(self.slice(*self.places[name]).get_shape())
        shapes = {tuple(map(self.shape, parts)): parts for parts in self.stacks[name][::-1]}
        if len(shapes) > 1:
            raise ValueError(f"{self.folder}: {' and '.join(parts[0] for parts in shapes.values())} differ in shape")
        (parts,) = shapes
        return len(self.stacks[name]), sum(rows for rows, _ in parts), parts[0][1]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in."""
        first = self.stacks[name][0][0] if name in self.stacks else name
        return self.slice(*self.places[first])[:0].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, adapters added in fp32."""
        if name in self.stacks:
            return torch.stack([torch.cat(list(map(self.whole, parts))) for parts in self.stacks[name][start:stop]])
        rows = self.slice(*self.places[name])[start:stop]
        adapter = self.adapters.get(name)
        if adapter is None:
            return rows
        a, b = self.slice(*adapter["A"])[:], self.slice(*adapter["B"])[start:stop]
        return rows.float() + self.lora_scale * (b.float() @ a.float())

    def whole(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def slice(self, file: str, stored: str):
        """safetensors' lazy slice of a stored tensor."""
        if file not in self.files:
            self.files[file] = open_tensors(self.folder / file)
        return self.files[file].get_slice(stored)


def expert_stacks(names: Iterable[str]) -> dict[str, list[list[str]]]:
    """The names of each expert's parts, by the name of all experts' weights of a layer."""
    counts: dict[str, int] = {}
    for layer, number in (found.groups() for found in map(EXPERT.match, names) if found):
        counts[layer] = max(counts.get(layer, 0), int(number) + 1)
    return {
        f"{layer}.{name}": [[f"{layer}.{number}.{part}_proj.weight" for part in parts] for number in range(count)]
        for layer, count in counts.items()
        for name, parts in STACKED.items()
    }


def as_stored(tensors: Iterable[tuple[str, Tensor]], text_model: str) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors as transformers stores them: experts one by one where its `text_model` has them so."""
    for name, value in tensors:
        layer, _, own = name.rpartition(".")
        if text_model not in EXPERTS_APART or own not in STACKED or not layer.endswith(".experts"):
            yield name, value
            continue
        for number, expert in enumerate(value):
            for part, rows in zip(STACKED[own], expert.chunk(len(STACKED[own])), strict=True):
                yield f"{layer}.{number}.{part}_proj.weight", rows


def open_tensors(path: Path):
    """safetensors' reader of a file. Raises `ValueError` for what is not one."""
    refuse_pointer(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None


def stored_names(folder: Path) -> dict[str, str]:
    """Stored tensor names of a folder and the file that holds each. Raises `ValueError`, see `TensorFolder`."""
    index, single = folder / WEIGHTS_INDEX, folder / WEIGHTS
    if index.is_file():
        names = read_json(index).get("weight_map", {})
        for file in set(names.values()):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{index}: names the file {file!r}; expected a safetensors file of this folder")
            if not (folder / file).is_file():
                raise ValueError(f"{index}: names {file}, which is not there")
        return names
    if single.is_file():
        return dict.fromkeys(open_tensors(single).keys(), WEIGHTS)
    for name in PICKLES:
        if (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is a pickle, which can run code; convert it there: {PICKLE_REMEDY}")
    raise ValueError(f"{folder}: no {WEIGHTS}; weights are read from safetensors only")


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors in place of a folder's: one safetensors file, or shards with an index, one in memory at a time."""
    for path in (*folder.glob("model-*.safetensors"), folder / WEIGHTS, folder / WEIGHTS_INDEX):
        path.unlink(missing_ok=True)
    written, total = [], 0
    for number, shard in enumerate(shards_of(tensors), 1):
        path = folder / f"model-{number:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors would leave it to its owner
        total += sum(value.nbytes for value in shard.values())
        written.append((path, list(shard)))
        shard.clear()
    weight_map = {}
    for number, (path, names) in enumerate(written, 1):
        file = WEIGHTS if len(written) == 1 else f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shards_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors of at most `SHARD_BYTES` together; a larger one alone."""
    shard, size = {}, 0
    for name, value in tensors:
        if shard and size + value.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name], size = value.contiguous(), size + value.nbytes
    yield shard
