"""Inputs of given sizes: random InternVL models, records and pictures."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, Qwen2Config

from benchmarks.baselines import PaddedBatch, normalize, pad
from benchmarks.harness import Options
from mmrm_fast.data.images import NORMALIZATION, white_tile
from mmrm_fast.data.packing import PackedBatch, pack
from mmrm_fast.data.prompt import Encoded
from mmrm_fast.data.records import Group, Pairs
from mmrm_fast.data.samples import Sample
from mmrm_fast.model.reward_model import RewardModel

DTYPES = (torch.float32, torch.bfloat16)
PATCH_SIZE = 14
IMAGE_TOKEN_ID = 1  # text tokens are drawn above it, 0 is padding


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model and of the texts around its images."""

    tile_size: int  # pixels
    system_length: int
    prompt_length: int
    response_scale: float  # of every response length, which are given as those of the full geometry
    vision_layers: int
    text_layers: int
    vocab_size: int
    vision: tuple[int, int, int] = (256, 4, 1024)  # hidden size, heads, MLP
    text: tuple[int, int, int, int] = (512, 8, 2, 1792)  # hidden size, heads, key and value heads, MLP

    @property
    def tokens_per_tile(self) -> int:
        """Patches, 2 x 2 to a token."""
        return (self.tile_size // PATCH_SIZE // 2) ** 2


FULL = Geometry(448, 30, 40, 1.0, vision_layers=4, text_layers=6, vocab_size=8192)
REDUCED = Geometry(224, 8, 10, 0.25, vision_layers=2, text_layers=3, vocab_size=4096)
PROBE = ((3, (120, 100)), (7, (60, 150)), (1, (200, 80)), (5, (90, 170)))  # tiles and response lengths of four records


def geometry(options: Options) -> Geometry:
    """The sizes that a run asks for."""
    return FULL if options.full else REDUCED


def model_config(sizes: Geometry) -> InternVLConfig:
    """An InternVL with a Qwen2 language model."""
    (hidden, heads, kv_heads, mlp), (vision_hidden, vision_heads, vision_mlp) = sizes.text, sizes.vision
    text_config = Qwen2Config(
        vocab_size=sizes.vocab_size, hidden_size=hidden, num_hidden_layers=sizes.text_layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp,
    )  # fmt: skip
    vision_config = InternVLVisionConfig(
        hidden_size=vision_hidden, num_hidden_layers=sizes.vision_layers, num_attention_heads=vision_heads,
        intermediate_size=vision_mlp, image_size=sizes.tile_size, patch_size=PATCH_SIZE,
    )  # fmt: skip
    return InternVLConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=sizes.tokens_per_tile,
    )  # fmt: skip


def make_backbone(sizes: Geometry, *, seed: int = 0) -> InternVLModel:
    """transformers' own model of these sizes with the seed's weights and SDPA attention, its vision tower frozen."""
    torch.manual_seed(seed)
    model = InternVLModel._from_config(model_config(sizes), attn_implementation="sdpa")
    for parameter in model.parameters():  # large enough that attention is not uniform
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.vision_tower.requires_grad_(False)
    return model


def make_model(sizes: Geometry, *, seed: int = 0) -> RewardModel:
    """Our model of the same."""
    return RewardModel(make_backbone(sizes, seed=seed), *NORMALIZATION["imagenet"])


def cast(model: RewardModel, dtype: torch.dtype, device: torch.device) -> RewardModel:
    """The model computing in `dtype`, its score head exact, as training and scoring have it."""
    model.model.to(dtype)
    return model.to(device)


@dataclass(frozen=True)
class Records:
    """Samples and their images as uint8 tiles [I, S, S, 3]."""

    sizes: Geometry
    samples: list[Sample]
    images: list[list[np.ndarray]]

    def pack(self, *, with_text: bool = False, white: bool = False) -> PackedBatch:
        """Our batch; `white`: the proxy sees a white tile in place of the image."""
        samples = [
            replace(sample, text=sample.text if white else self.without_image(sample)) for sample in self.samples
        ]
        return pack(
            samples, self.images, tokens_per_tile=self.sizes.tokens_per_tile, tile_size=self.sizes.tile_size,
            with_text=with_text, proxy_image="white" if white else "none",
        )  # fmt: skip

    def without_image(self, sample: Sample) -> Encoded:
        """The proxy's sequences with no image token."""
        sequences = tuple(sequence[sequence >= 0] for sequence in sample.text.sequences)
        return Encoded(sequences, sample.text.prefix_length - self.sizes.tokens_per_tile, sample.text.truncated)

    def padded(self, branch: str, which: Sequence[int], dtype: torch.dtype, device: torch.device) -> PaddedBatch:
        """A baseline's batch of the responses `which`, counted over all records, each with its own pixels.

        `branch` is `main`, `white` (a white tile in place of the image) or `text` (no image).
        """
        sequences, tiles = [], []
        for sample, (image,) in zip(self.samples, self.images, strict=True):
            encoded = {"main": sample.main, "white": sample.text, "text": self.without_image(sample)}[branch]
            sequences += encoded.sequences
            tiles += [image if branch == "main" else white_tile(self.sizes.tile_size)] * len(encoded.sequences)
        seen = [torch.from_numpy(tiles[at]) for at in which if branch != "text"]
        pixels = [normalize(each, *NORMALIZATION["imagenet"], dtype) for each in seen]
        return pad([sequences[at] for at in which], pixels, IMAGE_TOKEN_ID, device)


def make_records(sizes: Geometry, records: Sequence[tuple[int, Sequence[int]]], *, all_pairs: bool = False) -> Records:
    """Records of random tokens behind a common system prompt.

    Args:
        records: tiles and response lengths of each, lengths as in the full geometry.
        all_pairs: every two responses are a pair; otherwise the first two.
    """
    rng = np.random.default_rng(0)

    def text(length: float) -> np.ndarray:
        return rng.integers(IMAGE_TOKEN_ID + 1, sizes.vocab_size, max(1, round(length)))

    system, samples, images = text(sizes.system_length), [], []
    for record, (num_tiles, lengths) in enumerate(records):
        prompt = text(sizes.prompt_length)
        responses = [text(length * sizes.response_scale) for length in lengths]
        count = len(lengths)
        pairs = Pairs.ranked(-np.arange(count))[: None if all_pairs else 1]
        group = Group("benchmark", record, None, "", None, (), ("",) * count, pairs)
        main, white = (
            encoded(np.concatenate([system, -1 - np.arange(tiles * sizes.tokens_per_tile), prompt]), responses)
            for tiles in (num_tiles, 1)
        )
        samples.append(Sample(group, (num_tiles,), main, white))
        images.append([rng.integers(0, 256, (num_tiles, sizes.tile_size, sizes.tile_size, 3), np.uint8)])
    return Records(sizes, samples, images)


def encoded(prefix: np.ndarray, responses: list[np.ndarray]) -> Encoded:
    """A prefix and its responses as a tokenizer would give them."""
    sequences = tuple(np.concatenate([prefix, response]) for response in responses)
    return Encoded(sequences, len(prefix), (False,) * len(responses))


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with noise: compresses about as a photograph does."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 100, width // 100, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8))


def encoded_image(image: Image.Image, format: str) -> bytes:
    """A file's content."""
    file = io.BytesIO()
    image.save(file, format, quality=90)
    return file.getvalue()
