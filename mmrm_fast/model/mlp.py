"""The decoders' gated MLP with one wide activation less to keep: silu(gate) is computed again in the backward pass."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

GATED_MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP")


class GatedProduct(torch.autograd.Function):
    """silu(gate) * up, elementwise; bit for bit what autograd gives, of which it saves the two arguments alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


class GatedMLP(nn.Module):
    """transformers' gated MLP, `down(silu(gate(x)) * up(x))`, around its own layers."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))


def use_gated_product(language_model: PreTrainedModel) -> None:
    """Let the decoder's MLPs be `GatedMLP`, where their class is known to mean it."""
    if language_model.config.hidden_act != "silu":
        return
    for layer in language_model.layers:
        if type(layer.mlp).__name__ in GATED_MLPS:
            layer.mlp = GatedMLP(layer.mlp)
