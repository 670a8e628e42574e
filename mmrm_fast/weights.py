"""Checkpoint folders in and out: native transformers InternVL plus `score.weight`, safetensors only, no remote code."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLModel, PreTrainedTokenizerBase
from transformers.utils import logging

from mmrm_fast.config import TrainConfig
from mmrm_fast.images import NORMALIZATION, Compat, Tiling, mean_colour
from mmrm_fast.model import RewardModel
from mmrm_fast.prompt import PromptEncoder
from mmrm_fast.tokenizer import load_tokenizer

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
SCORE = "score.weight"
PROCESSOR = "preprocessor_config.json"
MAX_LENGTH = 4096


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
            self.tokenizer, tokens_per_tile=self.tokens_per_tile, max_length=self.max_length, compat=self.compat
        )


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    max_tiles: int | None = None,
    compat: Compat = None,
    with_weights: bool = True,
) -> Checkpoint:
    """Load a native `internvl` folder; a folder without `score.weight` gets a new score head.

    Args:
        folder: a local folder with config.json, safetensors, tokenizer and preprocessor_config.json.
        dtype: of the weights.
        max_length, max_tiles: override what the folder says.
        compat: `reference` prepares texts and pictures as the reference implementation does.
        with_weights: False leaves the model on the meta device; the folder needs no weights.

    Raises:
        ValueError: not such a folder; the message says what is missing.
    """
    folder = Path(folder)
    processor = read_json(folder / PROCESSOR)
    mean, std = (tuple(processor.get(key, default)) for key, default in image_statistics().items())
    with torch.device("cpu" if with_weights else "meta"):
        backbone = load_backbone(folder, dtype) if with_weights else InternVLModel(read_config(folder)).to(dtype)
        model = RewardModel(backbone, mean, std)
    score = read_score(folder) if with_weights else None
    if score is not None:
        model.score.weight.data.copy_(score)
    tokenizer = load_tokenizer(folder)
    config = backbone.config
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        tiling=replace(read_tiling(processor, config.vision_config.image_size[0], max_tiles), compat=compat),
        tokens_per_tile=tokens_per_tile(config),
        max_length=max_length or min(tokenizer.model_max_length, MAX_LENGTH),
    )


def read_config(folder: Path) -> InternVLConfig:
    """The config of a native InternVL checkpoint. Raises `ValueError` for any other."""
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != "internvl":
        raise ValueError(f"{folder}: model_type is not `internvl`; expected a transformers InternVL checkpoint")
    return InternVLConfig.from_dict(settings)


def check_folder(folder: Path) -> None:
    """Raise `ValueError` unless the folder looks like a native InternVL checkpoint with safetensors."""
    read_config(folder)
    if not any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise ValueError(f"{folder}: no {WEIGHTS}; weights are read from safetensors only")


def require_reward_model(folder: str | Path) -> None:
    """Raise `ValueError` unless the folder is a checkpoint with a score head."""
    check_folder(Path(folder))
    if read_score(Path(folder)) is None:
        raise ValueError(f"{folder}: no `{SCORE}`: this is not a reward model, train one first")


def load_backbone(folder: Path, dtype: torch.dtype) -> InternVLModel:
    """transformers' own model; every weight must be there, in its shape."""
    check_folder(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would report score.weight as unexpected
    try:
        model, report = InternVLModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            first = sorted(map(str, report[problem]))[0]
            raise ValueError(f"{folder}: {len(report[problem])} {problem.replace('_', ' ')}, such as {first}")
    return model


def read_json(path: Path) -> dict:
    """A JSON object from a file of a checkpoint folder."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name}; expected a folder that transformers' save_pretrained wrote")
    return json.loads(path.read_text())


def image_statistics() -> dict[str, tuple[float, ...]]:
    """The processor's normalisation keys with their defaults."""
    return dict(zip(("image_mean", "image_std"), NORMALIZATION["imagenet"], strict=True))


def read_tiling(processor: dict, tile_size: int, max_tiles: int | None) -> Tiling:
    """The tiling that the processor settings describe (transformers adds the thumbnail by itself)."""
    cropped = processor.get("crop_to_patches", True)
    limit = max_tiles or (processor.get("max_patches", 12) if cropped else 1)
    return Tiling(tile_size, min(processor.get("min_patches", 1), limit), limit)


def tokens_per_tile(config) -> int:
    """Image tokens of a tile: patches after the pixel shuffle."""
    vision = config.vision_config
    patches = math.prod(size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    return int(patches * config.downsample_ratio**2)


def read_score(folder: Path) -> torch.Tensor | None:
    """`score.weight` [1, D] of a reward model's folder, None where there is none."""
    index = folder / WEIGHTS_INDEX
    name = json.loads(index.read_text())["weight_map"].get(SCORE) if index.is_file() else WEIGHTS
    if name is None or Path(name).name != name:
        return None
    with safe_open(folder / name, "pt") as file:
        names = file.keys()
        return file.get_tensor(SCORE) if SCORE in names else None


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write a folder that `load_checkpoint` reads, weights bit for bit.

    Args:
        folder: created; its files are replaced.
        checkpoint: what to save; a proxy is saved without its vision part.
        state: full weights by name, where the model itself is sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = state or checkpoint.model.state_dict()
    state = {name.removeprefix("model."): value.contiguous() for name, value in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = checkpoint.model.model.config
    config.num_labels = config.text_config.num_labels = 1
    config.problem_type = "regression"
    config.save_pretrained(folder)
    checkpoint.tokenizer.model_max_length = checkpoint.max_length
    checkpoint.tokenizer.save_pretrained(folder)
    (folder / PROCESSOR).write_text(json.dumps(processor_settings(checkpoint), indent=2) + "\n")


def processor_settings(checkpoint: Checkpoint) -> dict:
    """The image processor settings in transformers' own names."""
    tiling, model = checkpoint.tiling, checkpoint.model
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": True,
        "min_patches": tiling.min_tiles,
        "max_patches": tiling.max_tiles,
        "size": {"height": tiling.tile_size, "width": tiling.tile_size},
        "image_mean": list(model.pixel_mean),
        "image_std": list(model.pixel_std),
    }


def configured(checkpoint: Checkpoint, config: TrainConfig) -> Checkpoint:
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
