"""Checkpoint folders in and out: native transformers InternVL or original `internvl_chat`, no remote code.

The model is built without weights and filled tensor by tensor, so that loading never holds two copies of them; a model
that is already sharded is filled with this rank's rows alone.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLModel, PreTrainedTokenizerBase

from mmrm_fast.checkpoint import internvl_chat
from mmrm_fast.checkpoint.internvl_chat import SCORE
from mmrm_fast.checkpoint.parameters import ORIGINAL, load_weights, native_name, read_json, read_tensors
from mmrm_fast.checkpoint.tensors import stored_names, write_tensors
from mmrm_fast.checkpoint.tokenizer import load_tokenizer
from mmrm_fast.config import TrainBatchConfig
from mmrm_fast.data.images import NORMALIZATION, Compat, Tiling, mean_colour
from mmrm_fast.data.prompt import PromptEncoder
from mmrm_fast.model.decoder import rope_regime
from mmrm_fast.model.reward_model import RewardModel

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
MAX_LENGTH = 4096
TEXT_NORM = "language_model.norm.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder: the model and all that turns records into its input."""

    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    tiling: Tiling
    tokens_per_tile: int
    max_length: int

    @property
    def compat(self) -> Compat:
        """Whose habits texts and pictures are prepared with."""
        return self.tiling.compat

    def prompt_encoder(self) -> PromptEncoder:
        """The encoder for this checkpoint's records."""
        return PromptEncoder(
            self.tokenizer,
            tokens_per_tile=self.tokens_per_tile,
            max_length=self.max_length,
            compat=self.compat,
            rope_regime=rope_regime(self.model.model.config.text_config),
        )


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    max_tiles: int | None = None,
    compat: Compat = None,
    with_weights: bool = True,
    proxy: bool = False,
) -> Checkpoint:
    """Load a folder; one without `score.weight` gets a new score head.

    Args:
        folder: a local folder, native (`internvl`) or original (`internvl_chat`), with safetensors and tokenizer.
        dtype: of the weights.
        max_length, max_tiles, compat: override what the folder says; `max_length` of a folder that says it only in its
            tokenizer is at most `MAX_LENGTH`. A sliding window caps it: within it sliding attention is plain attention.
            `compat="reference"` prepares texts and pictures as the reference implementation does.
        proxy: load the text-only branch that the reference implementation saves beside the main one.
        with_weights: False leaves the model on the meta device, for `parameters.load_weights` to fill once it is
            sharded; the folder needs no weights.

    Raises:
        ValueError: not such a folder; the message says what is missing.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    is_original = check_type(folder, settings) == ORIGINAL
    if with_weights:
        stored_names(folder)
    tokenizer = folder_tokenizer(folder, settings)
    config = read_config(folder, tokenizer)
    processor = original_processor(settings) if is_original else read_processor(folder)
    tiling = read_tiling(processor, config.vision_config.image_size[0], max_tiles, compat or processor.get("compat"))
    max_length = max_length or processor.get("max_length") or min(tokenizer.model_max_length, MAX_LENGTH)
    mean, std = (tuple(processor.get(key, default)) for key, default in image_statistics().items())
    checkpoint = Checkpoint(
        model=empty_model(config, dtype, mean, std),
        tokenizer=tokenizer,
        tiling=tiling,
        tokens_per_tile=tokens_per_tile(config, tiling.tile_size),
        max_length=within_window(max_length, config),
    )
    if with_weights:
        load_weights(checkpoint.model, folder, proxy=proxy)
    return checkpoint


def check_type(folder: Path, settings: dict) -> str:
    """config.json's model type. Raises `ValueError` unless it is one that loads."""
    kind = settings.get("model_type")
    if kind not in ("internvl", ORIGINAL):
        raise ValueError(f"{folder}: model_type is {kind!r}; expected `internvl` or the original `internvl_chat`")
    return kind


def folder_tokenizer(folder: Path, settings: dict) -> PreTrainedTokenizerBase:
    """The tokenizer of either kind of folder."""
    if settings["model_type"] == ORIGINAL:
        return load_tokenizer(folder, template=settings.get("template"), original=True)
    return load_tokenizer(folder)


def read_config(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> InternVLConfig:
    """The native config of either kind of folder, with room for every token of the tokenizer. Raises `ValueError`.

    Without one it is for sizes alone: of an original config it has no image token, and only the rows that it says.
    """
    settings = read_json(folder / "config.json")
    is_original = check_type(folder, settings) == ORIGINAL
    try:
        if is_original:
            stated = settings["llm_config"]
            rows = max(stated.get("vocab_size", 0), len(tokenizer)) if tokenizer else stated["vocab_size"]
            image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") if tokenizer else 0
            return internvl_chat.native_config(settings, vocab_size=rows, image_token_id=image_token)
        config = InternVLConfig.from_dict(settings)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json: lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(tokenizer or ()))
    return config


def within_window(max_length: int, config: InternVLConfig) -> int:
    """`max_length`, at most the LLM's sliding window."""
    return min(max_length, getattr(config.text_config, "sliding_window", None) or max_length)


