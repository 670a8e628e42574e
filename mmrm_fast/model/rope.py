"""RoPE whose frequencies depend on a sequence's length, taken from each sequence's own, with no state.

`dynamic` (InternLM2) stretches its base with every token over a threshold, `longrope` (Phi-3's "su") has other factors
over one. transformers takes the length from the longest position in the batch, which would let one long response change
its neighbours' rewards. Here each packed token carries its sequence's length, and only sequences with the same
frequencies share a prefix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True)
class RopeRegime:
    """Which frequencies a sequence of so many tokens has: 0 for those of the short, else a length that has them."""

    threshold: int  # longest sequence with the frequencies of the short
    is_continuous: bool  # every length over it has its own

    def __call__(self, length: int) -> int:
        if length <= self.threshold:
            return 0
        return length if self.is_continuous else self.threshold + 1


def rope_regime(config: PreTrainedConfig) -> RopeRegime | None:
    """The regimes of a text config's RoPE; None where frequencies do not depend on the length."""
    parameters = config.rope_parameters
    if parameters["rope_type"] == "dynamic":
        return RopeRegime(config.max_position_embeddings, True)
    if parameters["rope_type"] == "longrope":
        return RopeRegime(parameters["original_max_position_embeddings"], False)
    return None


class OwnLengthRope(nn.Module):
    """transformers' rotary embedding with each token's own frequencies.

    Called with position ids [1, T], or [2, T]: position ids and the regime (`RopeRegime`) of each token's sequence.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        frequencies, self.attention_scaling = self.frequencies(0)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def frequencies(self, regime: int) -> tuple[Tensor, float]:
        """Inverse frequencies [E / 2] fp32 of a regime, and the factor on cosines and sines."""
        initial = ROPE_INIT_FUNCTIONS[self.config.rope_parameters["rope_type"]]
        return initial(self.config, None, seq_len=regime or None)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, E] in x's dtype, computed in fp32."""
        positions, regimes = position_ids[0].float(), position_ids[1:]
        inv_freq = self.inv_freq.float().to(x.device)[None]
        if len(regimes):
            present, which = regimes[0].unique(return_inverse=True)
            table = [self.frequencies(regime)[0] for regime in present.tolist()]
            inv_freq = torch.stack(table).to(x.device)[which]
        angles = positions[:, None] * inv_freq
        angles = torch.cat((angles, angles), dim=-1)[None]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def use_own_length_rope(language_model: PreTrainedModel) -> None:
    """Replace a decoder's rotary embedding where its frequencies depend on the length."""
    if rope_regime(language_model.config) is not None:
        language_model.rotary_emb = OwnLengthRope(language_model.config)
