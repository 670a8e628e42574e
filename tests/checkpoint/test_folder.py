"""Checkpoint folders are data: nothing in them is executed, nothing outside them is read, errors name what is wrong."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original import original_config, write_checkpoint
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    GptOssConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint
from mmrm_fast.checkpoint.tensors import TensorFolder
from mmrm_fast.cli import main
from mmrm_fast.config import TrainBatchConfig
from mmrm_fast.data.images import NORMALIZATION, Tiling
from mmrm_fast.data.records import Group
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train.sharding import num_ranks, ranks


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "model", original_config("InternLM2", "300M", 578))
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("native", [False, True], ids=["original", "native"])
def test_nothing_of_a_malicious_folder_is_executed(folder, tmp_path, native):
    if native:
        save_checkpoint(tmp_path / "native", CheckpointFolder(folder).load())
        folder = tmp_path / "native"
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    for name in ("modeling_internvl_chat", "tokenization_internlm2", "configuration_internvl_chat", "processing"):
        (folder / f"{name}.py").write_text(code)
    auto_map = {"AutoModel": "modeling_internvl_chat.Evil", "AutoConfig": "configuration_internvl_chat.Evil"}
    edit(folder / "config.json", auto_map=auto_map)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_internlm2.Evil", None]})
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    CheckpointFolder(folder).load()
    assert main(["inspect", str(folder)]) == 0
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin"])
def test_an_index_cannot_name_a_file_outside_of_its_folder(folder, tmp_path, name):
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(ValueError, match=r"names the file .*expected a safetensors file of this folder"):
        CheckpointFolder(folder).load()


def test_a_shard_that_is_not_there_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"score.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        CheckpointFolder(folder).load()


def test_a_pickle_is_refused_with_the_line_that_converts_it(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*weights_only=True"):
        CheckpointFolder(folder).load()


def test_a_file_that_is_not_safetensors_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        CheckpointFolder(folder).load()


def test_a_native_folder_whose_vocabulary_lacks_the_image_tokens_is_refused(folder, tmp_path):
    checkpoint = CheckpointFolder(folder).load()
    save_checkpoint(tmp_path / "native", checkpoint)
    text = (tmp_path / "native" / "tokenizer.json").read_text()
    (tmp_path / "native" / "tokenizer.json").write_text(text.replace("<img>", "<other>"))
    with pytest.raises(ValueError, match="lacks the image tokens"):
        CheckpointFolder(tmp_path / "native").load().prompt_encoder()


@pytest.mark.parametrize("prefixes", [("model.", ""), ("", "language_model.model."), ("model.", "lm_head")])
def test_every_layout_of_names_that_transformers_wrote_loads(folder, tmp_path, prefixes):
    first, llm = prefixes
    save_checkpoint(tmp_path / "native", CheckpointFolder(folder).load())
    path = tmp_path / "native" / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}  # the file is written over
    renamed = {first + name: value for name, value in state.items() if name != "score.weight"}
    if llm == "language_model.model.":
        renamed = {name.replace("language_model.", llm): value for name, value in renamed.items()}
        renamed["language_model.lm_head.weight"] = torch.zeros(578, 32)
    elif llm:
        renamed["lm_head.weight"] = torch.zeros(578, 32)
    save_file({**renamed, "score.weight": state["score.weight"]}, path)
    again = CheckpointFolder(tmp_path / "native").load().model.state_dict()
    assert all(torch.equal(again["model." + name], state[name]) for name in state if name != "score.weight")


def test_position_embeddings_of_another_size_are_resized(folder):
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config={**config["vision_config"], "image_size": 112}, force_image_size=112)
    positions = CheckpointFolder(folder).load().model.model.vision_tower.embeddings.position_embeddings
    trained = state["vision_model.embeddings.position_embedding"].float()
    assert positions.shape == (1, 65, 24) and torch.equal(positions[:, :1], trained[:, :1])
    corner, other = positions[0, 1], trained[0, 1]
    assert torch.nn.functional.cosine_similarity(corner, other, dim=0) > 0.8


def read_sharded(folder):
    """On every rank: a sharded model holds its rows of the folder's weights, and no others were read for it."""
    whole = CheckpointFolder(folder).load().model.state_dict()
    read, rows = [], TensorFolder.rows

    def counted(self, name, start, stop):
        value = rows(self, name, start, stop)
        read.append(0 if name in self.stacks else value.numel())  # whose parts are counted
        return value

    TensorFolder.rows = counted
    with ranks():
        model = CheckpointFolder(folder).load(with_weights=False).model
        mesh = init_device_mesh("cpu", (num_ranks(),))
        for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layer, model):
            fully_shard(layer, mesh=mesh)
        CheckpointFolder(folder).fill(model)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert held < 0.6 * sum(value.numel() for value in whole.values())
        assert sum(read) <= held + whole["model.vision_tower.embeddings.position_embeddings"].numel()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), whole[name]), name


@pytest.mark.parametrize("llm", ["InternLM2", "Qwen3Moe"])
def test_each_rank_reads_its_own_rows_alone(tmp_path, llm):
    write_checkpoint(tmp_path, original_config(llm, "300M", 578))
    assert run_ranks(read_sharded, tmp_path) == [0, 0]


