"""The gated MLP is transformers' own, bit for bit, and keeps three wide activations instead of four."""

import copy
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeModel,
)

from mmrm_fast.model.decoder import GATED_MLPS, GatedMLP, GatedProduct, use_gated_product

TOKENS, HIDDEN, WIDE = 9, 8, 24
MODELS = {
    "LlamaMLP": (LlamaModel, LlamaConfig),
    "Qwen2MLP": (Qwen2Model, Qwen2Config),
    "Qwen3MLP": (Qwen3Model, Qwen3Config),
    "Qwen3MoeMLP": (Qwen3MoeModel, partial(Qwen3MoeConfig, mlp_only_layers=[0])),
}


@pytest.fixture(params=GATED_MLPS)
def mlps(request):
    """transformers' MLP and ours, of the same weights."""
    model_type, config_type = MODELS[request.param]
    config = config_type(
        vocab_size=4, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    theirs = model_type(config)
    ours = copy.deepcopy(theirs)
    use_gated_product(ours)
    assert isinstance(ours.layers[0].mlp, GatedMLP)
    return theirs.layers[0].mlp, ours.layers[0].mlp


def passed(mlp, x):
    """Output, gradients of input and weights, and the bytes saved besides the weights."""
    weights = {weight.untyped_storage()._cdata for weight in mlp.parameters()}
    x, saved = x.detach().requires_grad_(), {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    mlp.zero_grad()
    with saved_tensors_hooks(save, lambda tensor: tensor):
        out = mlp(x)
    out.float().sin().sum().backward()
    return [out, x.grad, *(weight.grad for weight in mlp.parameters())], sum(s.nbytes() for s in saved.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_transformers_bit_for_bit(mlps, dtype):
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, HIDDEN).to(dtype)
    (theirs, more), (ours, fewer) = (passed(mlp.to(dtype), x) for mlp in mlps)
    assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True))
    assert more - fewer == TOKENS * WIDE * dtype.itemsize


def test_the_product_has_the_gradients_of_its_formula():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(GatedProduct.apply, (gate, up))


def test_another_activation_is_left_as_it_is():
    model = LlamaModel(
        LlamaConfig(vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, hidden_act="gelu")
    )
    use_gated_product(model)
    assert not isinstance(model.layers[0].mlp, GatedMLP)
