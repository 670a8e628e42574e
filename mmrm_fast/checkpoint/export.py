"""Folders to folders, tensor by tensor: any checkpoint to the native layout, to vLLM's and to the original one."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mmrm_fast.checkpoint import internvl_chat, text_model
from mmrm_fast.checkpoint.folder import (
    CLASSIFIER,
    PROXY,
    REWARD_TOKEN,
    Checkpoint,
    CheckpointFolder,
    rewrite_json,
    save_settings,
    save_tokenizer,
)
from mmrm_fast.checkpoint.internvl_chat import LM_HEAD, SCORE, Source
from mmrm_fast.checkpoint.tensors import as_stored, stored_names, write_tensors
from mmrm_fast.checkpoint.tokenizer import SPACE
from mmrm_fast.config import ExportConfig, InspectConfig
from mmrm_fast.files import read_json
from mmrm_fast.model.experts import experts_of_a_token, num_experts
from mmrm_fast.model.reward_model import original_facts

READ_AT = {"end": "token that ends the response", "last": "last token of the chat template"}
# A conversation up to the token that a reward is read at: vLLM reads the last one of what its template renders.
ENDED = (
    "{%- set whole %}{{ '' }}TEMPLATE{{ '' }}{% endset -%}"  # so that neither tag trims the template
    "{{- whole[:-BEHIND] if messages[-1].role == 'assistant' and not add_generation_prompt else whole -}}"
)


def write_weights(
    folder: CheckpointFolder,
    checkpoint: Checkpoint,
    target: Path,
    place: Callable[[str], Source | None],
) -> None:
    """Write a folder's tensors as they are stored, each native one where `place` puts it, if anywhere."""
    native = folder.native(checkpoint.model)
    groups: dict[str, list[tuple[Source, str]]] = {}
    for where, name in ((place(name), name) for name in native.stored()):
        if where is not None:
            groups.setdefault(where.name, []).append((where, name))

    target.mkdir(parents=True, exist_ok=True)
    shown = tqdm(groups.items(), desc=target.name, unit=" tensors", delay=1)
    placed = ((theirs, [(where.spans, native.value(name)) for where, name in own]) for theirs, own in shown)
    whole = ((theirs, internvl_chat.packed(parts)) for theirs, parts in placed)
    write_tensors(target, as_stored(whole, folder.config.text_config.model_type))


def export(config: ExportConfig) -> None:
    """Write a reward model for other programs."""
    write = {"vllm": export_vllm, "original": export_original}[config.format]
    write(config.source, config.target)
    print(f"wrote {config.target}")


def inspect(config: InspectConfig) -> None:
    """Print what a checkpoint folder holds."""
    for name, value in summary(config.folder).items():
        print(f"{name:16} {value}")


def convert_folder(source: Path, target: Path) -> None:
    """Write a folder's native twin, and in `proxy/` the text-only branch that the reference implementation saves."""
    branches = {target: False, target / "proxy": True} if has_proxy(source) else {target: False}
    for path, proxy in branches.items():
        folder = CheckpointFolder(source, proxy=proxy)
        folder.require_vision("other layout to be converted from")
        checkpoint = folder.load(with_weights=False)
        write_weights(folder, checkpoint, path, Source)
        save_settings(path, checkpoint)


def has_proxy(folder: Path) -> bool:
    """Whether a folder holds the reference implementation's text-only branch."""
    return any(name.startswith(PROXY) for name in stored_names(folder))


def export_vllm(source: Path, target: Path) -> None:
    """Write the native layout under the names and the architecture that vLLM's sequence classification reads."""
    folder = CheckpointFolder(source)
    checkpoint = folder.load(with_weights=False)
    write_weights(folder, checkpoint, target, text_place if checkpoint.is_text else vllm_place)
    save_settings(target, checkpoint)
    if not checkpoint.is_text:
        rewrite_json(target / "config.json", {"architectures": [CLASSIFIER], REWARD_TOKEN: checkpoint.reward_token})
    if behind := behind_read(checkpoint):
        whole = checkpoint.tokenizer.chat_template.removesuffix("\n")  # which jinja does not render
        template = ENDED.replace("BEHIND", str(len(behind))).replace("TEMPLATE", whole)
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def behind_read(checkpoint: Checkpoint) -> str:
    """What the template renders behind the token that a reward is read at."""
    encoder = checkpoint.prompt_encoder()
    end, behind = encoder.chat.ending
    if checkpoint.reward_token == "end":
        return behind
    padding = "" if encoder.unread is None else re.escape(checkpoint.tokenizer.convert_ids_to_tokens(encoder.unread))
    return re.search(f"(?:{padding})*$", end + behind)[0]


