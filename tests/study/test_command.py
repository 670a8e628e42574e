"""The study's figures, from run folders as trainings leave them, and the trainings it starts."""

import csv
import json
from types import SimpleNamespace

import pytest
from pages import Checker, chromium, fits, needs_chromium, visit
from tyro import cli

from mmrm_fast.cli import main
from mmrm_fast.config import StudyConfig, TrainConfig
from mmrm_fast.data import shapes
from mmrm_fast.pairs import PairRow, write_rows
from mmrm_fast.study import command, selection
from mmrm_fast.study.figures import Cell, Runs, compare, pairs_of
from mmrm_fast.study.page import write_study

ENVIRONMENTS = ("a", "b", "c")
RECORDS = 4


def write_cell(root, method, environment, seed, num_right, truth=1.0):
    """A finished run that is right on the first `num_right` pairs of every test; its proxy on the first two."""
    folder = Cell(method, environment, seed).folder(root)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    steps = [{"step": i, "sfc_mean": 1.0 if method == "standard" else i / 50, "seconds": 2.0} for i in range(50)]
    steps[7]["sfc_mean"] = None  # was not finite
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    for name in ("iid", *(name for name in ENVIRONMENTS if name != environment)):
        rows = [
            PairRow(
                i, f"f:{i}", 0, 1, 1.0 if i < num_right else -1.0,
                None if method == "standard" else (1.0 if i < 2 else -1.0), truth,
            )
            for i in range(RECORDS)
        ]  # fmt: skip
        write_rows(folder / f"eval-{name}.jsonl", rows)


