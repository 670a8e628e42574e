"""The dry run: figures that can be checked by hand, and a refusal of what cannot fit."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from original import LLM, original_config, write_checkpoint
from published import published_config
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from benchmarks.models import FULL, model_config
from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint
from mmrm_fast.cli import main
from mmrm_fast.config import MemoryConfig, TrainConfig
from mmrm_fast.config_file import with_options
from mmrm_fast.model.decoder import use_gated_product
from mmrm_fast.train import memory
from mmrm_fast.train.dry_run import fitted
from mmrm_fast.train.memory import count, needed, run_pass, sized_models
from mmrm_fast.train.paper import Traffic, paper_rows
from mmrm_fast.train.proxy import parse_proxy
from mmrm_fast.train.rates import Rates

HIDDEN, LAYERS, KV, MLP, VOCABULARY = 3584, 28, 4 * 128, 18944, 151674
LANGUAGE_MODEL = (
    VOCABULARY * HIDDEN
    + LAYERS * (2 * HIDDEN * HIDDEN + HIDDEN + 2 * (HIDDEN * KV + KV) + 3 * HIDDEN * MLP + 2 * HIDDEN)
    + HIDDEN
)
PROJECTOR = 2 * 4096 + (4096 * HIDDEN + HIDDEN) + (HIDDEN * HIDDEN + HIDDEN)
TRAINED = LANGUAGE_MODEL + PROJECTOR + HIDDEN


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A folder with nothing but the config.json of InternVL3-8B."""
    vision = InternVLVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=448,
        patch_size=14, attention_bias=True,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=28,
        num_key_value_heads=4, intermediate_size=MLP,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("InternVL3-8B")
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=151667)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return with_options(TrainConfig(), model=folder, robust=True, activation_checkpointing="full")


def make_sized(config):
    """The models by branch in three sizes; adapters of one are one."""
    return made_once(replace(config, memory=MemoryConfig(dtype=config.memory.dtype)))


@cache
def made_once(config):
    return dict(zip(("main", "proxy"), dict.fromkeys(sized_models(parse_proxy(config))), strict=False))


def make_models(config):
    return {name: models.whole for name, models in make_sized(config).items()}


def activations(config, name, tokens, tiles):
    return memory.activations(config.memory.activation_checkpointing, make_sized(config)[name], tokens, tiles)


def bytes_of(config, name="main", num_gpus=8, tokens=8192, tiles=16):
    saved = activations(config, name, tokens, tiles)
    return memory.memory(config.memory, make_models(config)[name], saved, num_gpus=num_gpus)


def test_parameters_of_a_published_size(eight):
    models = make_models(eight)
    assert count(models["main"].model.language_model) == LANGUAGE_MODEL
    assert count(models["main"], True) == TRAINED
    assert count(models["proxy"]) == LANGUAGE_MODEL + HIDDEN
    assert 0.30e9 < count(models["main"].model.vision_tower) < 0.31e9


def test_trained_weights_gradients_and_moments_are_fp32_shards_and_frozen_ones_bf16(eight):
    frozen = count(make_models(eight)["main"], False)
    held = bytes_of(eight)
    assert held.weights == pytest.approx((4 * TRAINED + 2 * frozen) / 8)
    assert held.gradients == pytest.approx(4 * TRAINED / 8)
    assert held.optimizer == pytest.approx(8 * TRAINED / 8)
    assert bytes_of(with_options(eight, replicas=2)).gradients == pytest.approx(4 * TRAINED / 4)
    assert bytes_of(with_options(eight, cpu_offload=True)).optimizer == 0


def test_with_full_checkpointing_a_token_leaves_its_hidden_state_in_every_layer(eight):
    more, fewer = (activations(eight, "proxy", tokens, 1) for tokens in (2048, 1024))
    per_token = (more - fewer) / 1024
    whole = activations(with_options(eight, activation_checkpointing="none"), "proxy", 1024, 1) / 1024
    final_norm = (4 + 2) * HIDDEN  # its input in fp32 and, normalised, in bf16
    a_layer = (whole - final_norm) / LAYERS
    assert per_token == pytest.approx(2 * HIDDEN * LAYERS + a_layer + final_norm, rel=0.005)
    kept = activations(with_options(eight, activation_checkpointing="selective"), "proxy", 1024, 1) / 1024
    assert per_token < kept < whole


