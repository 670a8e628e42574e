"""Experts of a mixture: stored one by one or stacked, read as one tensor a layer, written as transformers does."""

import pytest
import torch
from original import original_config, write_checkpoint
from safetensors.torch import load_file, save_file

from mmrm_fast.checkpoint.export import convert_folder, summary
from mmrm_fast.checkpoint.folder import CheckpointFolder

LAYER = "language_model.layers.1.mlp.experts"


@pytest.fixture
def native(tmp_path):
    """A native folder whose experts are stored one by one."""
    write_checkpoint(tmp_path / "original", original_config("Qwen3Moe", "300M", 578))
    convert_folder(tmp_path / "original", tmp_path / "native")
    return tmp_path / "native"


def rewrite(folder, change):
    """Change the stored tensors of a folder, a dict by name, in place."""
    state = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def stack(state):
    """As transformers computes with them."""
    for layer in (LAYER.replace("1", "0"), LAYER):
        parts = {
            part: [state.pop(f"{layer}.{number}.{part}_proj.weight") for number in range(8)]
            for part in ("gate", "up", "down")
        }
        gates = map(torch.cat, zip(parts["gate"], parts["up"], strict=True))
        state[f"{layer}.gate_up_proj"] = torch.stack(list(gates))
        state[f"{layer}.down_proj"] = torch.stack(parts["down"])


def test_experts_that_are_stored_stacked_are_the_same_model(native, tmp_path):
    expected = CheckpointFolder(native).load().model.state_dict()
    stored = load_file(native / "model.safetensors")
    assert summary(native)["language model"].endswith("RoPE default, 3 of 8 experts a token")
    rewrite(native, stack)
    again = CheckpointFolder(native).load().model.state_dict()
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in expected)
    convert_folder(native, tmp_path / "again")
    apart = load_file(tmp_path / "again" / "model.safetensors")
    assert apart.keys() == stored.keys() and all(torch.equal(apart[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{LAYER}.3.up_proj.weight"), rf"no tensor {LAYER}\.3\.up_proj\.weight"),
        (
            lambda state: [state.pop(f"{LAYER}.7.{part}_proj.weight") for part in ("gate", "up", "down")],
            rf"{LAYER}\.gate_up_proj is \[7, 48, 32\], expected \[8, 48, 32\]",
        ),
        (
            lambda state: state.update({f"{LAYER}.2.down_proj.weight": torch.zeros(32, 25)}),
            rf"{LAYER}\.0\.down_proj\.weight and {LAYER}\.2\.down_proj\.weight differ in shape",
        ),
    ],
    ids=["a part is missing", "an expert is missing", "an expert has another shape"],
)
def test_experts_that_do_not_fit_are_named(native, change, message):
    rewrite(native, change)
    with pytest.raises(ValueError, match=message):
        CheckpointFolder(native).load()
