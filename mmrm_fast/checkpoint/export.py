"""Folders to folders, tensor by tensor: any checkpoint to the native layout, to vLLM's and to the original one."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmrm_fast.checkpoint import internvl_chat
from mmrm_fast.checkpoint.folder import Checkpoint, load_checkpoint, read_json, save_settings
from mmrm_fast.checkpoint.internvl_chat import EMBEDDING, LM_HEAD, SCORE, Source
from mmrm_fast.checkpoint.parameters import (
    PROXY,
    check_tensors,
    fill,
    is_original,
    native_name,
    read_tensors,
    weight_sources,
)
from mmrm_fast.checkpoint.tensors import TensorFolder, stored_names, write_tensors
from mmrm_fast.checkpoint.tokenizer import SPACE
from mmrm_fast.model.reward_model import original_facts

Progress = Callable[[Iterable], Iterable]
VLLM_ARCHITECTURE = "InternVLForSequenceClassification"


@dataclass(frozen=True)
class Stored:
    """A folder's tensors by native name, as they are stored, with the vocabulary head where it has one."""

    checkpoint: Checkpoint  # without weights
    tensors: TensorFolder
    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]

    def value(self, name: str) -> Tensor:
        """One native tensor, adapters merged."""
        where = self.sources[name]
        value = torch.empty(self.shapes[name], dtype=self.dtype(name))
        fill(value, name, where, self.tensors)
        return value

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a native tensor is stored in."""
        return self.tensors.dtype(self.sources[name].name)

    def nbytes(self, name: str) -> int:
        """Bytes of a native tensor."""
        return int(np.prod(self.shapes[name])) * self.dtype(name).itemsize


def open_stored(folder: Path, *, proxy: bool = False) -> Stored:
    """A folder's tensors; every one that the model needs is there. Raises `ValueError`."""
    checkpoint = load_checkpoint(folder, with_weights=False)
    tensors = read_tensors(folder, proxy=proxy)
    sources = weight_sources(checkpoint.model, is_original=is_original(folder))
    check_tensors(tensors, sources, checkpoint.model)
    shapes = {native_name(name): tuple(value.shape) for name, value in checkpoint.model.named_parameters()}
    head = internvl_chat.source(LM_HEAD, checkpoint.model.model.config) if is_original(folder) else Source(LM_HEAD)
    if head.name in tensors:
        sources[LM_HEAD], shapes[LM_HEAD] = head, shapes[EMBEDDING]
    if SCORE not in tensors:
        del sources[SCORE], shapes[SCORE]
    return Stored(checkpoint, tensors, sources, shapes)


def convert_folder(source: Path, target: Path, *, progress: Progress = iter) -> None:
    """Write a folder's native twin, and its text-only proxy, where the reference implementation saved one, in `proxy/`.

    Raises:
        ValueError: not a checkpoint; the message names what is wrong.
    """
    write_native(open_stored(source), target, progress=progress)
    if has_proxy(source):
        write_native(open_stored(source, proxy=True), target / "proxy", progress=progress)


def has_proxy(folder: Path) -> bool:
    """Whether a folder holds the reference implementation's text-only branch."""
    return any(name.startswith(PROXY) for name in stored_names(folder))


def write_native(stored: Stored, target: Path, *, progress: Progress) -> None:
    """Write the native layout."""
    target.mkdir(parents=True, exist_ok=True)
    sizes = {name: stored.nbytes(name) for name in stored.shapes}
    write_tensors(target, ((name, stored.value(name)) for name in progress(sizes)), sizes)
    save_settings(target, stored.checkpoint)


def export_vllm(source: Path, target: Path, *, progress: Progress = iter) -> None:
    """Write the native layout under the names and the architecture that vLLM's sequence classification reads."""
    stored = open_stored(source)
    target.mkdir(parents=True, exist_ok=True)
    names = {vllm_name(name): name for name in stored.shapes if name != LM_HEAD}
    sizes = {theirs: stored.nbytes(ours) for theirs, ours in names.items()}
    write_tensors(target, ((theirs, stored.value(names[theirs])) for theirs in progress(sizes)), sizes)
    save_settings(target, stored.checkpoint)
    rewrite_json(target / "config.json", {"architectures": [VLLM_ARCHITECTURE]})