def vllm_place(name: str) -> Source | None:
    """A native tensor's name below transformers' `InternVLForConditionalGeneration`; there is no vocabulary head."""
    if name == LM_HEAD:
        return None
    return Source(("language_model." if name == SCORE else "model.") + name)


def text_place(name: str) -> Source | None:
    """A native tensor's name in a text model's classifier."""
    return None if name == LM_HEAD else Source(text_model.stored_name(name))


def export_original(source: Path, target: Path) -> None:
    """Write the original `internvl_chat` layout, which the reference implementation scores."""
    folder = CheckpointFolder(source)
    folder.require_vision("original `internvl_chat` layout")
    checkpoint = folder.load(with_weights=False)
    settings = internvl_chat.original_config(folder.config, checkpoint.tiling)
    write_weights(folder, checkpoint, target, lambda name: internvl_chat.source(name, folder.config))
    (target / "config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_original_tokenizer(target, checkpoint.tokenizer)


def save_original_tokenizer(target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer that transformers 4 reads, and that adds the bos token by itself where its template has it."""
    save_tokenizer(target, tokenizer)
    path = target / "tokenizer.json"
    fields = read_json(path)
    merges = fields["model"].get("merges", [])
    if not any(" " in part for merge in merges for part in merge):
        fields["model"]["merges"] = [" ".join(merge) for merge in merges]  # as tokenizers wrote them before 0.20
    if (tokenizer.chat_template or "").startswith("{{- bos_token }}"):
        spaced = tokenizer.chat_template.startswith("{{- bos_token }}" + SPACE)
        before = [tokenizer.bos_token, SPACE] if spaced else [tokenizer.bos_token]
        ids = list(zip(before, tokenizer.convert_tokens_to_ids(before), strict=True))
        added = TemplateProcessing(single=[*before, "$A"], pair=["$A", "$B"], special_tokens=ids)
        fields["post_processor"] = json.loads(added.__getstate__())
    path.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")


def summary(folder: Path) -> dict[str, str]:
    """What a folder holds, in words, without reading a weight. Raises `ValueError` where it would not load."""
    opened = CheckpointFolder(folder)
    checkpoint, config = opened.load(with_weights=False), opened.config
    native = opened.native(checkpoint.model)
    tiling, original = checkpoint.tiling, original_facts(config)
    sizes = {name: int(np.prod(shape)) for name, shape in native.shapes.items() if name in native.stored()}
    dtypes = sorted({str(native.dtype(name)).removeprefix("torch.") for name in native.stored()})
    thumbnail = " and a thumbnail" if tiling.thumbnail and tiling.max_tiles > 1 else ""
    beside = [path for path in (folder / "proxy", folder.resolve().parent / "proxy") if path.is_dir()]
    proxy = "in this folder" if has_proxy(folder) else f"in {beside[0]}" if beside else "none"
    count = num_experts(checkpoint.model)
    mixture = f", {experts_of_a_token(checkpoint.model)} of {count} experts a token" if count else ""
    vision, text, adapters = config.vision_config, config.text_config, opened.tensors.adapters
    kind = "original" if opened.is_original else "transformers' own" if opened.is_text else "native transformers"
    pictures = {} if opened.is_text else {
        "vision tower": f"{vision.num_hidden_layers} layers of {vision.hidden_size}, {vision.norm_type}",
        "image": f"{tiling.min_tiles} to {tiling.max_tiles} tiles of {tiling.tile_size} pixels{thumbnail}, "
        f"{checkpoint.tokens_per_tile} tokens a tile",
    }  # fmt: skip
    return {
        "layout": f"{kind} {opened.settings['model_type']}{', a text model' if opened.is_text else ''}",
        **pictures,
        "language model": f"{original.get('architecture') or text.model_type}, {text.num_hidden_layers} layers of"
        f" {text.hidden_size}, {text.vocab_size:,} tokens, RoPE {text.rope_parameters['rope_type']}{mixture}",
        "parameters": f"{sum(sizes.values()):,}, stored in {', '.join(dtypes)}",
        "template": original.get("template") or "the folder's own chat template",
        "max_length": f"{checkpoint.max_length:,} tokens",
        "adapters": f"LoRA on {len(adapters)} weights, merged when loaded" if adapters else "none",
        "reward model": f"yes, read at the {READ_AT[checkpoint.reward_token]}"
        if SCORE in native
        else "no: a new score head would be drawn",
        "text-only proxy": proxy,
    }
