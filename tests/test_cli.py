"""The command line: help that explains, names that are suggested, statuses that scripts can use."""

import sys

import pytest

from mmrm_fast.cli import main


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2), (["trian"], 2)])
def test_without_a_command_the_commands_are_listed(arguments, status, capsys):
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert all(f"\n  {name} " in printed.out + printed.err for name in ("train", "score", "study"))


@pytest.mark.parametrize("command", ["train", "score", "study"])
def test_help_explains_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "(default:" in capsys.readouterr().out


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
