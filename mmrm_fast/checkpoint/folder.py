"""Checkpoint folders in and out: native InternVL, original `internvl_chat` or a text model; no remote code.

The model is built without weights and filled tensor by tensor, so that loading never holds two copies of them; a model
that is already sharded is filled with this rank's rows alone.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLModel, PreTrainedTokenizerBase

from mmrm_fast.checkpoint import internvl_chat, text_model
from mmrm_fast.checkpoint.fill import NativeTensors, fill_model, native_name
from mmrm_fast.checkpoint.internvl_chat import LM_HEAD, SCORE
from mmrm_fast.checkpoint.processor import (
    NESTED,
    PLAIN,
    PROCESSOR,
    Processor,
    processor_tokens,
    settings_of,
    stored_settings,
)
from mmrm_fast.checkpoint.schema import check_settings
from mmrm_fast.checkpoint.tensors import TensorFolder, as_stored, write_tensors
from mmrm_fast.checkpoint.tokenizer import load_tokenizer
from mmrm_fast.config import TrainBatchConfig
from mmrm_fast.data.images import NORMALIZATION, Compat, Tiling, mean_colour
from mmrm_fast.data.prompt import PromptEncoder, RewardToken
from mmrm_fast.files import read_json, write_json
from mmrm_fast.model.decoder import rope_regime
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.model.self_check import message

NATIVE, ORIGINAL = "internvl", "internvl_chat"
PROXY = "bias_reward_model."  # before the names of the text-only branch that the reference implementation saves
MAX_LENGTH = 4096
TEXT_NORM = "language_model.norm.weight"
CLASSIFIER = "InternVLForSequenceClassification"  # what vLLM and ms-swift call a reward model
REWARD_TOKEN = "reward_token"  # key of config.json
NO_TILES = Tiling(1, 1, 1)  # of a text model


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder: the model and all that turns records into its input."""

    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    tiling: Tiling
    tokens_per_tile: int
    max_length: int
    reward_token: RewardToken = "end"

    @property
    def compat(self) -> Compat:
        """Whose habits texts and pictures are prepared with."""
        return self.tiling.compat

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text model, which takes no pictures."""
        return not self.tokens_per_tile

    def prompt_encoder(self) -> PromptEncoder:
        """The encoder for this checkpoint's records."""
        text = self.model.model.config.text_config
        return PromptEncoder(
            self.tokenizer,
            tokens_per_tile=self.tokens_per_tile,
            max_length=self.max_length,
            compat=self.compat,
            reward_token=self.reward_token,
            unread=text.pad_token_id if self.is_text and self.reward_token == "last" else None,
            rope_regime=rope_regime(text),
        )

    def configured(self, config: TrainBatchConfig) -> "Checkpoint":
        """The checkpoint with a training's options for pictures in place of its own; what is saved of it has them too.

        Raises:
            ValueError: fewer tiles at most than at least; any of a text model.
        """
        names = ("min_tiles", "max_tiles", "thumbnail", "pad2square", "compat")
        options = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        if self.is_text:
            inputs = None if config.inputs == "all" else config.inputs
            refuse_pictures(**options, normalize_type=config.normalize_type, inputs=inputs)
            return self
        if config.max_tiles and config.min_tiles is None:
            options["min_tiles"] = min(self.tiling.min_tiles, config.max_tiles)
        if config.normalize_type:
            self.model.pixel_mean, self.model.pixel_std = NORMALIZATION[config.normalize_type]
            options["pad_colour"] = mean_colour(config.normalize_type)
        tiling = replace(self.tiling, **options)
        if not 1 <= tiling.min_tiles <= tiling.max_tiles:
            raise ValueError(
                f"--min-tiles {tiling.min_tiles} --max-tiles {tiling.max_tiles}: expected 1 <= least <= most"
            )
        return replace(self, tiling=tiling)


