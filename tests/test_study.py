"""The study's figures, from run folders as trainings leave them."""

import json

import pytest

from mmrm_fast import study
from mmrm_fast.config import StudyConfig
from mmrm_fast.evaluate import PairRow, write_rows

SETS = {"iid": "iid", "length": "ood", "hedging": "ood", "neutral": "probe", "reversed": "probe"}


def write_cell(root, method, environment, seed, accuracy):
    """A finished run whose every accuracy is `accuracy`; the proxy is right on the first half of the pairs."""
    folder = study.Cell(method, environment, seed).folder(root)
    folder.mkdir(parents=True)
    sets = {
        name: {"kind": kind, "pairs": 4, "accuracy": accuracy, "truth_accuracy": accuracy}
        for name, kind in SETS.items()
    }
    (folder / "results.json").write_text(json.dumps(sets))
    right = round(4 * accuracy)
    for name in SETS:
        rows = [
            PairRow(i, f"f:{i}", 0, 1, 1.0 if i < right else -1.0, (1.0 if i < 2 else -1.0), truth=1.0)
            for i in range(4)
        ]
        write_rows(folder / f"eval-{name}.jsonl", rows)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A study of which every cell is trained; training one more is a failure."""
    for environment in study.ENVIRONMENTS:
        for seed in (0, 1):
            write_cell(tmp_path, "standard", environment, seed, 0.5)
            write_cell(tmp_path, "robust", environment, seed, 0.75 + 0.25 * seed)
    monkeypatch.setattr(study, "train_cell", lambda *_: pytest.fail("a finished cell was trained again"))
    monkeypatch.setattr(study, "iid_bounds", lambda *_: [])
    monkeypatch.setattr(study, "cached_environments", dict)
    return tmp_path


def test_means_are_over_environments_and_spread_is_over_seeds(finished, capsys):
    results = study.study(StudyConfig(output_dir=finished, seeds=2))
    assert results["means"]["standard"]["ood_truth"] == [0.5, 0.0]
    assert results["means"]["robust"]["ood_truth"] == [0.875, 0.125]
    assert len(results["cells"]) == 12 == len((finished / "study.csv").read_text().splitlines()) - 1
    assert "87.5 ± 12.5" in capsys.readouterr().out


def test_degradation_is_judged_by_the_proxy_of_the_same_data_and_seed(finished):
    cells = study.study(StudyConfig(output_dir=finished))["cells"]
    degradation = {cell["method"]: cell["sfd"] for cell in cells}
    assert degradation == {"standard": 1.0, "robust": 0.5}  # right where the proxy is, and half where it is not


def test_a_failing_training_stops_the_study_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(study.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"log\.txt"):
        study.train_cells([study.Cell("standard", "opening", 0)], StudyConfig(output_dir=tmp_path, jobs=1))
