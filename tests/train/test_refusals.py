"""Options that contradict each other or cannot be are refused together, before anything is loaded or written."""

import re
from typing import get_args
from unittest.mock import Mock

import pytest

from mmrm_fast.cli import main
from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import flags, options, types, with_options
from mmrm_fast.train import sharding
from mmrm_fast.train.refusals import RANGES, refuse

DATA = {"data": ("a.jsonl",)}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """The message about some options, their paths relative to a folder with a file `margins`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "margins").write_text("")

    def message(num_ranks=1, **changed):
        with pytest.raises(ValueError) as caught:
            refuse(with_options(TrainConfig(), **changed), num_ranks=num_ranks)
        return str(caught.value)

    return message


@pytest.mark.parametrize("config", [{}, DATA, {"robust": True, "sfc_mode": "balanced"}, {"environment": "length"}])
def test_what_can_be_trained_is_not_refused(config):
    refuse(with_options(TrainConfig(), **config), num_ranks=3)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"label_smoothing": 0.7}, r"--label-smoothing 0\.7: expected a number in \[0, 0\.5\]"),
        ({"eval_fraction": 1.0}, r"--eval-fraction 1\.0: expected a number in \(0, 1\)"),
        ({"lr": float("nan")}, "--lr nan: expected"),
        ({"max_steps": 0}, "--max-steps 0: expected"),
        ({"replicas": 0}, "--replicas 0: expected"),
        ({"replicas": 3, "num_ranks": 4}, "--replicas 3 does not divide 4 ranks"),
        ({"model": "m"}, "--model without --data"),
        ({"pairs": "some"}, "--pairs some: expected all, expand or a number"),
        ({"pairs": "0"}, "--pairs 0: expected"),
        ({"min_tiles": 4, "max_tiles": 2}, "--min-tiles 4 is over --max-tiles 2"),
        ({"tokens_per_batch": 100, "pairs_per_step": 4}, "--tokens-per-batch and --pairs-per-step: give one of them"),
        ({"overwrite": True, "resume": "auto"}, "--overwrite and --resume: give one of them"),
        ({"robust": True, "sfc_mode": "balanced", "center_rewards": 0.1}, "--center-rewards with --sfc-mode balanced"),
        ({"proxy_model": "small"}, "--proxy-model does nothing without --robust"),
        ({"proxy_image": "white"}, "--proxy-image does nothing without --robust"),
        ({"sfc_mode": "reference"}, "--sfc-mode does nothing without --robust"),
        ({"gpu_memory": 80.0}, "--gpu-memory does nothing without --dry-run"),
        ({"best": "iid.accuracy"}, "--best does nothing without --eval-every"),
        ({"best": "nothing.accuracy", "eval_every": 1}, r"--best nothing\.accuracy: expected SET\.FIGURE, of iid or"),
        ({"best": "iid.nothing", "eval_every": 1}, "one of"),
        ({"best": "iid.sfd", "eval_every": 1}, r"--best iid\.sfd: no proxy scores the test sets"),
        ({"robust": True, "proxy_model": "lora"}, "--llm-lora"),
        (
            {"robust": True, "proxy_model": "nowhere"},
            "nowhere: not full, lora, ngrams, probe, auto, a folder or",
        ),
        (
            {"robust": True, "proxy_model": "margins", "best": "iid.sfd", "eval_every": 1},
            "no proxy scores the test sets",
        ),
        ({"eval": ("noname",)}, "NAME=FILE"),
        ({"eval": ("a=x",), "eval_ood": ("a=y",)}, "'a': every set has a name of its own"),
        ({"eval": ("held-out=x",), "eval_fraction": 0.1}, "'held-out': every set has a name of its own"),
        ({"eval": ("a/b=x",)}, "without a slash"),
        ({"data": ("a:1", "b")}, "give every file a weight, or none"),
    ],
)
def test_what_cannot_be_is_named_with_its_options(refused, changed, reason):
    assert re.search(reason, refused(**changed))


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_written(tmp_path, capsys):
    wrong = {"label_smoothing": 0.7, "eval_fraction": 2.0, "proxy_model": "small", "min_tiles": 4, "max_tiles": 2}
    arguments = list(flags({**wrong, "output_dir": tmp_path / "run"}, types(TrainConfig)))
    for more in ([], ["--dry-run"]):
        assert main(["train", *arguments, *more]) == 2
        said = capsys.readouterr().err
        assert "4 options cannot be" in said
        assert all(f"--{name.replace('_', '-')}" in said for name in wrong)
        assert not list(tmp_path.iterdir())


def test_every_number_has_a_range():
    numbers = {name for name, hint in types(TrainConfig).items() if {int, float} & {hint, *get_args(hint)}}
    assert numbers == {name for names in RANGES.values() for name in names.split()} <= set(options(TrainConfig()))


def test_ranks_that_do_not_reach_each_other_are_told_what_names_the_network(monkeypatch):
    monkeypatch.setattr(sharding.dist, "init_process_group", Mock(side_effect=RuntimeError("no address for: node-7")))
    with (
        pytest.raises(OSError, match="no address for: node-7; of several networks, GLOO_SOCKET_IFNAME"),
        sharding.ranks(),
    ):
        pass
