"""Every way to train is the same on one rank, two and four, and with every way to spend memory."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from ranks import run_in_turn, run_ranks
from runs import losses, margins, mixed_records, read
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint
from mmrm_fast.config import OptimizerConfig
from mmrm_fast.model.lora import TwoAdapterModel
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train.command import train
from mmrm_fast.train.proxy import make_branches, parse_proxy
from mmrm_fast.train.sharding import ranks
from mmrm_fast.train.step import lr_factor, make_optimizer

LORA = {"llm_lora": True, "lora_r": 4, "lora_alpha": 8.0, "lr": 5e-3}
WAYS = {
    "standard": {},
    "robust": {"robust": True},
    "lora": {**LORA, "vision_lora": True},
    "proxy lora": {**LORA, "robust": True, "proxy_model": "lora"},
    "proxy lora, white": {**LORA, "robust": True, "proxy_model": "lora", "proxy_image": "white"},
    "proxy white": {"robust": True, "proxy_image": "white"},
    "proxy white, all trained": {"robust": True, "proxy_image": "white", "freeze_backbone": False},
    "proxy path": {"robust": True, "proxy_model": "small"},
    "proxy file": {"robust": True, "proxy_model": "margins.jsonl"},
    "experts": {"robust": True, "model": "experts"},
    "experts, lora": {**LORA, "model": "experts", "robust": True, "proxy_model": "lora"},
}


@pytest.fixture
def make_way(make_config, make_checkpoint, tmp_path):
    """A TrainConfig of one of `WAYS`, with what it names in place."""
    save_checkpoint(tmp_path / "small", make_checkpoint(text="llama", max_length=256))
    save_checkpoint(tmp_path / "experts", make_checkpoint(text="qwen3_moe", max_length=256))
    rows = [
        {"record": record, "chosen": chosen, "rejected": rejected, "proxy_margin": (record - 5) / 4 + chosen - rejected}
        for record in range(11)
        for chosen, rejected in [(0, 1), (0, 3), (1, 3)]
    ]
    (tmp_path / "margins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name, way, **options):
        options = {"report_to": (), "max_steps": 2, **WAYS[way], **options}
        if "model" in options:
            options["model"] = tmp_path / options["model"]
        if options.get("proxy_model", "full") not in ("full", "lora"):
            options["proxy_model"] = str(tmp_path / options["proxy_model"])
        return make_config(name, **options)

    return make


WORLDS = {  # on two, test_trainer.py has "robust", `MEMORY` "proxy lora", test_text_layouts.py trained experts
    2: ("standard", "lora", "proxy white", "proxy path", "proxy file", "experts, lora"),
    4: ("proxy lora, white", "proxy white, all trained", "experts"),
}


@pytest.mark.parametrize("world", WORLDS)
def test_two_and_four_ranks_equal_one(make_way, subtests, world):
    """Every way on one of both; adapters, a proxy of its own, white pictures and experts on both."""
    one = {way: train(make_way(f"one, {way}", way)) for way in WORLDS[world]}
    configs = {way: make_way(f"{world}, {way}", way) for way in one}
    assert run_in_turn([partial(train, config) for config in configs.values()], world=world) == [0] * world
    for way, config in configs.items():
        with subtests.test(way):
            alone, shared = one[way], config.run.output_dir
            assert len(losses(alone)) == 2 and losses(alone)[0] != losses(alone)[1]
            assert losses(shared) == pytest.approx(losses(alone), abs=1e-4)
            assert margins(shared) == pytest.approx(margins(alone), abs=1e-3)


MEMORY = {
    "full checkpointing of weights gathered again, gradients held": {
        "activation_checkpointing": "full",
        "hold_gradients": True,
    },
    "selective checkpointing, the same bits again, weights kept": {
        "activation_checkpointing": "selective",
        "deterministic": True,
        "reshard_after_forward": False,
    },
    "replicas": {"replicas": 2},
}


def test_selective_checkpointing_keeps_the_products_of_experts_and_changes_nothing(make_way):
    plain = train(make_way("plain", "experts"))
    kept = train(make_way("kept", "experts", activation_checkpointing="selective"))
    assert losses(kept) == losses(plain)


def test_memory_options_do_not_change_two_adapters_on_one_model(make_way, subtests):
    """The hardest case: a layer that recomputes with the other branch's adapter gives wrong gradients silently."""
    plain = losses(train(make_way("plain", "proxy lora")))
    configs = {option: make_way(option, "proxy lora", **MEMORY[option]) for option in MEMORY}
    assert run_in_turn([partial(train, config) for config in configs.values()], world=2) == [0, 0]
    for option, config in configs.items():
        with subtests.test(option):
            assert losses(config.run.output_dir) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("way", ["experts", "experts, lora"])
