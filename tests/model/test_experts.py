"""Routers: the loss that balances them is transformers' own, over packed tokens as over padded ones."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint as recompute
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from mmrm_fast.data.packing import plan_tokens
from mmrm_fast.model.experts import active_parameters, balance_loss, expert_share, routing

EXPERTS, TOP_K = 8, 3


@pytest.mark.parametrize("rows", [(5,), (40, 40), (40, 40, 7)], ids=str)
def test_the_balance_loss_and_its_gradients_are_those_of_transformers(rows):
    torch.manual_seed(0)
    logits = [torch.randn(count, EXPERTS, requires_grad=True) for count in rows]
    losses = [balance_loss(logits, TOP_K), load_balancing_loss_func(tuple(logits), EXPERTS, TOP_K)]
    ours, theirs = (torch.autograd.grad(loss, logits) for loss in losses)
    torch.testing.assert_close(*losses)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_even_use_of_all_experts_costs_as_much_as_experts_are_chosen_and_no_tokens_nothing():
    even = torch.eye(EXPERTS).roll(1, 0) * 1e-6 + torch.eye(EXPERTS) * 2e-6
    assert float(balance_loss([even], 2)) == pytest.approx(2.0, rel=1e-5)
    assert float(balance_loss([torch.zeros(0, EXPERTS)], 2)) == 0.0


@pytest.fixture
def packed(make_checkpoint):
    """A model of experts whose last layer computes every token, and two sequences that share nothing, packed too."""
    model = make_checkpoint(text="qwen3_moe").model.train()
    model.reads_last_tokens = False
    del model.model.language_model.layers[-1].forward
    sequences = [np.arange(10, 40), np.arange(50, 70)]
    return model, plan_tokens(sequences, None), [torch.from_numpy(sequence) for sequence in sequences]


def padded_loss(model, sequences):
    """The loss as transformers computes it over a padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    model.set_attn_implementation("sdpa")
    logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).router_logits
    return load_balancing_loss_func(logits, EXPERTS, TOP_K, mask)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_tokens_are_balanced_as_padded_ones_are_with_equal_gradients(packed, pristine, checkpointed):
    model, plan, sequences = packed
    assert len(plan.source_T) == sum(map(len, sequences))
    twin = pristine(model.model).language_model
    expected = padded_loss(twin, sequences)
    expected.backward()
    for layer in model.model.language_model.layers if checkpointed else ():
        layer.forward = recomputed(layer.forward)
    with routing(model.model.language_model) as logits:
        model(plan)
    loss = balance_loss(logits, TOP_K)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert len(logits) == 2
    own = dict(model.model.language_model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert twin.layers[0].mlp.gate.weight.grad.any()


def recomputed(forward):
    return lambda *args, **kwargs: recompute(forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize(
    ("text", "share"), [("qwen3_moe", TOP_K / EXPERTS), ("gpt_oss", 2 / 4), ("granitemoe", 2 / 4), ("llama", 1)]
)
def test_the_share_is_known_by_whatever_names_a_config_has(make_checkpoint, text, share):
    assert expert_share(make_checkpoint(text=text).model) == share


def test_a_token_is_active_in_its_share_of_the_experts_and_in_all_the_rest(make_checkpoint):
    model, dense = make_checkpoint(text="qwen3_moe").model, make_checkpoint().model
    experts = 2 * EXPERTS * 3 * 32 * 24
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert active_parameters(model) == everything - experts * (EXPERTS - TOP_K) // EXPERTS
    assert active_parameters(dense) == sum(parameter.numel() for parameter in dense.parameters())
