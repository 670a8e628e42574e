"""Names and configs of original checkpoints: every published size maps tensor by tensor, with nothing left over."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from original import LLM, VISION, original_config, shapes
from published import BILLIONS, PUBLISHED, published_config
from transformers import InternVLForConditionalGeneration, InternVLModel
from transformers.core_model_loading import revert_weight_conversion

from mmrm_fast.checkpoint import internvl_chat
from mmrm_fast.checkpoint.fill import NativeTensors
from mmrm_fast.checkpoint.folder import plain_name
from mmrm_fast.checkpoint.internvl_chat import LM_HEAD, SCORE, Source
from mmrm_fast.checkpoint.tensors import TensorFolder, as_stored
from mmrm_fast.data.images import NORMALIZATION, Tiling
from mmrm_fast.model.reward_model import RewardModel


@dataclass
class NoBytes:
    """A stored tensor of which there is the shape alone, a bfloat16 one."""

    shape: tuple[int, ...]

    def get_shape(self):
        return self.shape

    def __getitem__(self, rows):
        return torch.empty(self.shape, dtype=torch.bfloat16, device="meta")[rows]


class NamedShapes(TensorFolder):
    """A folder of which there are names and shapes alone."""

    def __init__(self, folder, shapes, rename=lambda name: name):
        (folder / "model.safetensors").touch()
        index = {"weight_map": dict.fromkeys(shapes, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.shapes = shapes
        super().__init__(folder, rename)

    def slice(self, file, stored):
        return NoBytes(self.shapes[stored])


def native_config(config):
    return internvl_chat.native_config(config, vocab_size=config["llm_config"]["vocab_size"], image_token_id=1)


def meta_model(config):
    with torch.device("meta"):
        return RewardModel(InternVLModel(native_config(config)), *NORMALIZATION["imagenet"])


def written(native, place):
    """Names and shapes of what is written of a folder, native tensors where `place` puts them."""
    parts = {}
    for name, where in ((name, place(name)) for name in native.stored()):
        value = torch.empty(native.shape(name), dtype=native.dtype(name), device="meta")
        parts.setdefault(where.name, []).append((where.spans, value))
    whole = ((name, internvl_chat.packed(group)) for name, group in parts.items())
    return {name: tuple(value.shape) for name, value in as_stored(whole, native.text_model)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_size_has_its_place(tmp_path, name):
    config = published_config(name)
    model, published = meta_model(config), shapes(config)
    native = NativeTensors(NamedShapes(tmp_path, published), model, is_original=True)
    native.text_model = model.model.config.text_config.model_type
    assert written(native, native.sources.get) == published
    assert model.model.config.image_seq_length == 256
    count = sum(map(math.prod, published.values())) - config["llm_config"]["hidden_size"]  # the score
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.011)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("InternVL3.5")])
def test_every_tensor_that_transformers_stores_of_a_published_size_has_its_place(tmp_path, name):
    config = published_config(name)
    with torch.device("meta"):
        whole = InternVLForConditionalGeneration(native_config(config))
    state = {name: tuple(value.shape) for name, value in revert_weight_conversion(whole, whole.state_dict()).items()}
    tensors, model = NamedShapes(tmp_path, state, plain_name), meta_model(config)
    native = NativeTensors(tensors, model, is_original=False)
    native.text_model = model.model.config.text_config.model_type
    assert set(native.stored()) == {*native.shapes, LM_HEAD} - {SCORE}
    assert written(native, Source) == {plain_name(name): shape for name, shape in state.items()}


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "packed shape"])
def test_what_does_not_fit_is_named_with_what_was_expected(tmp_path, change):
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
        NativeTensors(NamedShapes(tmp_path, places), model, is_original=True)


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
@pytest.mark.parametrize("llm", LLM)
def test_configs_go_there_and_back(llm, tower):
    config = original_config(llm, tower, 569, select_layer=-2, ps_version="v1", pad2square=False)
    native = internvl_chat.native_config(config, vocab_size=569, image_token_id=1)
    back = internvl_chat.original_config(native, Tiling(56, 1, 6))
    for part in ("vision_config", "llm_config"):
        theirs, ours = config.pop(part), back[part]
        assert {name: ours[name] for name in theirs} == theirs
    assert {name: back[name] for name in config} == config