def test_routers_are_balanced_in_both_branches_whatever_memory_is_spent(make_way, way):
    """By factor: the loss that is trained has it, and what is logged is the mean of what the micro-batches have."""
    free = train(make_way("free", way))
    plain, full = make_way("plain", way, router_aux_loss=0.1), make_way("full", way, router_aux_loss=0.1)
    plain = train(plain)
    assert run_ranks(train, replace(full, memory=replace(full.memory, activation_checkpointing="full"))) == [0, 0]
    first, free_first = (read(folder / "metrics.jsonl")[0] for folder in (plain, free))
    assert 3.0 <= first["router_loss"] < 8.0 and "router_loss" not in free_first
    assert first["loss_main"] == pytest.approx(free_first["loss_main"] + 0.1 * first["router_loss"], abs=1e-5)
    assert first["proxy_grad_norm"] != free_first["proxy_grad_norm"]
    assert losses(full.run.output_dir) == pytest.approx(losses(plain), abs=0.02)  # other micro-batches


@pytest.mark.parametrize(
    ("way", "options", "message"),
    [
        ("standard", {}, r"--router-aux-loss: .*model has no experts"),
        ("experts", {"compile": True}, "--router-aux-loss with --compile"),
    ],
)
def test_a_router_loss_that_cannot_be_is_refused_by_name(make_way, way, options, message):
    config = make_way("run", way, router_aux_loss=0.1, **options)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not config.run.output_dir.exists()


def test_replicas_that_are_shards_themselves_equal_one_rank(make_way):
    one, rows = train(make_way("one", "robust")), make_way("rows", "robust", replicas=2, hold_gradients=True)
    assert run_ranks(train, rows, world=4) == [0, 0, 0, 0]
    assert losses(rows.run.output_dir) == pytest.approx(losses(one), abs=1e-4)
    assert margins(rows.run.output_dir) == pytest.approx(margins(one), abs=1e-3)