@pytest.fixture
def files(write_jsonl):
    """Environments on files of four pairs, in the option's form."""
    rows = [{"prompt": "?", "chosen": "a" * (i + 1), "rejected": "aa"} for i in range(RECORDS)]
    paths = {name: write_jsonl(rows, f"{name}.jsonl") for name in ENVIRONMENTS}
    return tuple(f"{name}={path},{path}" for name, path in paths.items())


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A study of which every cell is trained; training one more is a failure."""
    for environment in ENVIRONMENTS:
        for seed in (0, 1):
            write_cell(tmp_path / "runs", "standard", environment, seed, 2)
            write_cell(tmp_path / "runs", "robust", environment, seed, 3 + seed)
    monkeypatch.setattr(command, "train_cell", lambda *_: pytest.fail("a finished cell was trained again"))
    return tmp_path / "runs"


def run(finished, files, seeds=2, **options):
    command.study(StudyConfig(env=files, output_dir=finished, seeds=seeds, **options))
    return json.loads((finished / "study.json").read_text())


def test_means_are_over_environments_and_spread_is_over_seeds(finished, files, capsys):
    results = run(finished, files)
    assert results["means"]["standard"]["ood"] == {"mean": 0.5, "spread": 0.0}
    assert results["means"]["robust"]["ood"] == {"mean": 0.875, "spread": 0.125}
    assert "87.5 ± 12.5" in capsys.readouterr().out


def test_what_a_method_takes_is_told_over_the_first_ones(finished, files, capsys):
    for folder in finished.glob("robust-*"):
        (folder / "shortcut").mkdir()
        (folder / "shortcut" / "fitted.json").write_text('{"seconds": 25.0}')
    costs = run(finished, files)["costs"]
    assert costs["standard"] == {"time": 100.0, "memory": None} and costs["robust"]["time"] == 125.0
    (overall,) = (line for line in capsys.readouterr().out.splitlines() if "robust" in line and "mean" in line)
    assert [cell.strip() for cell in overall.split("│")[-3:-1]] == ["1.25", "-"]


def test_shapes_environments_are_trained_on_by_name_and_tested_on_the_first_three(monkeypatch, tmp_path):
    made = lambda environments: {name: tmp_path / name for name in environments}  # noqa: E731
    monkeypatch.setattr(command, "cached_environments", made)
    chosen = command.chosen_environments(("order", "length"))
    assert {name: (own.is_trained, own.is_tested) for name, own in chosen.items()} == {
        "order": (True, False), "length": (True, True), "opening": (False, True), "hedging": (False, True),
    }  # fmt: skip
    assert [own.is_trained for own in command.chosen_environments(()).values()] == [True] * 3
    (iid, *others) = Runs([], chosen, tmp_path).sets(Cell("robust", "order", 0))[:4]
    assert iid[:2] == ("order", "iid") and {name for name, kind, _ in others} == set(shapes.ENVIRONMENTS)


def test_there_is_a_row_a_model_and_test_set(finished, files):
    tests = run(finished, files)["tests"]
    assert len(tests) == 2 * 2 * len(ENVIRONMENTS) ** 2
    assert {row["kind"] for row in tests if row["environment"] == row["test"]} == {"iid"}
    with open(finished / "study.csv", newline="") as file:
        assert [row["judged"] for row in csv.DictReader(file)] == [str(row["judged"]) for row in tests]


def test_degradation_is_judged_by_the_proxy_of_the_same_data_and_seed(finished, files):
    tests = run(finished, files, seeds=1)["tests"]
    by_method = {row["method"]: row["sfd"] for row in tests}
    assert by_method == {"standard": 1.0, "robust": 0.5}  # right where the proxy is, and half where it is not


def test_without_a_method_that_has_a_proxy_there_is_no_degradation(finished, files):
    results = run(finished, files, methods="standard")
    assert "sfd" not in results["means"]["standard"]
    assert not any("sfd" in row for row in results["tests"])


def test_truth_judges_where_it_is_known(tmp_path, files):
    for environment in ENVIRONMENTS:
        write_cell(tmp_path / "runs", "robust", environment, 0, 3, truth=-1.0)
    (row, *_) = run(tmp_path / "runs", files, seeds=1, methods="robust")["tests"]
    assert (row["labels"], row["judged"]) == (0.75, 0.25)


def test_the_difference_is_paired_by_record(finished, files):
    (row,) = run(finished, files)["significance"]
    assert (row["first"], row["second"], row["records"]) == ("standard", "robust", 3 * RECORDS)
    assert row["difference"] == pytest.approx(0.375)
    assert row["low"] <= 0.375 <= row["high"]
    assert row["p_value"] == pytest.approx(2 / 2**6, abs=0.01)  # six of the twelve records differ, all the same way


def test_methods_are_compared_with_the_first_and_with_the_papers():
    methods = ["standard", "robust", "robust-white"]
    assert pairs_of(methods) == [("standard", "robust"), ("standard", "robust-white"), ("robust", "robust-white")]
    assert pairs_of(methods[1:]) == [("robust", "robust-white")]
    assert pairs_of(["standard"]) == []


def test_p_values_of_several_comparisons_are_corrected():
    """Holm: the smallest times the number of tests, the next times one less, never falling."""
    credits = {"a": [0.0] * 12, "b": [1.0] * 12, "c": [1.0] * 6 + [0.0] * 6}
    values = {method: {i: [value] for i, value in enumerate(own)} for method, own in credits.items()}
    rows = compare(pairs_of(["a", "c", "b"]), values)
    c, b = (next(row for row in rows if row["second"] == name) for name in "cb")
    assert (b["p_value"], c["p_value"]) == pytest.approx((2 / 2**12, 2 / 2**6), rel=0.5)
    assert (b["p_holm"], c["p_holm"]) == pytest.approx((2 * b["p_value"], max(2 * b["p_value"], c["p_value"])))


def test_comparisons_are_a_table_of_their_own(finished, files, capsys):
    (row,) = run(finished, files)["significance"]
    with open(finished / "comparisons.csv", newline="") as file:
        (written,) = csv.DictReader(file)
    assert (written["second"], float(written["p_holm"])) == ("robust", row["p_holm"])
    assert "robust minus standard: +37.5 (" in capsys.readouterr().out
    assert "robust minus standard" in (finished / "study.html").read_text()


def test_rules_and_buckets_are_of_the_test_files(finished, files):
    results = run(finished, files)
    assert results["rules"]["a"]["longer wins"] == (2 + 0.5) / 4
    buckets = results["controls"]["robust"]["buckets"]
    assert sum(bucket["pairs"] for bucket in buckets.values()) == 2 * 3 * 2 * RECORDS


def test_the_sfc_is_averaged_over_runs_by_share_of_the_training(finished, files):
    curve = run(finished, files)["sfc"]
    assert curve["standard"] == []
    expected = [(2 * i + 0.5) / 50 for i in range(25)]
    expected[3] = 6 / 50  # step 7 was not finite
    assert [row["sfc_mean"] for row in curve["robust"]] == pytest.approx(expected)


def test_the_page_holds_everything_itself(finished, files):
    run(finished, files)
    page = (finished / "study.html").read_text()
    assert Checker(page).tags.count("svg") == 1
    assert page.count('class="map"') == 2 * 2 + 1 and page.count('class="own"') == 3 * 5


# best of N


@pytest.fixture
def selected(tmp_path, monkeypatch):
    """Cells of two methods whose models are asked for at most once: one rewards length, the other the truth."""
    rewards = {"standard": lambda group: map(len, group.responses), "robust": lambda group: group.truth}
    asked = []

    def load(folder):
        asked.append(folder)
        reward = rewards[folder.parent.name.partition("-")[0]]

        def score(groups, at_once):
            return (SimpleNamespace(rewards=tuple(map(float, reward(group)))) for group in groups)

        return SimpleNamespace(score_stream=score)

    monkeypatch.setattr(selection.Scorer, "from_pretrained", load)
    monkeypatch.setattr(selection, "NUM_PROMPTS", 2)
    cells = [Cell(method, name, seed) for seed in (0, 1) for name in shapes.ENVIRONMENTS for method in rewards]
    for cell in cells:
        cell.folder(tmp_path).mkdir()
    return selection.selection_figures(cells, tmp_path), asked, cells


@pytest.mark.parametrize(("kind", "prompts"), [("ood", 6), ("reversed", 6)])
def test_every_model_selects_from_the_same_candidates_away_from_its_training(selected, kind, prompts):
    figures = selected[0][kind]
    robust, bound = figures["curves"]["robust"], figures["curves"]["the truth itself"]
    assert [row["quality"] for row in robust] == pytest.approx([row["quality"] for row in bound])
    (row,) = figures["comparisons"]
    assert (row["first"], row["second"], row["records"]) == ("standard", "robust", prompts)
    loss = robust[-1]["quality"] - figures["curves"]["standard"][-1]["quality"]
    assert row["difference"] == pytest.approx(loss) and loss > 0
    assert robust[-1]["spread"] == 0


def test_there_is_a_row_a_model_and_set_of_candidates(selected):
    rows = selected[0]["models"]
    assert len(rows) == 2 * 2 * 3 * 3
    assert {(row["environment"] == row["cues"]) for row in rows if row["kind"] == "ood"} == {False}


def test_scores_that_exist_are_not_computed_again(selected, tmp_path):
    figures, asked, cells = selected
    assert selection.selection_figures(cells, tmp_path) == figures
    assert len(asked) == len(cells)
    file = tmp_path / "standard-length-0" / "scores-ood-opening.jsonl"
    truth = tmp_path / "candidates" / "ood-opening" / "candidates.jsonl"
    out = tmp_path / "out"
    assert main(["best-of-n", "--scores", str(file), "--truth", str(truth), "--output-dir", str(out)]) == 0


def whole_results(selected, finished, files):
    config = StudyConfig(env=files, output_dir=finished, seeds=2)
    return command.results_of(config) | {"best_of_n": selected[0]}


def test_the_page_shows_what_is_selected(selected, finished, files):
    write_study(finished / "study.html", whole_results(selected, finished, files))
    assert Checker((finished / "study.html").read_text()).tags.count("svg") == 3


@needs_chromium
def test_a_browser_renders_the_page_without_a_complaint(selected, finished, files):
    write_study(finished / "study.html", whole_results(selected, finished, files))
    with chromium() as browser:
        for width in (1280, 390):
            with visit(browser, f"file://{finished / 'study.html'}", width=width) as page:
                assert page.locator("svg").count() == 3 and fits(page)
            assert page.complaints == page.foreign == []


def test_without_known_truth_there_is_no_best_of_n(files, tmp_path):
    with pytest.raises(ValueError, match="--best-of-n"):
        command.study(StudyConfig(env=files, output_dir=tmp_path, best_of_n=True))


# trainings


@pytest.mark.parametrize("method", command.METHODS)
def test_every_method_is_options_of_train(method, files, tmp_path):
    config = StudyConfig(env=files, output_dir=tmp_path, model=tmp_path / "m", options="--max-tiles 6")
    environments = command.chosen_environments(files)
    arguments = command.command(Cell(method, "b", 7), environments, config)
    parsed = cli(TrainConfig, args=arguments[arguments.index("train") + 1 :])
    assert (parsed.proxy.robust, parsed.run.seed, parsed.batch.max_tiles) == (method != "standard", 7, 6)
    assert parsed.records.data == (str(environments["b"].train),)
    assert [spec.split("=")[0] for spec in (*parsed.records.eval, *parsed.records.eval_ood)] == ["iid", "a", "c"]


def test_several_ranks_are_started_by_torchrun(files, tmp_path):
    config = StudyConfig(env=files, output_dir=tmp_path, processes=8)
    arguments = command.command(Cell("robust", "a", 0), command.chosen_environments(files), config)
    assert arguments[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8", "-m"]


def test_a_failing_training_stops_the_study_with_its_log(tmp_path, files, monkeypatch):
    monkeypatch.setattr(command.sys, "executable", "false")
    config = StudyConfig(env=files, output_dir=tmp_path, jobs=1)
    with pytest.raises(RuntimeError, match=r"log\.txt"):
        command.train_cells([Cell("standard", "a", 0)], command.chosen_environments(files), config)


def test_a_cell_that_was_trained_with_other_options_is_not_taken_for_this_one(tmp_path, files):
    cell, environments = Cell("standard", "a", 0), command.chosen_environments(files)
    config = StudyConfig(env=files, output_dir=tmp_path, options="--epochs 2")
    write_cell(tmp_path, "standard", "a", 0, 2)
    (cell.folder(tmp_path) / "options.json").write_text(json.dumps(command.options(cell, environments, config)))
    assert command.is_trained(cell, environments, config)
    with pytest.raises(ValueError, match=r"was trained with .*--epochs 2, not .*--epochs 3"):
        command.is_trained(cell, environments, StudyConfig(env=files, output_dir=tmp_path, options="--epochs 3"))


@pytest.mark.parametrize(
    "spec", ["a", "a=x.jsonl", "=x,y", "iid={file},{file}", "a={file},absent.jsonl", "a/b={file},{file}"]
)
def test_an_environment_that_cannot_be_is_named(spec, write_jsonl):
    file = write_jsonl([])
    with pytest.raises(ValueError, match="--env"):
        command.chosen_environments((spec.format(file=file),))


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"robust-balanced"):
        command.chosen_methods("standard,robst")
