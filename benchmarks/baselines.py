"""The baselines: the same rewards, losses and plans the way they are computed without this package.

Shapes: R sequences (chosen and rejected in turns), L tokens of the longest, P pairs, I tiles, S pixels a tile side,
D hidden size.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import InternVLModel

from mmrm_fast.data.images import Tiling, choose_grid


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded sequences, each with its own copy of its images, ready for the model.

    No mask: under causal attention nothing sees the padding to its right, and without one SDPA skips half of the work.
    """

    input_ids_RL: Tensor  # int64
    lengths_R: Tensor  # int64
    pixels_ICSS: Tensor | None  # normalised; None for text-only sequences


def pad(
    sequences: Sequence[np.ndarray], pixels: Sequence[Tensor], image_token_id: int, device: torch.device
) -> PaddedBatch:
    """Pad token keys (image rows are negative) to their longest; `pixels` are each sequence's tiles [I, 3, S, S]."""
    rows = [torch.from_numpy(np.where(sequence < 0, image_token_id, sequence)) for sequence in sequences]
    input_ids, lengths = nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(list(map(len, rows)))
    return PaddedBatch(input_ids.to(device), lengths.to(device), torch.cat(list(pixels)).to(device) if pixels else None)


class PaddedRewardModel(nn.Module):
    """transformers' own `InternVLModel` with SDPA attention, and a score read at each sequence's last token.

    Args:
        model: without any module of ours.
        score_weight_1D: copied.
    """

    def __init__(self, model: InternVLModel, score_weight_1D: Tensor):
        super().__init__()
        self.model = model
        self.score = nn.Linear(score_weight_1D.shape[1], 1, bias=False).to(score_weight_1D)
        self.score.weight.data.copy_(score_weight_1D.detach())

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Rewards [R]."""
        hidden_RLD = self.hidden(batch)
        last_RD = hidden_RLD[torch.arange(len(hidden_RLD)), batch.lengths_R - 1]
        return self.score(last_RD.to(self.score.weight.dtype))[:, 0]

    def hidden(self, batch: PaddedBatch) -> Tensor:
        """Last hidden states [R, L, D]."""
        output = self.model(input_ids=batch.input_ids_RL, pixel_values=batch.pixels_ICSS, use_cache=False)
        return output.last_hidden_state


class ReferenceRewardModel(PaddedRewardModel):
    """The same as the reference implementation runs it: through a causal LM, whose logits nobody reads."""

    def __init__(self, model: InternVLModel, score_weight_1D: Tensor):
        super().__init__(model, score_weight_1D)
        config, given = model.config.text_config, {"dtype": model.dtype, "device": model.device}
        self.vocabulary_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **given)

    def hidden(self, batch: PaddedBatch) -> Tensor:
        hidden_RLD = super().hidden(batch)
        self.vocabulary_head(hidden_RLD)
        return hidden_RLD


def normalize(tiles_ISSC: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 tiles to `(x / 255 - mean) / std`, [I, 3, S, S] in `dtype`; computed in float32 or float64."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    mean_C, std_C = (torch.tensor(values, dtype=exact, device=tiles_ISSC.device) for values in (mean, std))
    return ((tiles_ISSC.to(exact) / 255 - mean_C) / std_C).permute(0, 3, 1, 2).to(dtype)


def reference_pixels(photograph: bytes, tiling: Tiling, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The reference implementation's tiles of one image [I, 3, S, S], normalised in float32.

    Pillow decodes, stretches and crops every tile; each is made a float tensor, normalised as torchvision defines it.
    """
    image, side = Image.open(io.BytesIO(photograph)).convert("RGB"), tiling.tile_size
    columns, rows = choose_grid(*image.size, tiling)
    sheet = image.resize((columns * side, rows * side))
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    tiles = [sheet.crop(box) for box in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((side, side)))
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return torch.stack([(float_pixels(tile) - mean_C11) / std_C11 for tile in tiles])


def float_pixels(tile: Image.Image) -> Tensor:
    """A tile made RGB and resized to its own size, as a float tensor [3, S, S] in 0..1."""
    tile = tile.convert("RGB").resize(tile.size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(tile, copy=True)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def robust_loss(margin_P: Tensor, proxy_margin_P: Tensor, *, mode: str = "paper") -> tuple[Tensor, ...]:
    """Sum over pairs of `SFC * L + L_t`, SFC detached (Li et al., arXiv 2503.03122), in eager torch.

    `mode` is `paper`, or `reference`: the reference implementation's operator precedence. With it come what training
    logs: the SFC's sum and both branches' right pairs, a tie half.
    """
    loss, proxy_loss = -logsigmoid(margin_P), -logsigmoid(proxy_margin_P)
    given, denominator = proxy_loss.detach(), 1e-7 + loss.detach() + proxy_loss.detach()
    sfc = 5e-8 + given / denominator if mode == "reference" else (5e-8 + given) / denominator
    right = [(margin.detach().sign() + 1).sum() / 2 for margin in (margin_P, proxy_margin_P)]
    return (sfc * loss + proxy_loss).sum(), sfc.sum(), *right