def understood(file: str = "") -> Callable:
    """Of a method of a folder: whatever a library makes of broken settings is a `ValueError` that names the file."""

    def decorated(method: Callable) -> Callable:
        @wraps(method)
        def called(self, *arguments, **options):
            try:
                return method(self, *arguments, **options)
            except (OSError, AssertionError):
                raise
            except Exception as error:
                if isinstance(error, ValueError) and str(self.path) in str(error):
                    raise
                raise ValueError(f"{self.path / file}: {message(error)}") from error

        return called

    return decorated


class CheckpointFolder:
    """A checkpoint's folder as data: each of its files is read once, when it is first asked for.

    What is missing or not understood raises `ValueError` in our words.

    Args:
        path: a local folder, native (`internvl`), original (`internvl_chat`) or of a text model: config.json,
            safetensors, the tokenizer's files and, in a native one, the image processor's.
        proxy: its weights are those of the text-only branch, which the reference implementation saves beside the other.
    """

    def __init__(self, path: str | Path, *, proxy: bool = False):
        self.path, self.proxy = Path(path), proxy

    @cached_property
    def settings(self) -> dict:
        """config.json, of a model type that loads."""
        if not (self.path / "config.json").is_file():
            raise ValueError(f"{self.path}: no config.json; expected a checkpoint folder")
        settings = check_settings(read_json(self.path / "config.json"), self.path / "config.json")
        kind = settings.get("model_type")
        if kind not in (NATIVE, ORIGINAL) and not text_model.is_text_model(kind):
            raise ValueError(
                f"{self.path}: model_type is {kind!r}; expected `{NATIVE}`, the original `{ORIGINAL}` or a text model "
                "that transformers has a sequence classifier of, such as qwen2"
            )
        for part in (settings, settings.get("text_config"), settings.get("llm_config")):
            if method := ((part or {}).get("quantization_config") or {}).get("quant_method"):
                raise ValueError(
                    f"{self.path}/config.json: the weights are quantized, quant_method {method}: load them with "
                    "transformers dequantized (`Mxfp4Config(dequantize=True)`, `model.dequantize()`), save them again"
                )
        return settings

    @property
    def is_original(self) -> bool:
        """Whether it has the original `internvl_chat` layout."""
        return self.settings["model_type"] == ORIGINAL

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text model."""
        return text_model.is_text_model(self.settings["model_type"])

    @cached_property
    @understood()
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; an original folder's has the conversation template that config.json names."""
        if self.is_original:
            return load_tokenizer(self.path, template=self.settings.get("template"), original=True)
        return load_tokenizer(self.path)

    @property
    def has_tokenizer(self) -> bool:
        """Whether it holds more than sizes."""
        return (self.path / "tokenizer_config.json").is_file()

    @cached_property
    @understood("config.json")
    def config(self) -> InternVLConfig:
        """The native config, with room for every token of the tokenizer, where there is one."""
        tokenizer = self.tokenizer if self.has_tokenizer else None
        try:
            if self.is_original:
                rows = max(self.settings["llm_config"].get("vocab_size", 0), len(tokenizer or ()))
                image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") if tokenizer else 0
                return internvl_chat.native_config(self.settings, vocab_size=rows, image_token_id=image_token)
            config = (
                text_model.shell(self.settings, tokenizer) if self.is_text else InternVLConfig.from_dict(self.settings)
            )
        except KeyError as error:
            raise ValueError(f"{self.path}/config.json: lacks, or does not know, {error}") from None
        config.text_config.vocab_size = max(getattr(config.text_config, "vocab_size", 0), len(tokenizer or ()))
        return config

    @cached_property
    @understood()
    def processor(self) -> Processor:
        """The image processor's settings."""
        image_size = self.config.vision_config.image_size[0]
        if self.is_original:
            return Processor(self.path / "config.json", internvl_chat.image_processor(self.settings), image_size)
        return Processor(*stored_settings(self.path), image_size)

    @cached_property
    def reward_token(self) -> RewardToken:
        """Where rewards are read; of a sequence classifier that does not say so, where such are: at the last token."""
        is_classifier = self.is_text or (
            not self.is_original and CLASSIFIER in (self.settings.get("architectures") or ())
        )
        found = self.settings.get(REWARD_TOKEN, "last" if is_classifier else "end")
        if found not in get_args(RewardToken):
            raise ValueError(f"{self.path}/config.json: {REWARD_TOKEN} is {found!r}; expected end or last")
        return found

    @cached_property
    def tensors(self) -> TensorFolder:
        """The stored tensors of the branch, under the names of `internvl_chat` or of `InternVLModel`."""
        if not self.is_original:
            return TensorFolder(self.path, text_model.native_name if self.is_text else plain_name)
        return TensorFolder(self.path, self.branch_name, lora_scale=lora_scale(self.path, self.settings))

    def branch_name(self, name: str) -> str | None:
        """A stored name of an original folder without its branch's prefix; None of the other branch."""
        if name.startswith(PROXY) != self.proxy:
            return None
        return name.removeprefix(PROXY)

    @understood("config.json")
    def model(self, dtype: torch.dtype = torch.float32, *, num_layers: int | None = None) -> RewardModel:
        """The reward model on the meta device, in evaluation mode; only config.json is needed.

        Args:
            num_layers: build only so many of the language model's and of the vision tower's.

        Raises:
            ValueError: transformers builds no such model, or it computes what is not computed here.
        """
        config = copy.deepcopy(self.config)
        for part in (config.vision_config, config.text_config) if num_layers is not None else ():
            part.num_hidden_layers = num_layers
            if getattr(part, "layer_types", None):
                part.layer_types = part.layer_types[:num_layers]
        with torch.device("meta"):
            model = RewardModel(InternVLModel(config).to(dtype), *NORMALIZATION["imagenet"]).eval()
        return model.drop_vision() if self.is_text else model

    @understood()
    def load(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        max_length: int | None = None,
        max_tiles: int | None = None,
        compat: Compat = None,
        with_weights: bool = True,
    ) -> Checkpoint:
        """The whole of it; a folder without `score.weight` gets a new score head.

        Args:
            dtype: of the weights.
            max_length, max_tiles, compat: override what the folder says; `max_length` of a folder that says it only in
                its tokenizer is at most `MAX_LENGTH`. `compat="reference"` prepares texts and pictures as the reference
                implementation does.
            with_weights: False leaves the model on the meta device, for `fill` once it is sharded; the folder needs no
                weights.
        """
        if with_weights:
            assert self.tensors is not None  # what is most often missing is looked for first
        model, longest = self.model(dtype), self.tokenizer.model_max_length
        if self.is_text:
            refuse_pictures(max_tiles=max_tiles, compat=compat)
            length, tiling, tokens_per_tile = longest if REWARD_TOKEN in self.settings else None, NO_TILES, 0
        else:
            processor, patch_size = self.processor, self.config.vision_config.patch_size[0]
            length, tiling = processor.max_length, processor.tiling(max_tiles, compat)
            tokens_per_tile = int((tiling.tile_size // patch_size) ** 2 * self.config.downsample_ratio**2)
            model.pixel_mean, model.pixel_std = processor.mean, processor.std
        if with_weights:
            self.fill(model)
        return Checkpoint(
            model=model,
            tokenizer=self.tokenizer,
            tiling=tiling,
            tokens_per_tile=tokens_per_tile,
            max_length=max_length or length or min(longest, MAX_LENGTH),
            reward_token=self.reward_token,
        )

    def native(self, model: RewardModel) -> NativeTensors:
        """The stored tensors under the names of a model's parameters."""
        return NativeTensors(self.tensors, model, is_original=self.is_original)

    def fill(self, model: RewardModel, *devices: torch.device | str) -> None:
        """Fill a model of this folder, from the meta device, possibly frozen, sharded or without its vision part.

        It stands on the CPU, or on the device, or is placed over several.
        """
        fill_model(model, self.native(model), *(devices or ("cpu",)))

    def require_vision(self, what: str) -> None:
        """Raise `ValueError` for a text model."""
        if self.is_text:
            raise ValueError(f"{self.path}: a text model of transformers' own format has no {what}")

    def require_reward_model(self) -> None:
        """Raise `ValueError` unless it is a checkpoint with a score head."""
        if SCORE not in self.tensors:
            raise ValueError(f"{self.path}: no `{SCORE}`: this is not a reward model, train one first")


def plain_name(name: str) -> str:
    """A native folder's name as `InternVLModel` has it; transformers saved three layouts over time."""
    name = name.removeprefix("model.")
    for part in (LM_HEAD, SCORE):
        if name == "language_model." + part:
            return part
    return re.sub(r"^language_model\.model\.", "language_model.", name)


def refuse_pictures(**options) -> None:
    """Raise `ValueError` for an option that is given though it says nothing to a text model."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} {value}: the model reads text alone")


def lora_scale(folder: Path, settings: dict) -> float:
    """alpha / rank of LoRA adapters: adapter_config.json says it, else config.json, else InternVL's own 2."""
    path = folder / "adapter_config.json"
    adapter = read_json(path) if path.is_file() else settings
    if "lora_alpha" not in adapter:
        return 2.0
    rank = (
        adapter.get("r") or adapter.get("lora_r") or settings.get("use_llm_lora") or settings.get("use_backbone_lora")
    )
    return adapter["lora_alpha"] / (rank**0.5 if adapter.get("use_rslora") else rank)


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, state: dict[str, Tensor] | None = None) -> None:
    """Write a native folder that `CheckpointFolder` reads, weights bit for bit, in shards where they are large.

    Args:
        folder: created; its files are replaced.
        checkpoint: what to save; a proxy is saved without its vision part.
        state: full weights by name, where the model itself is sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = state or checkpoint.model.state_dict()
    config = checkpoint.model.model.config
    state = {native_name(name): value for name, value in state.items()}
    place = text_model.stored_name if checkpoint.is_text else str
    stored = as_stored(state.items(), config.text_config.model_type)
    write_tensors(folder, ((place(name), value) for name, value in stored))
    for part in (config, config.text_config, config.vision_config):
        part.dtype = state[TEXT_NORM].dtype  # what plain transformers loads the weights in
    save_settings(folder, checkpoint)


def save_settings(folder: Path, checkpoint: Checkpoint) -> None:
    """Write everything of a native folder, or of a text model's, but the weights."""
    model, config = checkpoint.model, checkpoint.model.model.config
    for part in (config, config.text_config):  # vLLM reads the text part's
        part.num_labels, part.problem_type = 1, "regression"
    written = text_model.as_classifier(config.text_config) if checkpoint.is_text else config
    vars(written).pop(REWARD_TOKEN, None)
    usual = "last" if CLASSIFIER in (written.architectures or ()) else "end"
    if checkpoint.is_text or checkpoint.reward_token != usual:  # else a program that reads another one would keep it
        setattr(written, REWARD_TOKEN, checkpoint.reward_token)
    written.save_pretrained(folder)
    checkpoint.tokenizer.model_max_length = checkpoint.max_length
    save_tokenizer(folder, checkpoint.tokenizer)
    if checkpoint.is_text:
        return
    rewrite_json(folder / "tokenizer_config.json", {"extra_special_tokens": processor_tokens(checkpoint.tokenizer)})
    write_json(folder / PLAIN, settings_of(checkpoint.tiling, model.pixel_mean, model.pixel_std, checkpoint.max_length))
    write_json(folder / NESTED, {"processor_class": PROCESSOR, "image_seq_length": checkpoint.tokens_per_tile})


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    rewrite_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def rewrite_json(path: Path, changes: dict) -> None:
    """Change keys of a JSON file."""
    text = json.dumps({**read_json(path), **changes}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