def empty_model(config: InternVLConfig, dtype: torch.dtype, mean: tuple, std: tuple) -> RewardModel:
    """The model on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return RewardModel(InternVLModel(config).to(dtype), mean, std).eval()


def require_reward_model(folder: str | Path) -> None:
    """Raise `ValueError` unless the folder is a checkpoint with a score head."""
    folder = Path(folder)
    check_type(folder, read_json(folder / "config.json"))
    if SCORE not in read_tensors(folder):
        raise ValueError(f"{folder}: no `{SCORE}`: this is not a reward model, train one first")


def read_processor(folder: Path) -> dict:
    """A native folder's image processor settings."""
    for name in PROCESSORS:
        if (folder / name).is_file():
            settings = read_json(folder / name)
            return settings.get("image_processor", settings)
    raise ValueError(f"{folder}: no {PROCESSORS[0]}; expected a folder that transformers' save_pretrained wrote")


def original_processor(settings: dict) -> dict:
    """An original config's image settings in the names of transformers' processor (and two it has not)."""
    side = internvl_chat.tile_size(settings)
    return {
        "crop_to_patches": settings.get("dynamic_image_size", False),
        "min_patches": settings.get("min_dynamic_patch", 1),
        "max_patches": settings.get("max_dynamic_patch", 6),
        "size": {"height": side, "width": side},
        "use_thumbnail": settings.get("use_thumbnail", False),
        "pad2square": settings.get("pad2square", False),
    }


def image_statistics() -> dict[str, tuple[float, ...]]:
    """The processor's normalisation keys with their defaults."""
    return dict(zip(("image_mean", "image_std"), NORMALIZATION["imagenet"], strict=True))


def read_tiling(processor: dict, image_size: int, max_tiles: int | None, compat: Compat) -> Tiling:
    """The tiling that processor settings describe; transformers adds the thumbnail unless `use_thumbnail` is false."""
    cropped = processor.get("crop_to_patches", True)
    limit = max_tiles or (processor.get("max_patches", 12) if cropped else 1)
    mean = processor.get("image_mean", image_statistics()["image_mean"])
    return Tiling(
        tile_size=(processor.get("size") or {}).get("height", image_size),
        min_tiles=min(processor.get("min_patches", 1), limit),
        max_tiles=limit,
        thumbnail=processor.get("use_thumbnail", True),
        pad2square=processor.get("pad2square", False),
        pad_colour=tuple(int(value * 255) for value in mean),
        compat=compat,
    )


def tokens_per_tile(config: InternVLConfig, tile_size: int) -> int:
    """Image tokens of a tile: patches after the pixel shuffle."""
    return int((tile_size // config.vision_config.patch_size[0]) ** 2 * config.downsample_ratio**2)


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, state: dict[str, Tensor] | None = None) -> None:
    """Write a native folder that `load_checkpoint` reads, weights bit for bit, in shards where they are large.

    Args:
        folder: created; its files are replaced.
        checkpoint: what to save; a proxy is saved without its vision part.
        state: full weights by name, where the model itself is sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = state or checkpoint.model.state_dict()
    state = {native_name(name): value for name, value in state.items()}
    write_tensors(folder, state.items(), {name: value.nbytes for name, value in state.items()})
    config = checkpoint.model.model.config
    for part in (config, config.text_config, config.vision_config):
        part.dtype = state[TEXT_NORM].dtype  # what plain transformers loads the weights in
    save_settings(folder, checkpoint)


def save_settings(folder: Path, checkpoint: Checkpoint) -> None:
    """Write everything of a native folder but the weights."""
    config = checkpoint.model.model.config
    config.num_labels = config.text_config.num_labels = 1
    config.problem_type = "regression"
    config.save_pretrained(folder)
    save_tokenizer(folder, checkpoint)
    (folder / PROCESSORS[0]).write_text(json.dumps(processor_settings(checkpoint), indent=2) + "\n")


def save_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the tokenizer under the class name that transformers 4 and 5 both know."""
    checkpoint.tokenizer.model_max_length = checkpoint.max_length
    checkpoint.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = {**read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def processor_settings(checkpoint: Checkpoint) -> dict:
    """The image processor settings in transformers' own names, and those of ours that it has not."""
    tiling, model = checkpoint.tiling, checkpoint.model
    ours = {"max_length": checkpoint.max_length, **({"compat": tiling.compat} if tiling.compat else {})}
    return {
        **ours,
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": True,
        "min_patches": tiling.min_tiles,
        "max_patches": tiling.max_tiles,
        "size": {"height": tiling.tile_size, "width": tiling.tile_size},
        "image_mean": list(model.pixel_mean),
        "image_std": list(model.pixel_std),
        "use_thumbnail": tiling.thumbnail,
        "pad2square": tiling.pad2square,
    }


def configured(checkpoint: Checkpoint, config: TrainBatchConfig) -> Checkpoint:
    """The checkpoint with a training's options for pictures in place of its own; what is saved of it has them too.

    Raises:
        ValueError: fewer tiles at most than at least.
    """
    options = {name: getattr(config, name) for name in ("min_tiles", "max_tiles", "thumbnail", "pad2square", "compat")}
    options = {name: value for name, value in options.items() if value is not None}
    if config.max_tiles and config.min_tiles is None:
        options["min_tiles"] = min(checkpoint.tiling.min_tiles, config.max_tiles)
    if config.normalize_type:
        checkpoint.model.pixel_mean, checkpoint.model.pixel_std = NORMALIZATION[config.normalize_type]
        options["pad_colour"] = mean_colour(config.normalize_type)
    tiling = replace(checkpoint.tiling, **options)
    if not 1 <= tiling.min_tiles <= tiling.max_tiles:
        raise ValueError(f"--min-tiles {tiling.min_tiles} --max-tiles {tiling.max_tiles}: expected 1 <= least <= most")
    return replace(checkpoint, tiling=tiling)