def test_a_frozen_vision_tower_saves_nothing_and_a_trained_one_does(eight):
    frozen, trained = (activations(with_options(eight, freeze_backbone=f), "main", 1024, 64) for f in (True, False))
    hidden_states = 64 * 1025 * 1024 * 2 * 24
    assert trained - frozen > hidden_states


def test_activations_are_what_a_real_pass_saves(make_checkpoint, tmp_path):
    """Counted from one and two blocks on the meta device against three blocks that are really run."""
    model = make_checkpoint().model
    config = model.model.config
    config.text_config.num_hidden_layers = 3
    config.text_config.layer_types = ["full_attention"] * 3
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    plain = with_options(TrainConfig(), model=tmp_path, robust=True, dtype="float32")
    with torch.device("cpu"):
        real = type(model.model.language_model)(config.text_config)
    embeds = torch.zeros(1, 100, config.text_config.hidden_size, requires_grad=True)
    ends = torch.tensor([0, 100], dtype=torch.int32)
    places = torch.arange(100)
    run = lambda: real(  # noqa: E731
        inputs_embeds=embeds, position_ids=places[None], use_cache=False, cu_seqlens_q=ends, kv_index=places,
        cu_seqlens_k=ends, max_seqlen_q=100, max_seqlen_k=100,
    )  # fmt: skip
    real.set_attn_implementation("mmrm_trie")
    use_gated_product(real)
    assert activations(plain, "proxy", 100, 1) == pytest.approx(run_pass(run, real).saved, rel=0.02)


@pytest.mark.parametrize("name", ["InternVL3.5-30B-A3B", "InternVL3.5-241B-A28B"])
def test_a_mixture_is_held_with_all_its_experts_and_computed_with_those_of_a_token(tmp_path, capsys, name):
    settings = published_config(name)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = with_options(TrainConfig(), model=tmp_path, activation_checkpointing="full")
    (model,), llm = make_models(config).values(), settings["llm_config"]
    width, layers, experts = (llm[key] for key in ("hidden_size", "num_hidden_layers", "num_experts"))
    expert = 3 * width * llm["moe_intermediate_size"]
    queries, keys = (llm[f"num_{of}_heads"] * llm["head_dim"] for of in ("attention", "key_value"))
    others = 2 * width * queries + 2 * width * keys + experts * width  # attention and router
    norms = 2 * width + 2 * llm["head_dim"]
    text = llm["vocab_size"] * width + layers * (others + experts * expert + norms) + width
    assert count(model.model.language_model) == text
    held = bytes_of(config, num_gpus=64)
    assert held.optimizer == pytest.approx(8 * count(model, True) / 64) and count(model, True) > text
    assert 2 * experts * expert < held.gathered / 2 < 4 * (experts * expert + text / layers)
    assert Rates([model], 256, torch.device("cpu")).text == [6 * layers * (others + 8 * expert)]
    assert main(["train", "--dry-run", "--model", str(tmp_path), "--num-gpus", "64"]) == 0
    active = count(model) - layers * (experts - 8) * expert
    assert f"{active:,}" in capsys.readouterr().out
    assert main(["train", "--dry-run", "--model", str(tmp_path), "--dtype", "float32"]) == 2


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["main", "proxy"]),
        ({"proxy_model": "lora", "llm_lora": True}, ["main"]),
        ({"robust": False}, ["main"]),
    ],
)
def test_every_proxy_choice_has_its_models(eight, options, names):
    models = make_models(with_options(eight, **options))
    assert list(models) == names
    if options.get("llm_lora"):
        assert count(models["main"], True) < 0.1 * count(models["main"])
        full = needed([bytes_of(eight, name) for name in ("main", "proxy")])
        assert bytes_of(with_options(eight, **options)).total < 0.6 * full


BENCHMARK = {"main": {"tokens": 5346, "tiles": 16}, "proxy": {"tokens": 1250, "tiles": 1}}


