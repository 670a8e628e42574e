"""`mmrm-fast init`: a file that trains as it stands, with every option explained in it."""

import yaml

from mmrm_fast.cli import main
from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import options, read_config

PAIR = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}


def test_the_file_is_a_training_on_the_data_given(write_jsonl, tmp_path, capsys):
    path, out = write_jsonl([PAIR] * 3, "mine.jsonl"), tmp_path / "mine.yaml"
    assert main(["init", str(path), "--out", str(out)]) == 0
    assert f"mmrm-fast train --config {out}" in capsys.readouterr().out
    assert f"# {path}: 3 records; the first has 0 images, 2 responses" in out.read_text()
    given, usual = options(read_config(str(out), TrainConfig)), options(TrainConfig())
    own = {"data": (str(path),), "robust": True, "eval_fraction": 0.02, "config": str(out)}
    own["output_dir"] = given["output_dir"]
    assert given == usual | own and given["output_dir"].name == "mine"


def test_every_option_is_there_with_its_help_and_its_default(write_jsonl, tmp_path):
    out = tmp_path / "mine.yaml"
    main(["init", str(write_jsonl([PAIR])), "--out", str(out)])
    lines, usual = out.read_text().splitlines(), options(TrainConfig())
    keys = [line for line in lines if line.removeprefix("# ").partition(":")[0] in usual]
    assert [yaml.safe_load(line.removeprefix("# ")) for line in keys] and len(keys) == len(usual)
    assert all(lines[lines.index(line) - 1].startswith("# ") for line in keys)


def test_what_is_there_or_cannot_be_read_is_refused(write_jsonl, tmp_path, capsys):
    path = write_jsonl([PAIR])
    assert main(["init", str(path), "--out", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["init", str(write_jsonl(["no json"], "bad.jsonl")), "--out", str(tmp_path / "a.yaml")]) == 2
    assert "bad.jsonl" in capsys.readouterr().err