@pytest.mark.parametrize("native", [False, True], ids=["original", "native"])
def test_a_scorer_reads_every_file_of_settings_once(folder, tmp_path, monkeypatch, native):
    if native:
        save_checkpoint(tmp_path / "native", CheckpointFolder(folder).load())
        folder = tmp_path / "native"
    read, read_text = Counter(), Path.read_text

    def counted(path, *args, **kwargs):
        read[path.name] += path.parent == folder
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counted)
    Scorer.from_pretrained(folder, device="cpu")
    assert read["config.json"] == read["tokenizer_config.json"] == 1
    assert max(read.values()) == 1


# a training's options for pictures take the place of the folder's own


def test_options_that_are_not_given_leave_the_checkpoint_as_it_is(make_checkpoint):
    checkpoint = make_checkpoint()
    assert checkpoint.configured(TrainBatchConfig()) == checkpoint


def test_options_that_are_given_replace_its_own(make_checkpoint):
    config = TrainBatchConfig(min_tiles=2, max_tiles=4, thumbnail=False, pad2square=True, normalize_type="siglip")
    checkpoint = make_checkpoint().configured(config)
    assert checkpoint.tiling == Tiling(56, 2, 4, False, True, (127, 127, 127))
    assert (checkpoint.model.pixel_mean, checkpoint.model.pixel_std) == NORMALIZATION["siglip"]


def test_fewer_tiles_at_most_also_lower_the_least(make_checkpoint):
    checkpoint = make_checkpoint()
    checkpoint = replace(checkpoint, tiling=Tiling(56, 3, 6)).configured(TrainBatchConfig(max_tiles=2))
    assert (checkpoint.tiling.min_tiles, checkpoint.tiling.max_tiles) == (2, 2)


def test_impossible_numbers_of_tiles_are_refused(make_checkpoint):
    with pytest.raises(ValueError, match="--min-tiles 8 --max-tiles 6: expected 1 <= least <= most"):
        make_checkpoint().configured(TrainBatchConfig(min_tiles=8))


# native checkpoints


def test_what_a_model_was_trained_with_is_saved_beside_it(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(max_length=6000)
    save_checkpoint(tmp_path / "long", replace(checkpoint, tiling=replace(checkpoint.tiling, compat="reference")))
    loaded = CheckpointFolder(tmp_path / "long").load()
    assert (loaded.max_length, loaded.compat) == (6000, "reference")
    assert CheckpointFolder(tmp_path / "long").load(max_length=300).max_length == 300


EXPERTS = {
    Qwen3MoeConfig: {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True
    },
    GptOssConfig: {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 7},
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, Phi3Config, Qwen3MoeConfig, GptOssConfig],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saved_loads_with_equal_hidden_states(folder, tmp_path, text, tied):
    checkpoint = CheckpointFolder(folder).load()
    save_checkpoint(tmp_path / "native", checkpoint)
    config = checkpoint.model.model.config
    config.text_config = text(
        vocab_size=578, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, pad_token_id=None,
        **EXPERTS.get(text, {}),
    )  # fmt: skip
    config.tie_word_embeddings, config.internvl_chat = tied, {}
    torch.manual_seed(0)
    whole = InternVLForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "native", max_shard_size="20KB")
    (tmp_path / "native" / "model.safetensors").unlink()
    scorer = Scorer(CheckpointFolder(tmp_path / "native").load())
    group = Group("test", 0, None, "What?", None, (), ("the red circle",))
    (ids,) = scorer.checkpoint.prompt_encoder().encode(group.prompt, group.responses).sequences
    hidden = whole.model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0, -1]
    expected = float((hidden @ scorer.model.score.weight[0]).detach())
    assert scorer.score_groups([group])[0].rewards[0] == pytest.approx(expected, abs=1e-5)


def test_sequences_may_be_longer_than_a_sliding_window(tmp_path, pristine):
    config = original_config("Phi3", "300M", 578)
    config["llm_config"]["sliding_window"] = 120
    write_checkpoint(tmp_path, config)
    scorer = Scorer.from_pretrained(tmp_path, device="cpu", max_length=4096)
    group = Group("test", 0, None, "What?", None, (), ("the red circle " * 40, "the red circle"))
    (scored,) = scorer.score_groups([group])
    assert scored.truncated == (False, False)
    for reward, ids in zip(
        scored.rewards, scorer.checkpoint.prompt_encoder().encode(group.prompt, group.responses).sequences, strict=True
    ):
        hidden = pristine(scorer.model.model)(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0, -1]
        assert reward == pytest.approx(float((hidden @ scorer.model.score.weight[0]).detach()), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "gemma3_text"}, "Gemma3TextModel is not supported: its token embedding is"),
        ({"model_type": "gemma3"}, "AttributeError: .* no attribute 'hidden_size'"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "Class validation error"),
    ],
)
def test_text_models_that_are_not_computed_here_are_errors_that_name_the_folder(folder, tmp_path, text, message):
    save_checkpoint(tmp_path / "native", CheckpointFolder(folder).load())
    edit(tmp_path / "native" / "config.json", text_config=text)
    with pytest.raises(ValueError, match=f"native/config.json: .*{message}"):
        CheckpointFolder(tmp_path / "native").load()


@pytest.mark.parametrize("part", ["text_config", None])
def test_quantized_weights_are_refused_by_name(folder, tmp_path, part):
    save_checkpoint(tmp_path / "native", CheckpointFolder(folder).load())
    quantized = {"quantization_config": {"quant_method": "mxfp4"}}
    edit(tmp_path / "native" / "config.json", **({part: quantized} if part else quantized))
    with pytest.raises(ValueError, match=r"quant_method mxfp4: .* dequantized \(`Mxfp4Config\(dequantize=True"):
        CheckpointFolder(tmp_path / "native").load()