def over_loaded(config):
    """Bytes of a step over the loaded weights at the sizes of `benchmarks/models.py`, in fp32 on one rank."""
    memories = [bytes_of(config, name, num_gpus=1, **BENCHMARK[name]) for name in make_models(config)]
    return needed(memories) - sum(memory.weights for memory in memories)


@pytest.mark.parametrize(("checkpointing", "bound"), [("full", 0.6), ("none", 0.8)])
def test_two_adapters_need_no_more_than_this_share_over_the_loaded_weights(tmp_path, checkpointing, bound):
    """Without checkpointing activations are most of it, and both ways keep the same."""
    (tmp_path / "config.json").write_text(json.dumps(model_config(FULL).to_dict()))
    full = with_options(
        TrainConfig(), model=tmp_path, robust=True, dtype="float32", activation_checkpointing=checkpointing
    )
    lora = with_options(full, llm_lora=True, proxy_model="lora")
    assert over_loaded(lora) < bound * over_loaded(full)


def run(config, *arguments):
    return main(["train", "--dry-run", "--robust", "--model", str(config.weights.model), *arguments])


def test_what_does_not_fit_is_refused_with_what_helps(eight, capsys):
    assert run(eight, "--gpu-memory", "80") == 2
    assert "--num-gpus" in capsys.readouterr().err
    options = ["--num-gpus", "16", "--activation-checkpointing", "full"]
    assert run(eight, "--gpu-memory", "80", *options) == 0
    printed = capsys.readouterr().out
    assert f"{LANGUAGE_MODEL:,}" in printed and "fits" in printed


def test_a_proxy_without_a_model_says_what_it_spares(eight, make_checkpoint, write_jsonl, tmp_path, capsys):
    options = ["--proxy-model", "ngrams", "--num-gpus", "8"]
    assert run(eight, "--gpu-memory", "80", "--activation-checkpointing", "full", *options) == 0
    trained = LANGUAGE_MODEL + HIDDEN
    parts = (f"{name} {size * trained / 8 / 2**30:.2f}" for name, size in (("gradients", 4), ("optimizer", 8)))
    assert ", ".join(parts) in capsys.readouterr().out
    save_checkpoint(tmp_path / "model", make_checkpoint())
    data = write_jsonl([{"prompt": "What?", "chosen": f"answer {i}", "rejected": "no"} for i in range(40)])
    assert run(with_options(TrainConfig(), model=tmp_path / "model"), "--data", str(data), *options) == 0
    assert "and 100% more FLOPs a step" in capsys.readouterr().out  # all of a record is text
    options[1] = "probe"
    assert run(with_options(TrainConfig(), model=tmp_path / "model"), "--data", str(data), *options) == 0
    assert "the probe's forward over all texts: " in capsys.readouterr().out


def test_tokens_and_steps_come_from_the_data(make_checkpoint, write_jsonl, tmp_path, capsys):
    save_checkpoint(tmp_path / "model", make_checkpoint())
    data = write_jsonl([{"prompt": "What?", "chosen": f"answer {i}", "rejected": "no"} for i in range(40)])
    config = with_options(TrainConfig(), model=tmp_path / "model")
    assert run(config, "--data", str(data), "--pairs-per-step", "8") == 0
    printed = capsys.readouterr().out
    assert "40 records" in printed and "a step: 8 pairs" in printed and "an epoch: about 5 steps" in printed


@pytest.mark.parametrize(
    ("pairs", "records", "steps"), [("all", 12, 12), ("expand", 72, 9), ("2", 12, 3)], ids=["all", "expand", "2"]
)
def test_pairs_of_a_kwise_record_are_planned_as_they_are_trained(
    make_checkpoint, write_jsonl, tmp_path, capsys, pairs, records, steps
):
    save_checkpoint(tmp_path / "model", make_checkpoint())
    scores = {"responses": ["a", "b", "c", "d"], "scores": [4, 3, 2, 1]}
    data = write_jsonl([{"prompt": f"What? {i}", **scores} for i in range(12)])
    arguments = ["--data", str(data), "--pairs-per-step", "8", "--pairs", pairs]
    assert run(with_options(TrainConfig(), model=tmp_path / "model"), *arguments) == 0
    printed = capsys.readouterr().out
    assert f"data: {records} records" in printed and f"an epoch: about {steps} steps" in printed