def test_bfloat16_trains_float32_weights_and_stays_close(make_way):
    exact, rough = (train(make_way(dtype, "robust", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert losses(rough) == pytest.approx(losses(exact), abs=0.05)
    weights = Scorer.from_pretrained(rough / "final", device="cpu").model.state_dict()
    trained = weights["model.language_model.layers.0.mlp.up_proj.weight"]
    assert trained.dtype == torch.float32 and not torch.equal(trained, trained.bfloat16().float())


@pytest.mark.parametrize("way", ["lora", "proxy lora", "experts", "experts, lora"])
def test_final_is_a_plain_checkpoint_with_its_adapter_merged(make_way, pictures, way):
    folder = train(make_way("run", way))
    records = [
        {"prompt": r["prompt"], "img_path": r["img_path"], "responses": [r["chosen"], r["rejected"]]}
        for r in mixed_records(pictures)[:3]
    ]
    rewards = Scorer.from_pretrained(folder / "final", device="cpu").score(records)
    assert [chosen - rejected for chosen, rejected in rewards] == pytest.approx(margins(folder), abs=1e-5)


def test_two_adapters_hold_one_copy_of_the_weights_and_train_apart(make_way):
    with ranks() as device:
        main, proxy = make_branches(parse_proxy(make_way("run", "proxy lora")), device)
    assert isinstance(main.root, TwoAdapterModel) and main.root is proxy.root
    main_names, proxy_names = set(main.trained()), set(proxy.trained())
    assert not main_names & proxy_names
    assert {name.replace(".proxy.", ".main.").replace("proxy_score", "score") for name in proxy_names} == {
        name for name in main_names if "projector" not in name
    }
    frozen = [name for name, p in main.root.named_parameters() if not p.requires_grad and "language_model" in name]
    assert len(frozen) == 2 * 12 + 2


def test_the_white_tile_passes_a_frozen_vision_tower_once(make_way):
    with ranks() as device:
        _, proxy = make_branches(parse_proxy(make_way("run", "proxy white")), device)
    assert proxy.root.model.vision_tower is None and proxy.root.only_tiles.shape[0] == 1


def fill_sharded(config):
    """Make a run's branches, in which only shards are ever filled."""
    fill = CheckpointFolder.fill

    def filled(folder, model, device):
        assert all(hasattr(parameter, "placements") and parameter.is_meta for parameter in model.parameters())
        fill(folder, model, device)

    CheckpointFolder.fill = filled
    with ranks() as device:
        make_branches(parse_proxy(config), device)


@pytest.mark.parametrize("way", ["lora", "proxy lora, white", "proxy white", "proxy white, all trained"])
def test_no_rank_ever_holds_a_whole_model(make_way, way):
    assert run_ranks(fill_sharded, make_way("run", way)) == [0, 0]


def test_a_file_of_margins_is_what_an_evaluation_of_the_training_file_wrote(make_way, make_config):
    first = make_way("first", "robust", max_steps=None)
    robust = train(make_way("first", "robust", max_steps=None, eval=(f"train={first.records.data[0]}",)))
    folder = train(make_config("second", robust=True, proxy_model=str(robust / "eval-train.jsonl")))
    assert all(0 < row["sfc_mean"] < 1 for row in read(folder / "metrics.jsonl"))
    assert not (folder / "proxy").exists()


def test_the_proxy_of_a_run_is_a_proxy_for_another(make_way):
    proxy = train(make_way("first", "robust")) / "proxy"
    assert len(losses(train(make_way("second", "robust", proxy_model=str(proxy))))) == 2


@pytest.mark.parametrize("other", ["a token more", "the same tokens in another order"])
def test_a_proxy_with_another_tokenizer_is_refused_by_name_before_anything_is_written(
    make_way, make_checkpoint, tmp_path, other
):
    checkpoint = make_checkpoint()
    fields = json.loads(checkpoint.tokenizer.backend_tokenizer.to_str())
    vocab = fields["model"]["vocab"]
    vocab |= {"more": len(vocab)} if other == "a token more" else {"a": vocab["b"], "b": vocab["a"]}
    backend = Tokenizer.from_str(json.dumps(fields))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=checkpoint.tokenizer.chat_template)
    save_checkpoint(tmp_path / "other", replace(checkpoint, tokenizer=tokenizer))
    config = make_way("run", "robust", proxy_model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"--proxy-model .*other: its tokenizer is not that of .*model"):
        train(config)
    assert not config.run.output_dir.exists()


def test_a_margin_that_is_missing_is_named(make_config, tmp_path):
    path = tmp_path / "margins.jsonl"
    path.write_text('{"record": 0, "chosen": 0, "rejected": 1, "proxy_margin": 0.5}\n')
    with pytest.raises(ValueError, match=r"margins\.jsonl: no margin for record \d+, responses"):
        train(make_config("run", robust=True, proxy_model=str(path)))
    path.write_text('{"record": 0, "chosen": 0}\n')
    with pytest.raises(ValueError, match=r"margins\.jsonl:1: .*rejected"):
        train(make_config("run", robust=True, proxy_model=str(path)))


def poison(steps):
    """A callback that lets rewards not be numbers in these steps."""
    kept = []

    def on_event(event, trainer):
        weight = trainer.branches[0].root.score.weight.detach()
        if event == "micro-batch" and trainer.state.step in steps:
            kept[:] = kept or [weight.clone()]
            weight.fill_(torch.nan)
        if event == "step" and kept:
            weight.copy_(kept.pop())

    return on_event


def test_a_step_that_is_not_finite_is_skipped_and_counted(make_way, capsys):
    folder = train(make_way("run", "robust", max_steps=3), poison({1}))
    assert [row["bad_steps"] for row in read(folder / "metrics.jsonl")] == [0, 1, 0]
    assert losses(folder)[1] is None and losses(folder)[2] is not None
    assert "1 steps skipped" in capsys.readouterr().out


def test_too_many_such_steps_in_a_row_stop_the_run_and_name_their_records(make_way):
    config = make_way("run", "robust", max_bad_steps=2, max_steps=None)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .*train\.jsonl:\d+"):
        train(config, poison({1, 2, 3}))


def test_clipping_by_branch_keeps_the_proxy_out_of_the_models_norm(make_way):
    options = {"max_grad_norm": 1e-3}
    branch, joint = (train(make_way(clip, "robust", clip=clip, **options)) for clip in ("branch", "joint"))
    assert losses(branch)[0] == losses(joint)[0] and losses(branch)[1] != losses(joint)[1]


def test_the_best_weights_by_a_figure_are_kept(make_way):
    folder = train(make_way("run", "standard", eval_every=1, best="small.accuracy"))
    assert (folder / "best" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"--best nothing\.accuracy: expected SET\.FIGURE"):
        train(make_way("wrong", "standard", eval_every=1, best="nothing.accuracy"))


def test_metrics_say_what_people_look_at(make_way):
    folder = train(make_way("run", "robust", report_to=("tensorboard",)))
    row = read(folder / "metrics.jsonl")[0]
    assert sum(row["sfc_histogram"]) == row["pairs"] and row["sfc_p10"] <= row["sfc_p50"] <= row["sfc_p90"]
    wanted = {"loss_main", "loss_proxy", "accuracy", "proxy_accuracy", "margin", "margin_std", "grad_norm", "lr"}
    wanted |= {"proxy_grad_norm", "sharing", "tokens_per_second", "flops_per_second", "peak_memory_bytes"}
    assert wanted | {"data_wait_seconds"} <= set(row)
    assert list((folder / "tensorboard").iterdir())
    stats = json.loads((folder / "final" / "reward_stats.json").read_text())
    assert stats["responses"] == 8 and stats["sets"]["one"]["responses"] == 2 and stats["std"] > 0


def test_biases_of_experts_do_not_decay_as_others_do_not(make_checkpoint):
    named = dict(make_checkpoint(text="gpt_oss").model.named_parameters())
    groups = make_optimizer(list(named.items()), OptimizerConfig(lr=1e-3)).param_groups
    decayed, kept = ([name for name, p in named.items() if any(p is q for q in own["params"])] for own in groups)
    assert [own["weight_decay"] for own in groups] == [0.05, 0.0] and len(decayed) + len(kept) == len(named)
    assert not [name for name in decayed if "norm" in name or name.endswith("bias")]
    assert {"model.language_model.layers.0.mlp.experts." + name for name in ("gate_up_proj_bias", "down_proj_bias")} < {
        *kept
    }


def test_learning_rate_schedules():
    assert [lr_factor(share, 0.1, "linear") for share in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
    assert [lr_factor(share, 0.1, "constant") for share in (0.05, 0.1, 1.0)] == pytest.approx([0.5, 1, 1])


@pytest.mark.parametrize(
    ("text", "checkpointing", "robust"),
    [("qwen2", "full", True), ("qwen3_moe", "full", False), ("gpt_oss", "none", False)],
)
def test_a_compiled_block_is_one_graph_and_trains_alike(
    make_way, make_checkpoint, tmp_path, monkeypatch, text, checkpointing, robust
):
    save_checkpoint(tmp_path / text, make_checkpoint(text=text, max_length=256))
    options = {"robust": robust, "model": text, "max_steps": 2}
    options |= {} if robust else {"eval": ()}  # one evaluates what is compiled, too
    plain = train(make_way("plain", "standard", **options))
    torch.compiler.reset()  # what other models compiled of the code that all share
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    folder = train(make_way("compiled", "standard", **options, compile=True, activation_checkpointing=checkpointing))
    assert losses(folder) == pytest.approx(losses(plain), abs=1e-6)
