"""Compiled blocks: selective checkpointing is inside of what is compiled, and its recomputation planned there."""

from functools import partial

import pytest
import torch

from mmrm_fast.config import MemoryConfig
from mmrm_fast.data.packing import plan_tokens
from mmrm_fast.model.decoder import packed_hidden
from mmrm_fast.train import sharding

SEQUENCES = [list(range(1, count)) for count in (9, 12)], [list(range(1, 7)) + [number] * 5 for number in (3, 4, 5)]


@pytest.fixture
def one_rank():
    with sharding.ranks() as device:
        yield device


EVERY = [(mode, "inductor") for mode in ("selective", "none", "full")]  # whose C++ takes a minute to compile
CASES = [("selective", "aot_eager_decomp_partition"), *(pytest.param(*own, marks=pytest.mark.slow) for own in EVERY)]


@pytest.mark.parametrize(("checkpointing", "backend"), CASES)
def test_a_compiled_decoder_layer_has_the_gradients_of_a_plain_one(
    make_checkpoint, one_rank, monkeypatch, checkpointing, backend
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    gradients = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = make_checkpoint().model.drop_vision()
        language_model = model.model.language_model
        language_model.layers = language_model.layers[-1:]
        mode = checkpointing if compiled else "none"
        sharding.shard(model, one_rank, MemoryConfig(compile=compiled, activation_checkpointing=mode))
        for sequences in SEQUENCES:
            plan = plan_tokens([torch.tensor(keys).numpy() for keys in sequences], None)
            embeds = language_model.embed_tokens.weight[plan.source_T]
            packed_hidden(language_model, embeds, plan).square().sum().backward()
        gradients[compiled] = {name: p.grad for name, p in language_model.named_parameters()}
    for name, expected in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], expected, rtol=1e-4, atol=1e-4)