@pytest.mark.parametrize("llm", LLM)
def test_an_original_folder_is_planned_from_its_config_alone(tmp_path, capsys, llm):
    config = original_config(llm, "300M", vocab_size=700)
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = with_options(TrainConfig(), model=tmp_path)
    assert run(plan) == 0 and "need --data and the checkpoint's tokenizer" in capsys.readouterr().out
    planned = count(make_models(plan)["main"])
    write_checkpoint(tmp_path, config)
    assert planned == count(CheckpointFolder(tmp_path).load().model)


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert run(with_options(TrainConfig(), model=tmp_path / "nothing")) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu_memory", "mode"), [("192", "none"), ("96", "selective"), ("48", "full")])
def test_the_least_is_recomputed_that_fits(eight, capsys, gpu_memory, mode):
    """The figures of all three stand beside it, and what loading takes."""
    options = ["--num-gpus", "8", "--gpu-memory", gpu_memory, "--tokens-per-micro-batch", "16384"]
    assert run(eight, *options) == 0
    printed = capsys.readouterr().out
    assert f"--activation-checkpointing auto is {mode}; GiB a GPU: none " in printed
    assert "loading: 0.12 GiB of host memory a rank, " in printed and "computed, nothing was timed" in printed


@pytest.mark.parametrize(("gpu_memory", "replicas"), [(96.0, 2), (48.0, 1)])
def test_there_are_as_many_replicas_as_nodes_where_a_copy_fits_one(eight, monkeypatch, gpu_memory, replicas):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    asked = with_options(eight, gpu_memory=gpu_memory, tokens_per_micro_batch=32_768, activation_checkpointing="auto")
    assert fitted(asked, num_gpus=16).memory.replicas == replicas


def test_gradients_are_held_where_there_is_room_and_counted(eight):
    chosen = [fitted(with_options(eight, gpu_memory=size), num_gpus=8).memory for size in (192.0, 48.0)]
    assert [own.hold_gradients for own in chosen] == [True, False]
    more = bytes_of(with_options(eight, hold_gradients=True)).total - bytes_of(eight).total
    assert more == pytest.approx(4 * TRAINED)


def test_selective_checkpointing_keeps_less_of_adapters_than_a_step_without(eight):
    lora = with_options(eight, robust=False, llm_lora=True)
    kept, all_saved = (
        activations(with_options(lora, activation_checkpointing=mode), "main", 1024, 1)
        for mode in ("selective", "none")
    )
    assert kept < 0.8 * all_saved


def test_what_is_between_products_is_counted_by_each_operation_or_once():
    x, weight = (torch.zeros(4, 4, device="meta") for _ in range(2))
    with Traffic() as seen:
        ((x @ weight).sigmoid() * 2).mul_(3) @ weight
    assert (seen.eager, seen.fused) == (6 * x.nbytes, 2 * x.nbytes)


def test_a_micro_batch_takes_less_time_on_paper_the_less_is_done_twice(eight):
    decoders = {len(own.layers): own for own in (root.model.language_model for root in make_sized(eight)["main"])}
    rows = list(paper_rows(decoders, 8, 7_326))
    mfu = [float(row[-1].rstrip("%")) for row in rows]
    products, elements, moved = zip(*([int(row[part]) for part in (2, 4, 5)] for row in rows), strict=True)
    assert mfu == sorted(mfu) and products[0] == pytest.approx(products[1] * 4 / 3, abs=1.5)
    assert elements[0] > elements[1] > elements[2] and moved[0] == moved[2] > moved[3]
    a_layer = (LANGUAGE_MODEL - VOCABULARY * HIDDEN) / LAYERS
    assert products[1] == pytest.approx(6e3 * 7_326 * LAYERS * a_layer / (0.65 * 989e12), rel=0.01)


def test_a_training_without_a_gpu_recomputes_nothing_unless_it_is_told_to(eight):
    auto = with_options(eight, activation_checkpointing="auto")
    assert fitted(auto, num_gpus=1) == auto
    chosen = fitted(with_options(auto, gpu_memory=48.0), num_gpus=8)
    assert chosen.memory.activation_checkpointing == "full"
