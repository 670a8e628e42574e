"""A folder's image processor settings: read as transformers reads them, each honoured or refused by name."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mmrm_fast.checkpoint.schema import is_number, require
from mmrm_fast.data.images import NORMALIZATION, Compat, Tiling
from mmrm_fast.data.prompt import IMAGE_TOKENS
from mmrm_fast.files import read_json

PROCESSOR = "InternVLProcessor"  # transformers' class of image processor and tokenizer together
PROCESSOR_TOKENS = ("start_image_token", "context_image_token", "end_image_token")  # its names for `IMAGE_TOKENS`
VIDEO_TOKENS = ("<video>", "<quad>")
NESTED, PLAIN = "processor_config.json", "preprocessor_config.json"
MAX_PATCHES, MAX_SIDE = 256, 1 << 12
CLIP_MEAN, CLIP_STD = NORMALIZATION["clip"]  # transformers' defaults
# What our path does to every picture; a folder that asks for something else is refused.
ALWAYS = {"do_resize": True, "do_rescale": True, "do_convert_rgb": True, "do_center_crop": False, "do_pad": False}
BICUBIC = 3


class Processor:
    """Image settings by transformers' names (and `pad2square`, which it has not). `ValueError` names the file and key.

    Where nothing else is said tiles have `image_size`, the pixels of the vision tower's side.
    """

    def __init__(self, source: Path, settings: dict[str, Any], image_size: int):
        self.source, self.settings = source, settings
        for name, value in ALWAYS.items():
            self.require(name, settings.get(name) in (None, value), f"{value}".lower())
        self.require("resample", settings.get("resample") in (None, BICUBIC), f"{BICUBIC} (bicubic)")
        scale = settings.get("rescale_factor", 1 / 255)
        self.require("rescale_factor", is_number(scale) and abs(scale * 255 - 1) < 1e-6, "1/255")
        self.tile_size = self.side(image_size)
        self.min_patches, self.max_patches = self.count("min_patches", 1), self.count("max_patches", 12)
        self.require("min_patches", self.min_patches <= self.max_patches, f"at most max_patches {self.max_patches}")
        self.crops, self.thumbnail = self.switch("crop_to_patches", True), self.switch("use_thumbnail", True)
        self.pad2square = self.switch("pad2square", False)
        normalizes = self.switch("do_normalize", True)
        self.mean = self.channels("image_mean", CLIP_MEAN) if normalizes else (0.0,) * 3
        self.std = self.channels("image_std", CLIP_STD) if normalizes else (1.0,) * 3
        self.require("image_std", min(self.std) > 0, "three numbers over 0")
        self.max_length = settings.get("max_length")
        self.compat: Compat = settings.get("compat")
        self.require("compat", self.compat in (None, "reference"), "'reference'")
        is_count = isinstance(self.max_length, int) and self.max_length > 0
        self.require("max_length", self.max_length is None or is_count, "a whole number over 0")

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raise `ValueError` for a setting that is not as expected."""
        require(holds, self.source, name, self.settings.get(name), expected)

    def switch(self, name: str, default: bool) -> bool:
        """A boolean; null is the default."""
        value = self.settings.get(name)
        self.require(name, value is None or isinstance(value, bool), "true or false")
        return default if value is None else value

    def count(self, name: str, default: int) -> int:
        """A whole number, 1 to `MAX_PATCHES`; null is the default."""
        value = self.settings.get(name)
        is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_PATCHES
        self.require(name, value is None or is_count, f"a whole number from 1 to {MAX_PATCHES}")
        return default if value is None else value

    def side(self, default: int) -> int:
        """Pixels of a tile's side: `size` is one number, or a height and an equal width."""
        size = self.settings.get("size")
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if size is None:
            return default
        square = isinstance(size, dict) and set(size) == {"height", "width"} and size["height"] == size["width"]
        holds = square and isinstance(size["height"], int) and 1 <= size["height"] <= MAX_SIDE
        self.require("size", holds, f"one side of 1 to {MAX_SIDE} pixels, or an equal height and width")
        return size["height"]

    def channels(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A number for each of the three channels."""
        values = self.settings.get(name, default)
        given = isinstance(values, (list, tuple)) and len(values) == 3
        self.require(name, given and all(map(is_number, values)), "three numbers")
        return tuple(map(float, values))

    def tiling(self, max_tiles: int | None, compat: Compat) -> Tiling:
        """The tiling of these settings, of at most `max_tiles` where that is given."""
        limit = max_tiles or (self.max_patches if self.crops else 1)
        return Tiling(
            tile_size=self.tile_size,
            min_tiles=min(self.min_patches, limit),
            max_tiles=limit,
            thumbnail=self.thumbnail,
            pad2square=self.pad2square,
            pad_colour=tuple(int(value * 255) for value in self.mean),
            compat=compat or self.compat,
        )


def stored_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A native folder's image settings and their file, looked for where transformers looks, in its order."""
    for name in (NESTED, PLAIN):
        path = folder / name
        settings = read_json(path) if path.is_file() else None
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"{path}: expected an object")
        settings = (settings or {}).get("image_processor") if name == NESTED else settings
        if settings is not None:
            return path, settings
    raise ValueError(f"{folder}: no {PLAIN}; expected a folder that transformers' save_pretrained wrote")


def settings_of(tiling: Tiling, mean: tuple[float, ...], std: tuple[float, ...], max_length: int) -> dict[str, Any]:
    """Image settings in transformers' own names, and those of ours that it has not."""
    return {
        "max_length": max_length,
        **({"compat": tiling.compat} if tiling.compat else {}),
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": PROCESSOR,
        "crop_to_patches": True,
        "min_patches": tiling.min_tiles,
        "max_patches": tiling.max_tiles,
        "size": {"height": tiling.tile_size, "width": tiling.tile_size},
        "image_mean": list(mean),
        "image_std": list(std),
        "use_thumbnail": tiling.thumbnail,
        "pad2square": tiling.pad2square,
    }


def processor_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokens that transformers' processor asks its tokenizer for; for video an unused one, if any."""
    unused = (*VIDEO_TOKENS, tokenizer.pad_token)
    video = [token for token in unused if token in tokenizer.get_vocab()]
    return dict(zip((*PROCESSOR_TOKENS, "video_token"), (*IMAGE_TOKENS, *video[:1]), strict=False))