def vllm_name(name: str) -> str:
    """A native tensor's name below transformers' `InternVLForConditionalGeneration`."""
    return name if name == SCORE else "model." + name


def export_original(source: Path, target: Path, *, progress: Progress = iter) -> None:
    """Write the original `internvl_chat` layout, which the reference implementation scores."""
    stored = open_stored(source)
    config = stored.checkpoint.model.model.config
    settings = internvl_chat.original_config(config, stored.checkpoint.tiling)
    target.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[str]] = {}
    for name in stored.shapes:
        groups.setdefault(internvl_chat.source(name, config).name, []).append(name)
    sizes = {theirs: sum(map(stored.nbytes, ours)) for theirs, ours in groups.items()}
    write_tensors(target, original_tensors(stored, progress(groups.items())), sizes)
    (target / "config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_original_tokenizer(target, stored.checkpoint.tokenizer)


def original_tensors(stored: Stored, groups: Iterable[tuple[str, list[str]]]) -> Iterator[tuple[str, Tensor]]:
    """Original names and tensors, packed from the native ones."""
    config = stored.checkpoint.model.model.config
    for theirs, ours in groups:
        yield (
            theirs,
            internvl_chat.packed([(internvl_chat.source(name, config).spans, stored.value(name)) for name in ours]),
        )


def save_original_tokenizer(target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer that transformers 4 reads, and that adds the bos token by itself where its template has it."""
    tokenizer.save_pretrained(target)
    rewrite_json(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    path = target / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    merges = fields["model"].get("merges", [])
    if not any(" " in part for merge in merges for part in merge):
        fields["model"]["merges"] = [" ".join(merge) for merge in merges]  # as tokenizers wrote them before 0.20
    if (tokenizer.chat_template or "").startswith("{{- bos_token }}"):
        bos = tokenizer.bos_token
        spaced = tokenizer.chat_template.startswith("{{- bos_token }}" + SPACE)
        before = [bos, SPACE] if spaced else [bos]
        fields["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                *({"SpecialToken": {"id": token, "type_id": 0}} for token in before),
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token: {"id": token, "ids": [tokenizer.convert_tokens_to_ids(token)], "tokens": [token]}
                for token in before
            },
        }
    path.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")


def rewrite_json(path: Path, changes: dict) -> None:
    """Change keys of a JSON file."""
    text = json.dumps({**read_json(path), **changes}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def inspect(folder: Path) -> dict[str, str]:
    """What a folder holds, in words, without reading a weight. Raises `ValueError` where it would not load."""
    stored = open_stored(folder)
    checkpoint, config = stored.checkpoint, stored.checkpoint.model.model.config
    tiling, facts = checkpoint.tiling, original_facts(config)
    count = sum(int(np.prod(shape)) for name, shape in stored.shapes.items() if name != LM_HEAD)
    thumbnail = " and a thumbnail" if tiling.thumbnail and tiling.max_tiles > 1 else ""
    beside = [path for path in (folder / "proxy", folder.resolve().parent / "proxy") if path.is_dir()]
    proxy = "in this folder" if has_proxy(folder) else f"in {beside[0]}" if beside else "none"
    vision, text = config.vision_config, config.text_config
    return {
        "layout": "original internvl_chat" if is_original(folder) else "native transformers internvl",
        "vision tower": f"{vision.num_hidden_layers} layers of {vision.hidden_size}, {vision.norm_type}",
        "language model": f"{facts.get('architecture') or text.model_type}, {text.num_hidden_layers} layers of"
        f" {text.hidden_size}, {text.vocab_size:,} tokens, RoPE {text.rope_parameters['rope_type']}",
        "parameters": f"{count:,}, stored in {', '.join(sorted({str(stored.dtype(n))[6:] for n in stored.shapes}))}",
        "template": facts.get("template") or "the folder's own chat template",
        "image": f"{tiling.min_tiles} to {tiling.max_tiles} tiles of {tiling.tile_size} pixels{thumbnail}, "
        f"{checkpoint.tokens_per_tile} tokens a tile",
        "max_length": f"{checkpoint.max_length:,} tokens",
        "adapters": f"LoRA on {len(stored.tensors.adapters)} weights, merged when loaded"
        if stored.tensors.adapters
        else "none",
        "reward model": "yes" if SCORE in stored.shapes else "no: a new score head would be drawn",
        "text-only proxy": proxy,
    }
