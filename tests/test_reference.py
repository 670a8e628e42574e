"""YAML files of the reference implementation: every key keeps its meaning or is named."""

from pathlib import Path

import pytest
import yaml

from mmrm_fast.reference import KEYS, is_reference, translate

FILES = Path(__file__).parent / "reference"


def load(name):
    return yaml.safe_load((FILES / name).read_text())


def test_the_published_robust_file_means_the_same_here():
    ours, notes = translate(load("train_robust_8B.yaml"), num_ranks=16)
    assert ours == {
        "model": "OpenGVLab/InternVL2-8B",
        "data": "data/train.jsonl",
        "output_dir": None,
        "robust": True,
        "proxy_image": "white",
        "freeze_llm": False,
        "freeze_backbone": True,
        "freeze_mlp": False,
        "activation_checkpointing": "full",
        "max_tiles": 6,
        "thumbnail": True,
        "max_length": 4096,
        "epochs": 1,
        "pairs": "expand",
        "pairs_per_step": 128,
        "lr": "1e-5",
        "weight_decay": 0.05,
        "beta2": 0.98,
        "warmup_ratio": 0.1,
        "lr_schedule": "cosine",
        "save_every": 100,
        "keep": 10,
        "report_to": "tensorboard",
        "lora_dropout": 0.05,
    }
    assert set(notes) == {
        "deepspeed", "conv_style", "drop_path_rate", "per_device_eval_batch_size", "save_strategy", "logging_steps",
        "logging_first_step", "bf16", "tf32", "remove_unused_columns",
    }  # fmt: skip


def test_the_standard_file_differs_in_the_proxy_alone():
    robust, standard = (translate(load(f"train_{m}_8B.yaml"), num_ranks=1)[0] for m in ("robust", "standard"))
    assert {**standard, "robust": True, "proxy_image": "white"} == robust


@pytest.mark.parametrize("name", ["train_robust_8B.yaml", "train_standard_8B.yaml"])
def test_no_key_of_the_published_files_is_unknown(name):
    options = load(name)
    assert is_reference(options)
    assert set(options) <= KEYS | {
        "output_dir", "freeze_llm", "freeze_backbone", "freeze_mlp", "weight_decay", "warmup_ratio", "max_length",
    }  # fmt: skip


def test_what_a_file_does_not_say_is_the_references_default_not_ours():
    ours, _ = translate({"model_name_or_path": "m"}, num_ranks=2)
    assert (ours["freeze_backbone"], ours["lr"], ours["epochs"], ours["beta2"]) == (False, 5e-5, 3.0, 0.999)
    assert (ours["max_tiles"], ours["max_length"], ours["pairs_per_step"]) == (1, 8192, 16)
    assert ours["lr_schedule"] == "linear" and "robust" not in ours


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bias_model_path": "small"}, {"robust": True, "proxy_image": "white", "proxy_model": "small"}),
        ({"use_text_only": True}, {"inputs": "text"}),
        ({"use_image_only": True}, {"inputs": "image"}),
        ({"use_llm_lora": True, "use_backbone_lora": True}, {"llm_lora": True, "vision_lora": True}),
        ({"lora_r": 8, "lora_alpha": 4}, {"lora_r": 8, "lora_alpha": 4}),
        ({"report_to": "none"}, {"report_to": []}),
        ({"max_steps": 5}, {"max_steps": 5}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {"lr_schedule": "constant"}),
    ],
)
def test_other_options_keep_their_meaning(options, expected):
    ours, _ = translate({"model_name_or_path": "m", **options}, num_ranks=1)
    assert expected.items() <= ours.items()


def test_options_for_pictures_are_kept():
    options = {"dynamic_image_size": True, "min_dynamic_patch": 2, "pad2square": True, "normalize_type": "clip"}
    ours, _ = translate(options, num_ranks=1)
    wanted = {"min_tiles": 2, "max_tiles": 12, "thumbnail": False, "pad2square": True, "normalize_type": "clip"}
    assert wanted.items() <= ours.items()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop_path_rate": 0.1, "freeze_backbone": False}, "drop_path_rate"),
        ({"ps_version": "v1"}, "ps_version: 'v1' is not supported"),
        ({"fp16": True}, "bfloat16"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        translate(options, num_ranks=1)
