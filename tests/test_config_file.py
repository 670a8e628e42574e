"""Options from files: flags win, what is not known is refused by name, presets and the reference's files are read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mmrm_fast.cli import main
from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import PRESETS, find, parse, read_config


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
        ("steps: many", "steps: expected int, got 'many'"),
        ("steps: true", "steps: expected int, got True"),
        ("steps: 1.5", "steps: expected int, got 1.5"),
        ("robust: 1", "robust: expected bool, got 1"),
        ("lr: [1]", "lr: expected float"),
        ("mode: papr", "mode: expected one of paper, reference, got 'papr'"),
        ("workers: some", "workers: expected int, got 'some'"),
        ("- a", "expected keys and values, got list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(write, text, reason):
    name = write(text)
    with pytest.raises(ValueError) as caught:
        read_config(name, Options)
    assert str(caught.value).startswith(f"{name}: ") and reason in str(caught.value)


def test_a_reference_file_s_batch_is_of_the_gpus_that_are_planned_for(write):
    name = write("model_name_or_path: m\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\n")
    for flag in (["--num-gpus", "16"], ["--num_gpus=16"]):
        assert parse(TrainConfig, ["--config", name, *flag], prog="test").batch.pairs_per_step == 16 * 4 * 2


def test_no_such_file_names_the_presets(capsys):
    assert main(["train", "--config", "internvl9"]) == 2
    assert "internvl2-8b-robust" in capsys.readouterr().err


def test_a_saved_config_is_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"lr": 1e-4, "data": ["a"], "max_steps": None}))
    assert read_config(str(tmp_path / "config.json"), TrainConfig).optimizer.lr == 1e-4


@pytest.mark.parametrize("model", ["internvl2-2b", "internvl2-8b", "internvl3-1b", "internvl3-2b", "internvl3-8b"])
@pytest.mark.parametrize("method", ["standard", "robust"])
def test_every_preset_is_ready(model, method):
    config = read_config(f"{model}-{method}", TrainConfig)
    assert find(f"{model}-{method}").parent == PRESETS
    assert config.proxy.robust == (method == "robust")
    assert config.weights.model.name.lower() == model
    assert (config.optimizer.lr, config.optimizer.beta2) == (1e-5, 0.98)
    assert (config.batch.max_tiles, config.batch.pairs_per_step) == (6, 128)
