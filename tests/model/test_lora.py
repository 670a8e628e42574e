"""Adapters compute what peft's do, rewards and every gradient, and keep no more of a pass than a trained layer does."""

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mmrm_fast.config import WeightsConfig
from mmrm_fast.model.lora import MAIN, PROXY, activate, add_lora

TOKENS, HIDDEN, RANK = 7, 12, 4


class Block(nn.Module):
    """Three layers that read the same input, as query, key and value do."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(HIDDEN, size, bias=bias) for size, bias in ((12, True), (6, True), (6, False))
        )

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1).sin()


@pytest.fixture
def make_blocks():
    def make(dtype=torch.float64, **options):
        """Two adapters on a block, both away from zero."""
        torch.manual_seed(0)
        part = nn.Module()
        part.layers = nn.ModuleList([Block()]).to(dtype)
        config = WeightsConfig(lora_r=RANK, lora_alpha=6.0, **options)
        for name in (MAIN, PROXY):
            add_lora(part, config, name)
        for key, parameter in part.named_parameters():
            if ".lora_" in key:
                parameter.data = torch.randn_like(parameter).to(max(dtype, torch.float32, key=lambda d: d.itemsize))
        return part

    return make


def lora_layers(part):
    return [module for module in part.modules() if isinstance(module, LoraLayer)]


def gradients(part, x, name, *, run=None):
    """Output and gradients by name, of the input too."""
    activate(part, name)
    part.zero_grad()
    x = x.detach().requires_grad_()
    out = (run or part.layers[0])(x)
    out.float().square().sum().backward()
    named = {key: p.grad for key, p in part.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **named}


def by_peft(part, x, name):
    for layer in lora_layers(part):
        layer.__class__ = LoraLinear
    return gradients(part, x, name)


@pytest.mark.parametrize("name", [MAIN, PROXY])
@pytest.mark.parametrize("shape", [(1, TOKENS), (2, TOKENS), (1, 1), (1, 0)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_outputs_and_every_gradient_are_pefts(make_blocks, name, shape, checkpointed):
    part = make_blocks()
    x = torch.randn(*shape, HIDDEN, dtype=torch.float64)
    block = part.layers[0]
    run = (lambda x: checkpoint(block, x, use_reentrant=False)) if checkpointed else block
    ours, theirs = gradients(part, x, name, run=run), by_peft(part, x, name)
    assert ours.keys() == theirs.keys() and len(ours) == 2 + 6  # A and B of three layers, of one adapter
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)


def test_fp32_adapters_on_a_bfloat16_layer_add_up_in_fp32(make_blocks):
    part = make_blocks(torch.bfloat16)
    x = torch.randn(1, TOKENS, HIDDEN).bfloat16()
    ours, theirs = gradients(part, x, MAIN), by_peft(part, x, MAIN)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-2, atol=2e-2 * float(theirs[key].abs().max()))


def test_the_arithmetic_has_the_gradients_of_its_formula(make_blocks):
    part = make_blocks()
    activate(part, PROXY)
    assert torch.autograd.gradcheck(part.layers[0], torch.randn(1, 3, HIDDEN, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_that_read_one_tensor_save_it_once_and_in_its_own_dtype(make_blocks, dtype):
    part = make_blocks(dtype)
    activate(part, MAIN)
    weights = {parameter.untyped_storage()._cdata for parameter in part.parameters()}
    x = torch.randn(1, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    saved = {}

    def save(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        outputs = [layer(x) for layer in lora_layers(part)]
    low = 3 * TOKENS * RANK * part.layers[0].q.lora_A[MAIN].weight.itemsize
    assert len(outputs) == 3 and sum(s.nbytes() for s in saved.values()) == x.nbytes + low


def test_dropout_is_pefts(make_blocks):
    part = make_blocks(lora_dropout=0.5).train()
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
    torch.manual_seed(1)
    ours = gradients(part, x, MAIN)
    torch.manual_seed(1)
    theirs = by_peft(part, x, MAIN)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.equal(ours["out"], gradients(part.eval(), x, MAIN)["out"])
