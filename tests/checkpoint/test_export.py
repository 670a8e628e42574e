"""Checkpoints there and back: identical tensors, identical rewards, and what plain transformers makes of them."""

import json
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from original import LLM, original_config, random_state, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, InternVLForConditionalGeneration, InternVLModel

from mmrm_fast.checkpoint.export import convert_folder, export_original, export_vllm, summary
from mmrm_fast.checkpoint.folder import CheckpointFolder, rewrite_json, save_checkpoint
from mmrm_fast.checkpoint.tokenizer import named_template
from mmrm_fast.cli import main
from mmrm_fast.data.types import Message
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train.command import TINY_CHECKPOINT

RESPONSES = ["the red circle", "", "left of the blue image"]


def rewards(folder, pictures, **options):
    scorer = Scorer.from_pretrained(folder, device="cpu", dtype="float32", **options)
    return scorer.score([{"prompt": "What?", "img_path": pictures["photo"], "responses": RESPONSES}])


@pytest.mark.parametrize(("llm", "vision"), [*zip(LLM, cycle(["300M", "6B"]), strict=False)])
def test_original_to_native_to_original_gives_identical_tensors_and_rewards(tmp_path, pictures, llm, vision):
    first, native, second = (tmp_path / name for name in ("first", "native", "second"))
    state = write_checkpoint(first, original_config(llm, vision, 578))
    convert_folder(first, native)
    export_original(native, second)
    again = load_file(second / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(again[name].dtype == state[name].dtype and torch.equal(again[name], state[name]) for name in state)
    expected = rewards(first, pictures)
    assert rewards(native, pictures) == expected and rewards(second, pictures) == expected


def test_here_to_native_to_here_gives_identical_weights_and_rewards(tmp_path, pictures):
    write_checkpoint(tmp_path / "first", original_config("InternLM2", "6B", 578))
    loaded = CheckpointFolder(tmp_path / "first").load()
    save_checkpoint(tmp_path / "final", loaded)
    state, again = loaded.model.state_dict(), CheckpointFolder(tmp_path / "final").load().model.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert rewards(tmp_path / "final", pictures) == rewards(tmp_path / "first", pictures)


def test_large_weights_are_written_in_shards_and_read_back(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("mmrm_fast.checkpoint.tensors.SHARD_BYTES", 50_000)
    write_checkpoint(tmp_path / "first", original_config("Llama", "300M", 578))
    convert_folder(tmp_path / "first", tmp_path / "native")
    index = json.loads((tmp_path / "native" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and not (tmp_path / "native" / "model.safetensors").exists()
    assert rewards(tmp_path / "native", pictures) == rewards(tmp_path / "first", pictures)


@pytest.mark.parametrize("llm", ["Qwen2", "Qwen3Moe", "GptOss"])
def test_a_saved_model_runs_in_plain_transformers(tmp_path, pictures, llm):
    write_checkpoint(tmp_path / "first", original_config(llm, "300M", 578))
    checkpoint = CheckpointFolder(tmp_path / "first").load()
    checkpoint.model.model.config.dtype = torch.bfloat16  # as its folder had it; these weights are fp32
    save_checkpoint(tmp_path / "final", checkpoint)
    model, loading = InternVLModel.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not loading["missing_keys"] and loading["unexpected_keys"] == {"score.weight"}
    score = load_file(tmp_path / "final" / "model.safetensors")["score.weight"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "the red circle"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    hidden = model(input_ids=ids).last_hidden_state[0, -1]
    scorer = Scorer.from_pretrained(tmp_path / "final", device="cpu")
    ((expected,),) = scorer.score([{"prompt": "What?", "responses": ["the red circle"]}])
    assert float((hidden @ score[0].float()).detach()) == pytest.approx(expected, abs=1e-5)
    assert model.config.num_labels == model.config.text_config.num_labels == 1
    assert model.config.problem_type == "regression"


CONVERSATIONS = [  # each ends with the response
    ["What?", "the red circle"],
    ["What?", ""],
    ["What?", "left", "And?", "of the blue image"],
]


def turns(texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("template", ["internvl2_5", "phi3-chat", "internlm2-chat", "Hermes-2", "internvl_zh"])
@pytest.mark.parametrize("reward_token", ["end", "last"])
def test_what_the_vllm_folder_renders_ends_in_the_token_that_is_read(tmp_path, template, reward_token):
    checkpoint = CheckpointFolder(TINY_CHECKPOINT).load()
    text = named_template(template)
    for end in ("<|end|>", "</s>"):  # of other vocabularies than the tiny one's
        text = text.replace(end, "<|im_end|>")
    checkpoint.tokenizer.chat_template = text
    save_checkpoint(tmp_path / "final", replace(checkpoint, reward_token=reward_token))
    export_vllm(tmp_path / "final", tmp_path / "vllm")
    encoder = CheckpointFolder(tmp_path / "vllm").load(with_weights=False).prompt_encoder()
    exported, own = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("vllm", "final"))
    for conversation in CONVERSATIONS:
        prompt = tuple(Message(turn["role"], turn["content"]) for turn in turns(conversation[:-1]))
        (keys,) = encoder.encode(prompt, (conversation[-1],)).sequences
        ids = exported.apply_chat_template(turns(conversation), return_dict=True)["input_ids"]
        assert keys.tolist() == ids
        asked = {"conversation": turns(conversation[:-1]), "tokenize": False, "add_generation_prompt": True}
        assert exported.apply_chat_template(**asked) == own.apply_chat_template(**asked)


def test_a_sequence_classifier_of_another_program_is_read_at_the_last_token(tmp_path):
    checkpoint = CheckpointFolder(TINY_CHECKPOINT).load()
    checkpoint.tokenizer.chat_template = named_template("internvl2_5")
    save_checkpoint(tmp_path / "final", checkpoint)
    asked = {"prompt": "What?", "responses": ["the red circle", "left " * 300]}
    read_at_end = Scorer.from_pretrained(tmp_path / "final", device="cpu", max_length=240).score([asked])
    marks = {"architectures": ["InternVLForSequenceClassification"], "reward_token": "end"}
    rewrite_json(tmp_path / "final" / "config.json", marks)
    assert Scorer.from_pretrained(tmp_path / "final", device="cpu", max_length=240).score([asked]) == read_at_end
    settings = json.loads((tmp_path / "final" / "config.json").read_text())
    del settings[
        "reward_token"
    ]  # as ms-swift leaves a folder of ours, which says it only where it is not the usual one
    (tmp_path / "final" / "config.json").write_text(json.dumps(settings))
    folder = CheckpointFolder(tmp_path / "final")
    newline = folder.tokenizer.encode("\n", add_special_tokens=False)
    encoded = folder.load(max_length=240).prompt_encoder().encode("What?", ("the red circle", "left " * 300))
    end = folder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [keys[-2:].tolist() for keys in encoded.sequences] == [[end, *newline]] * 2
    assert encoded.truncated == (False, True) and len(encoded.sequences[1]) == 240
    assert Scorer.from_pretrained(tmp_path / "final", device="cpu", max_length=240).score([asked]) != read_at_end
    assert summary(tmp_path / "final")["reward model"] == "yes, read at the last token of the chat template"


def test_an_unknown_place_of_the_reward_is_refused(tmp_path):
    save_checkpoint(tmp_path / "final", CheckpointFolder(TINY_CHECKPOINT).load())
    rewrite_json(tmp_path / "final" / "config.json", {"reward_token": "mean"})
    with pytest.raises(ValueError, match=r"final/config.json: reward_token is 'mean'; expected end or last"):
        CheckpointFolder(tmp_path / "final").load()


def test_a_saved_folder_names_what_transformers_processor_asks_for(tmp_path):
    save_checkpoint(tmp_path / "final", CheckpointFolder(TINY_CHECKPOINT).load())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    names = ("start_image_token", "context_image_token", "end_image_token", "video_token")
    assert [getattr(tokenizer, name) for name in names] == ["<img>", "<IMG_CONTEXT>", "</img>", "<|endoftext|>"]
    assert json.loads((tmp_path / "final" / "processor_config.json").read_text()) == {
        "processor_class": "InternVLProcessor", "image_seq_length": 4,
    }  # fmt: skip


@pytest.mark.parametrize("llm", ["Qwen2", "Qwen3Moe", "GptOss"])
def test_the_vllm_layout_has_one_bias_free_score_under_the_names_of_the_whole_model(tmp_path, llm):
    write_checkpoint(tmp_path / "first", original_config(llm, "300M", 578))
    export_vllm(tmp_path / "first", tmp_path / "vllm")
    names = load_file(tmp_path / "vllm" / "model.safetensors").keys()
    assert {name.split(".")[1] for name in names if name.startswith("model.")} == {
        "vision_tower", "multi_modal_projector", "language_model",
    }  # fmt: skip
    assert [name for name in names if not name.startswith("model.")] == ["language_model.score.weight"]
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["architectures"] == ["InternVLForSequenceClassification"]
    for part in (config, config["text_config"]):
        assert part["problem_type"] == "regression" and len(part["id2label"]) == 1
    expert = "model.language_model.layers.0.mlp.experts.7.gate_proj.weight"
    assert (expert in names) == (llm == "Qwen3Moe")
    CheckpointFolder(tmp_path / "vllm").load()
    _, loading = InternVLForConditionalGeneration.from_pretrained(tmp_path / "vllm", output_loading_info=True)
    assert loading["missing_keys"] <= {"lm_head.weight"}
    assert [name.rpartition("language_model.")[2] for name in loading["unexpected_keys"]] == ["score.weight"]


def test_an_exported_tokenizer_adds_the_bos_token_and_reads_in_transformers_4(tmp_path):
    write_checkpoint(tmp_path / "first", original_config("InternLM2", "300M", 569))
    export_original(tmp_path / "first", tmp_path / "second")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert tokenizer("the red").input_ids == [1, *tokenizer.encode("the red", add_special_tokens=False)]
    fields = json.loads((tmp_path / "second" / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in fields["model"]["merges"])


def peft_state(config, scale):
    """A checkpoint whose `wqkv` and `qkv` carry adapters under peft's names, and the same with them merged."""
    plain, generator = random_state(config), torch.Generator().manual_seed(1)
    wrapped, merged = {}, dict(plain)
    for name, value in plain.items():
        part, _, rest = name.partition(".")
        if part not in ("language_model", "vision_model"):
            wrapped[name] = value
            continue
        name_in_peft = f"{part}.base_model.model.{rest}"
        if not rest.endswith(("wqkv.weight", "attn.qkv.weight")):
            wrapped[name_in_peft] = value
            continue
        stem = name_in_peft.removesuffix("weight")
        a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((4, value.shape[1]), (len(value), 4)))
        wrapped |= {
            f"{stem}base_layer.weight": value,
            f"{stem}lora_A.default.weight": a,
            f"{stem}lora_B.default.weight": b,
        }
        merged[name] = value.float() + scale * b @ a
    return wrapped, merged


@pytest.mark.parametrize(
    ("facts", "scale"), [({"use_llm_lora": 4, "use_backbone_lora": 4}, 2.0), ({"lora_r": 4, "lora_alpha": 16}, 4.0)]
)
def test_adapters_are_merged_when_loaded(tmp_path, pictures, facts, scale):
    config = original_config("InternLM2", "300M", 578, **facts)
    wrapped, merged = peft_state(config, scale)
    names = tuple(random_state(config))
    write_checkpoint(tmp_path / "wrapped", config, drop=names, extra=wrapped)
    write_checkpoint(tmp_path / "merged", config, drop=names, extra=merged)
    (expected,) = rewards(tmp_path / "merged", pictures)
    assert rewards(tmp_path / "wrapped", pictures)[0] == pytest.approx(expected, abs=1e-5)
    assert summary(tmp_path / "wrapped")["adapters"] == "LoRA on 5 weights, merged when loaded"


def test_the_proxy_of_the_reference_is_left_out_for_scoring_and_converted_beside_the_model(tmp_path, pictures):
    config = original_config("InternLM2", "300M", 578)
    proxy = {"bias_reward_model." + name: -value for name, value in random_state(config).items()}
    write_checkpoint(tmp_path / "both", config, extra=proxy)
    write_checkpoint(tmp_path / "alone", config)
    convert_folder(tmp_path / "both", tmp_path / "native")
    assert rewards(tmp_path / "both", pictures) == rewards(tmp_path / "alone", pictures)
    converted = load_file(tmp_path / "native" / "proxy" / "model.safetensors")
    assert torch.equal(converted["score.weight"], proxy["bias_reward_model.score.weight"])
    assert summary(tmp_path / "both")["text-only proxy"] == "in this folder"
    assert summary(tmp_path / "native")["text-only proxy"] == f"in {tmp_path / 'native' / 'proxy'}"
    again = CheckpointFolder(tmp_path / "both", proxy=True).load().model.score.weight
    assert torch.equal(again, proxy["bias_reward_model.score.weight"].float())


def test_the_commands_convert_export_and_inspect(tmp_path, capsys):
    write_checkpoint(tmp_path / "first", original_config("Phi3 su", "6B", 578))
    assert main(["convert", str(tmp_path / "first"), str(tmp_path / "native")]) == 0
    assert "difference 0.0e+00" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "native"), str(tmp_path / "second"), "--format", "original"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "second")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "original internvl_chat",
        "3 layers of 24, rms_norm",
        "RoPE longrope",
        "phi3-chat",
        "4 tokens a tile",
    ):
        assert words in shown
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


SWIFT, VLLM = (json.loads(Path(__file__).with_name(f"{name}.json").read_text()) for name in ("swift", "vllm"))


def tiny_with_head():
    """The model that other programs were run with."""
    tiny = CheckpointFolder(TINY_CHECKPOINT).load()
    with torch.no_grad():
        tiny.model.score.weight.copy_(torch.linspace(-2, 2, tiny.model.score.weight.numel())[None])
    return tiny


@pytest.fixture(scope="module")
def vllm_scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    save_checkpoint(folder / "final", tiny_with_head())
    export_vllm(folder / "final", folder / "out")
    return Scorer.from_pretrained(folder / "out", "cpu")


@pytest.mark.parametrize("record", VLLM.values(), ids=VLLM)
def test_the_vllm_folder_gives_the_rewards_that_vllm_gave_of_it(vllm_scorer, record):
    """vLLM 0.32 was asked by `scripts/peers/check_vllm.py --record`."""
    record = dict(record)
    assert record.pop("rewards") == pytest.approx(vllm_scorer.score([record])[0], abs=1e-4)


@pytest.fixture(scope="module")
def swift_scorer(tmp_path_factory):
    """A scorer of the folder that ms-swift 4.6 saved, as `scripts/peers/check_swift.py --record` wrote it down."""
    folder, tiny = tmp_path_factory.mktemp("swift"), tiny_with_head()
    state = {name.removeprefix("model."): value for name, value in tiny.model.state_dict().items()}
    tiny.tokenizer.save_pretrained(folder)
    save_file({name: state[name.removeprefix("model.")] for name in SWIFT["names"]}, folder / "model.safetensors")
    for name, content in SWIFT["files"].items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(SWIFT["chat_template"])
    return Scorer.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("case", SWIFT["cases"].values(), ids=SWIFT["cases"])
def test_a_folder_that_ms_swift_saved_gives_the_rewards_that_ms_swift_gives(swift_scorer, case):
    record = {"prompt": case["prompt"], "responses": [case["response"]], "images": case.get("images", [])}
    assert swift_scorer.score([record])[0][0] == pytest.approx(case["reward"], abs=1e-4)
