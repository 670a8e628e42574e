"""A training step, forward and backward in fp32, against padded sequences through transformers' own model.

All sides have the same weights, a frozen vision tower and a batch that is ready: padding, pixel normalisation and
duplication are not timed on the baselines' side, nor is packing on ours (normalisation is).

`padded`: one right-padded pass over chosen and rejected, without a vocabulary head; with the proxy, one more pass.
`reference`: the reference implementation's way, a padded pass for chosen and one for rejected, with vocabulary head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, Qwen2Config

from benchmarks.baselines import (
    PaddedBatch,
    PaddedRewardModel,
    ReferenceRewardModel,
    bradley_terry_loss,
    normalize,
    pad,
    robust_loss,
)
from benchmarks.harness import Check, Options, Row, gradient_error, interleaved, make_row, peak_bytes, relative_error
from mmrm_fast.dataset import Sample
from mmrm_fast.images import NORMALIZATION
from mmrm_fast.loss import preference_loss
from mmrm_fast.model import RewardModel
from mmrm_fast.packing import PackedBatch, pack
from mmrm_fast.prompt import Encoded
from mmrm_fast.records import Group, Pair

PATCH_SIZE = 14
REWARD_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
IMAGE_TOKEN_ID = 1  # text tokens are drawn above it, 0 is padding


@dataclass(frozen=True)
class Geometry:
    """Sizes of the model and of the pairs, one image each."""

    tile_size: int  # pixels
    system_length: int
    prompt_length: int
    response_lengths: tuple[tuple[int, int], ...]  # chosen, rejected
    vision_layers: int
    text_layers: int
    vocab_size: int
    num_tiles: tuple[int, ...] = (3, 7, 1, 5)

    @property
    def tokens_per_tile(self) -> int:
        """Patches, 2 x 2 to a token."""
        return (self.tile_size // PATCH_SIZE // 2) ** 2


FULL = Geometry(
    tile_size=448, system_length=30, prompt_length=40,
    response_lengths=((120, 100), (60, 150), (200, 80), (90, 170)), vision_layers=4, text_layers=6, vocab_size=8192,
)  # fmt: skip
REDUCED = Geometry(  # a quarter of every length, half the layers
    tile_size=224, system_length=8, prompt_length=10,
    response_lengths=((30, 25), (15, 38), (50, 20), (22, 42)), vision_layers=2, text_layers=3, vocab_size=4096,
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One way to run the step."""

    name: str
    modules: nn.ModuleList  # main model, then the proxy where there is one
    loss: Callable[[], tuple[Tensor, Tensor]]  # the step's loss; rewards of both branches, one after another

    def step(self) -> Tensor:
        """Forward and backward; returns the rewards, leaves the gradients."""
        self.modules.zero_grad(set_to_none=True)
        loss, rewards = self.loss()
        loss.backward()
        return rewards.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients of those parameters that have one."""
        named = self.modules.named_parameters()
        return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}

    def peak_bytes(self) -> int | None:
        """Memory that a step adds, its gradients included."""
        self.modules.zero_grad(set_to_none=True)
        return peak_bytes(self.step)


def rows(options: Options) -> Iterator[Row]:
    """`standard` against both baselines, `robust` against `padded`."""
    geometry = FULL if options.full else REDUCED
    samples, images = make_samples(geometry)
    for case, make_sides in (("standard", standard_sides), ("robust", robust_sides)):
        torch.manual_seed(0)
        yield from compare(f"train-step {case}", make_sides(geometry, samples, images), options.repeats)


def compare(case: str, sides: list[Side], repeats: int) -> Iterator[Row]:
    """Verify, measure memory and time our side (the first) against each of the others."""
    results = [(side.step(), side.gradients()) for side in sides]
    peaks = [side.peak_bytes() for side in sides]
    timings = interleaved([side.step for side in sides], repeats=repeats, min_seconds=0)
    for side, result, peak, timing in zip(sides[1:], results[1:], peaks[1:], timings[1:], strict=True):
        yield make_row(
            "train-step", case, "float32", ours=timings[0], baseline=side.name, theirs=timing,
            checks=checks(results[0], result), peak_bytes=peaks[0], baseline_peak_bytes=peak,
        )  # fmt: skip


def checks(ours: tuple[Tensor, dict], theirs: tuple[Tensor, dict]) -> list[Check]:
    """Errors of our rewards and of our gradients."""
    return [
        Check(relative_error(ours[0], theirs[0]), REWARD_BOUND),
        Check(gradient_error(ours[1], theirs[1]), GRADIENT_BOUND),
    ]


def standard_sides(geometry: Geometry, samples: list[Sample], images: list[list[np.ndarray]]) -> list[Side]:
    """Ours, `padded` and `reference`, without a proxy."""
    batch = pack_samples(geometry, samples, images)
    pairs = batch.pairs
    model = make_model(geometry)
    padded = PaddedRewardModel(model.model, model.score.weight)
    reference = ReferenceRewardModel(model.model, model.score.weight)
    whole = pad_samples(samples, images)
    halves = [pad_samples(samples, images, slice(end, end + 1)) for end in (0, 1)]

    def padded_loss() -> tuple[Tensor, Tensor]:
        rewards = padded(whole)
        return bradley_terry_loss(rewards, pairs.chosen, pairs.rejected) / len(samples), rewards

    def reference_loss() -> tuple[Tensor, Tensor]:
        rewards = torch.stack([reference(half) for half in halves], dim=1).flatten()
        return bradley_terry_loss(rewards, pairs.chosen, pairs.rejected) / len(samples), rewards

    return [
        our_side(batch, model),
        Side("padded", nn.ModuleList([padded]), padded_loss),
        Side("reference", nn.ModuleList([reference]), reference_loss),
    ]


def robust_sides(geometry: Geometry, samples: list[Sample], images: list[list[np.ndarray]]) -> list[Side]:
    """Ours and `padded`, with a text-only proxy that has weights of its own."""
    batch = pack_samples(geometry, samples, images, with_text=True)
    pairs = batch.pairs
    model, proxy = make_model(geometry), make_model(geometry).drop_vision()
    padded, padded_proxy = (PaddedRewardModel(each.model, each.score.weight) for each in (model, proxy))
    whole = pad_samples(samples, images)
    text = pad([sequence for sample in samples for sequence in sample.text.sequences], [], IMAGE_TOKEN_ID)

    def padded_loss() -> tuple[Tensor, Tensor]:
        rewards, proxy_rewards = padded(whole), padded_proxy(text)
        loss = robust_loss(rewards, proxy_rewards, pairs.chosen, pairs.rejected) / len(samples)
        return loss, torch.cat([rewards, proxy_rewards])

    return [our_side(batch, model, proxy), Side("padded", nn.ModuleList([padded, padded_proxy]), padded_loss)]


def our_side(batch: PackedBatch, model: RewardModel, proxy: RewardModel | None = None) -> Side:
    """The packed step."""

    def loss() -> tuple[Tensor, Tensor]:
        rewards = [model(batch.main, batch.tiles)] + ([] if proxy is None else [proxy(batch.text)])
        sums = preference_loss(rewards[0], rewards[1] if proxy else None, batch, sfc_mode="paper")
        return (sums.main + sums.proxy) / len(batch.pairs.chosen), torch.cat(rewards)

    return Side("ours", nn.ModuleList([model] if proxy is None else [model, proxy]), loss)


def make_model(geometry: Geometry) -> RewardModel:
    """A random InternVL with a Qwen2 language model, its vision tower frozen."""
    text_config = Qwen2Config(
        vocab_size=geometry.vocab_size, hidden_size=512, num_hidden_layers=geometry.text_layers, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=1792,
    )  # fmt: skip
    vision_config = InternVLVisionConfig(
        hidden_size=256, num_hidden_layers=geometry.vision_layers, num_attention_heads=4, intermediate_size=1024,
        image_size=geometry.tile_size, patch_size=PATCH_SIZE,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=geometry.tokens_per_tile,
    )  # fmt: skip
    model = InternVLModel(config)
    for parameter in model.parameters():  # large enough that attention is not uniform
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.vision_tower.requires_grad_(False)
    return RewardModel(model, *NORMALIZATION["imagenet"])


def make_samples(geometry: Geometry) -> tuple[list[Sample], list[list[np.ndarray]]]:
    """Pairs of random tokens behind a common system prompt, and their images as uint8 tiles [I, S, S, 3]."""
    rng = np.random.default_rng(0)
    system = text_tokens(rng, geometry, geometry.system_length)
    samples, images = [], []
    for record, (num_tiles, lengths) in enumerate(zip(geometry.num_tiles, geometry.response_lengths, strict=True)):
        image_tokens = -1 - np.arange(num_tiles * geometry.tokens_per_tile)
        prompt = text_tokens(rng, geometry, geometry.prompt_length)
        responses = [text_tokens(rng, geometry, length) for length in lengths]
        group = Group("benchmark", record, None, "", None, (), ("", ""), (Pair(0, 1),))
        main = encoded(np.concatenate([system, image_tokens, prompt]), responses)
        samples.append(Sample(group, (num_tiles,), main, encoded(np.concatenate([system, prompt]), responses)))
        images.append([rng.integers(0, 256, (num_tiles, geometry.tile_size, geometry.tile_size, 3), np.uint8)])
    return samples, images


def text_tokens(rng: np.random.Generator, geometry: Geometry, length: int) -> np.ndarray:
    """Random token ids, none of them the image token."""
    return rng.integers(IMAGE_TOKEN_ID + 1, geometry.vocab_size, length)


def encoded(prefix: np.ndarray, responses: list[np.ndarray]) -> Encoded:
    """A prefix and its responses as a tokenizer would give them."""
    sequences = tuple(np.concatenate([prefix, response]) for response in responses)
    return Encoded(sequences, len(prefix), (False,) * len(responses))


def pack_samples(geometry: Geometry, samples, images, *, with_text: bool = False) -> PackedBatch:
    """Our batch."""
    return pack(
        samples, images, tokens_per_tile=geometry.tokens_per_tile, tile_size=geometry.tile_size, with_text=with_text
    )


def pad_samples(samples: list[Sample], images: list[list[np.ndarray]], which: slice = slice(None)) -> PaddedBatch:
    """A baseline's batch of the sequences `which` of every sample (all, or chosen or rejected only)."""
    sequences, pixels = [], []
    for sample, (tiles,) in zip(samples, images, strict=True):
        sequences += sample.main.sequences[which]
        normalized = normalize(torch.from_numpy(tiles), *NORMALIZATION["imagenet"], torch.float32)
        pixels += [normalized] * len(sample.main.sequences[which])
    return pad(sequences, pixels, IMAGE_TOKEN_ID)
