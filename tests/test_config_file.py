"""Options from files: flags win, what is not known is refused by name; the reference's keys keep their meaning."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from mmrm_fast.cli import main
from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import KEYS, options, parse, read_config, translate

FILES, METHODS = Path(__file__).parent / "reference", ("robust", "standard")


@dataclass(frozen=True)
class Options:
    """What a command takes."""

    config: str | None = None
    """File."""
    lr: float | None = None
    """Rate."""
    steps: int = 3
    """Steps."""
    robust: bool = False
    """Method."""
    folder: Path | None = None
    """Place."""
    mode: Literal["paper", "reference"] = "paper"
    """Weighting."""
    data: tuple[str, ...] = ()
    """Files."""
    workers: Literal["auto"] | int = "auto"
    """Processes."""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "options.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_file_gives_every_kind_of_value(write):
    name = write("lr: 1e-5\nsteps: 7\nrobust: true\nfolder: runs/a\nmode: reference\ndata: [a, b]\nworkers: 2\n")
    assert read_config(name, Options) == Options(name, 1e-5, 7, True, Path("runs/a"), "reference", ("a", "b"), 2)
    assert read_config(write("workers: auto"), Options).workers == "auto"


def test_one_value_is_a_list_of_one_and_null_is_the_default(write):
    assert read_config(write("data: a\nlr: null\n"), Options).data == ("a",)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(write):
    name = write("lr: 1e-5\nrobust: true\ndata: [a, b]\n")
    config = parse(Options, ["--config", name, "--lr", "1e-3", "--no-robust", "--data", "c"], prog="test")
    assert (config.lr, config.robust, config.data, config.steps) == (1e-3, False, ("c",), 3)
    assert parse(Options, [f"--config={name}"], prog="test").robust
    assert parse(Options, [], prog="test") == Options()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("step: 7", "unknown key `step`; did you mean `steps`?"),
        ("steps: many", "--steps: invalid literal for int() with base 10: 'many'"),
        ("steps: true", "--steps: invalid literal for int() with base 10: 'True'"),
        ("steps: 1.5", "--steps: invalid literal for int() with base 10: '1.5'"),
        ("robust: 1", "invalid choice '1' for argument '--robust'"),
        ("lr: [1, 2]", "Error parsing --lr"),
        ("lr: []", "Error parsing --lr"),
        ("lr: {a: 1}", "could not convert string to float: \"{'a': 1}\""),
        ("mode: papr", "invalid choice 'papr' for argument '--mode'. Expected one of ('paper', 'reference')"),
        ("workers: some", "invalid literal for int() with base 10: 'some'"),
        ("- a", "expected keys and values, got list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(write, text, reason):
    name = write(text)
    with pytest.raises(ValueError) as caught:
        read_config(name, Options)
    said = " ".join(str(caught.value).replace("│", "").split())
    assert said.startswith(f"{name}: ") and reason in said


def test_a_reference_file_s_batch_is_of_the_gpus_that_are_planned_for(write):
    name = write("model_name_or_path: m\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\n")
    for flag in (["--num-gpus", "16"], ["--num_gpus=16"]):
        assert parse(TrainConfig, ["--config", name, *flag], prog="test").batch.pairs_per_step == 16 * 4 * 2


def test_no_such_file_names_the_presets(capsys):
    assert main(["train", "--config", "internvl9"]) == 2
    assert "paper" in capsys.readouterr().err


def test_a_saved_config_is_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"lr": 1e-4, "data": ["a"], "max_steps": None}))
    assert read_config(str(tmp_path / "config.json"), TrainConfig).optimizer.lr == 1e-4


def test_the_preset_is_the_published_hyperparameters_with_either_method(tmp_path):
    for method in ("--robust", "--no-robust"):
        config = parse(TrainConfig, ["--config", "paper", "--model", "m", method], prog="test")
        assert (config.weights.model, config.proxy.robust) == (Path("m"), method == "--robust")
        assert (config.optimizer.lr, config.optimizer.beta2, config.batch.pairs_per_step) == (1e-5, 0.98, 128)


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


def test_the_published_files_are_configs(capsys):
    robust, standard = (options(read_config(str(FILES / f"train_{m}_8B.yaml"), TrainConfig)) for m in METHODS)
    assert "bf16: bfloat16 is the default with a GPU" in capsys.readouterr().out
    published = {"lr": 1e-5, "data": ("data/train.jsonl",), "report_to": ("tensorboard",), "keep": 10, "max_tiles": 6}
    assert published.items() <= robust.items()
    differs = {name for name in robust if robust[name] != standard[name]}
    assert differs == {"config", "robust", "proxy_image"}


def test_the_standard_file_differs_in_the_proxy_alone():
    robust, standard = (translate(load(f"train_{m}_8B.yaml"), num_ranks=1)[0] for m in METHODS)
    assert {**standard, "robust": True, "proxy_image": "white"} == robust


@pytest.mark.parametrize("name", ["train_robust_8B.yaml", "train_standard_8B.yaml"])
def test_no_key_of_the_published_files_is_unknown(name):
    options = load(name)
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
