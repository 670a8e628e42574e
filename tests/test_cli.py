"""The command line: help that explains, names that are suggested, statuses that scripts can use."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrm_fast import __version__, cli, config
from mmrm_fast.cli import COMMANDS, TASKS, main
from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import types


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2), (["trian"], 2)])
def test_without_a_command_the_commands_are_listed(arguments, status, capsys):
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert all(f"\n  {name} " in printed.out + printed.err for name in ("train", "score", "study"))


def test_a_misspelt_command_is_told_the_nearest(capsys):
    assert main(["evalaute"]) == 2
    assert "did you mean `evaluate`" in capsys.readouterr().err


def test_every_command_is_of_one_task():
    assert sorted(name for names in TASKS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize("command", ["train", "score", "serve", "evaluate", "best-of-n", "study"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"--{name.replace('_', '-')}" in said for name in types(COMMANDS[command][0]))


def test_the_options_of_a_training_have_a_panel_a_group(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    for name, group in vars(TrainConfig()).items():
        assert f"{name} options" in said and group.__doc__ in said


def test_a_line_of_help_is_whole_sentences_as_its_breaks_are_kept():
    classes = [node for node in ast.parse(Path(config.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    helps = [node.value.value for each in classes for node in each.body[1:] if isinstance(node, ast.Expr)]
    assert len(helps) > 80 and not [line for text in helps for line in text.splitlines() if not line.endswith(".")]


def test_a_misspelt_option_is_an_error_that_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--token-per-batch", "5"])
    assert stopped.value.code == 2
    assert "--tokens-per-batch" in capsys.readouterr().err


def test_serving_without_its_packages_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in ("mmrm_fast.serve.command", "mmrm_fast.serve.api"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["serve"]) == 2
    assert "pip install 'mmrm_fast[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_segments_of_a_gpu_s_memory_can_grow_unless_the_user_says_how_it_is_taken(monkeypatch, own):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # what stands there now comes back
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(own, "backend:native")
    importlib.reload(cli)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == {
        "PYTORCH_ALLOC_CONF": "backend:native",
        None: "expandable_segments:True",
    }.get(own)


def test_a_script_beside_a_folder_of_the_package_s_name_imports_the_package(tmp_path):
    """As a clone is one to scripts beside it."""
    (tmp_path / "mmrm_fast").mkdir()
    (tmp_path / "script.py").write_text("import mmrm_fast\nprint(mmrm_fast.__version__)\n")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == __version__, done.stderr
