"""Names and configs of original checkpoints: every published size maps tensor by tensor, with nothing left over."""

import pytest
import torch
from original import VISION, original_config, shapes
from transformers import InternVLModel

from mmrm_fast.checkpoint import internvl_chat
from mmrm_fast.checkpoint.fill import NativeTensors
from mmrm_fast.data.images import NORMALIZATION, Tiling
from mmrm_fast.model.reward_model import RewardModel

TOWERS = {
    "300M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "6B": {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800},
}
SU = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED = {  # vision tower, LLM, hidden size, layers, heads, key/value heads, MLP, vocabulary
    "InternVL2-1B, 2.5-1B, 3-1B": ("300M", "Qwen2", 896, 24, 14, 2, 4864, 151_655),
    "InternVL2-2B, 2.5-2B": ("300M", "InternLM2", 2048, 24, 16, 8, 8192, 92_553),
    "InternVL2-4B": ("300M", "Phi3", 3072, 32, 32, 32, 8192, 32_020),
    "InternVL2-8B, 2.5-8B": ("300M", "InternLM2", 4096, 32, 32, 8, 14336, 92_553),
    "InternVL2-26B, 2.5-26B": ("6B", "InternLM2", 6144, 48, 48, 8, 16384, 92_553),
    "InternVL2-40B": ("6B", "Llama", 7168, 60, 56, 8, 20480, 64_009),
    "InternVL2-Llama3-76B": ("6B", "Llama", 8192, 80, 64, 8, 28672, 128_265),
    "InternVL2.5-4B": ("300M", "Qwen2", 2048, 36, 16, 2, 11008, 151_674),
    "InternVL3-2B": ("300M", "Qwen2", 1536, 28, 12, 2, 8960, 151_674),
    "InternVL3-8B": ("300M", "Qwen2", 3584, 28, 28, 4, 18944, 151_674),
    "InternVL3-14B": ("300M", "Qwen2", 5120, 48, 40, 8, 13824, 151_674),
    "InternVL2.5-38B, 3-38B": ("6B", "Qwen2", 5120, 64, 40, 8, 27648, 151_674),
    "InternVL2.5-78B, 3-78B": ("6B", "Qwen2", 8192, 80, 64, 8, 29568, 151_674),
}
BILLIONS = {"InternVL2-1B": 0.8, "InternVL2-8B": 7.7, "InternVL2-26B": 25.0, "InternVL2-Llama3-76B": 75.2}


class NamedShapes:
    """Stands for a folder's tensors in the checks, which read names and shapes alone."""

    folder = "folder"

    def __init__(self, places):
        self.places = places

    def __contains__(self, name):
        return name in self.places

    def shape(self, name):
        return self.places[name]

    def names(self):
        return list(self.places)


def published_config(name):
    tower, llm, hidden, layers, heads, kv_heads, mlp, vocab = PUBLISHED[name]
    config = original_config(llm, tower, vocab, force_image_size=448)
    config["vision_config"] |= {**TOWERS[tower], "image_size": 448}
    config["llm_config"] |= {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip
    if llm == "Phi3":
        rope = {"rope_scaling": SU, "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096}
        config["llm_config"] |= {**rope, "sliding_window": 262_144}
    return config


def meta_model(config):
    native = internvl_chat.native_config(config, vocab_size=config["llm_config"]["vocab_size"], image_token_id=1)
    with torch.device("meta"):
        return RewardModel(InternVLModel(native), *NORMALIZATION["imagenet"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_size_has_its_place(name):
    config = published_config(name)
    model, published = meta_model(config), shapes(config)
    native = NativeTensors(NamedShapes(published), model, is_original=True)
    parts = {}
    for name, where in native.sources.items():
        parts.setdefault(where.name, []).append((where.spans, torch.empty(native.shape(name), device="meta")))
    assert {name: tuple(internvl_chat.packed(group).shape) for name, group in parts.items()} == published
    assert model.model.config.image_seq_length == 256
    expected = BILLIONS.get(name.split(",")[0])
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert expected is None or count == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "packed shape"])
def test_what_does_not_fit_is_named_with_what_was_expected(change):
    config = original_config("InternLM2", "300M", 569)
    model, places = meta_model(config), dict(shapes(config))
    wqkv, norm = "language_model.model.layers.1.attention.wqkv.weight", "vision_model.encoder.layers.0.norm1.bias"
    if change == "missing":
        del places[norm]
        message = rf"no tensor {norm}, expected \[24\] for vision_tower.encoder.layer.0.layernorm_before.bias"
    elif change == "extra":
        places["mlp2.weight"] = (1,)
        message = "1 tensors have no place in the model, such as mlp2.weight"
    elif change == "shape":
        places[norm] = (25,)
        message = rf"{norm} is \[25\], expected \[24\]"
    else:
        places[wqkv] = (65, 32)
        message = rf"{wqkv} is \[65, 32\], expected \[64, 32\]"
    with pytest.raises(ValueError, match=message):
        NativeTensors(NamedShapes(places), model, is_original=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures is 'MambaForCausalLM'; expected one of InternLM2For"),
        ({"architectures": None}, "architectures is None; expected one of"),
    ],
)
def test_an_unknown_language_model_is_refused_with_those_that_are_known(change, message):
    config = original_config("Llama", "300M", 569)
    config["llm_config"] |= change
    with pytest.raises(ValueError, match=message):
        internvl_chat.native_config(config, vocab_size=569, image_token_id=1)


def test_a_norm_that_transformers_would_compute_otherwise_is_refused():
    config = original_config("Llama", "6B", 569)
    config["vision_config"]["layer_norm_eps"] = 1e-5
    with pytest.raises(ValueError, match="layer_norm_eps with qk_normalization must be 1e-6, got 1e-05"):
        internvl_chat.native_config(config, vocab_size=569, image_token_id=1)


@pytest.mark.parametrize("tower", VISION)
@pytest.mark.parametrize("llm", ["InternLM2 dynamic", "Phi3 su", "Phi3 yarn", "Llama", "Qwen2", "Qwen3", "Qwen3Moe"])
def test_configs_go_there_and_back(llm, tower):
    config = original_config(llm, tower, 569, select_layer=-2, ps_version="v1", pad2square=False)
    native = internvl_chat.native_config(config, vocab_size=569, image_token_id=1)
    back = internvl_chat.original_config(native, Tiling(56, 1, 6))
    for part in ("vision_config", "llm_config"):
        theirs, ours = config.pop(part), back[part]
        assert {name: ours[name] for name in theirs} == theirs
    assert {name: back[name] for name in config} == config
