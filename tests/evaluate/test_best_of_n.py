"""Best-of-N: exact expectations, fair ties, and what the command reads and refuses."""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import tyro

from mmrm_fast.cli import main
from mmrm_fast.data.records import Records
from mmrm_fast.data.scenes import ATTRIBUTES
from mmrm_fast.evaluate.best_of_n import curve, expected_best, named_files, parse_sizes
from mmrm_fast.study.candidates import make_candidates


def over_all_subsets(scores, quality, size):
    """The mean over every subset of its best response's quality, tied ones sharing it."""
    means = []
    for subset in itertools.combinations(range(len(scores)), size):
        best = max(scores[i] for i in subset)
        means.append(np.mean([quality[i] for i in subset if scores[i] == best]))
    return np.mean(means)


@pytest.mark.parametrize("scores", [[3, 1, 2, 5, 4, 0], [1, 1, 0, 2, 2, 2], [0] * 6], ids=["distinct", "ties", "equal"])
def test_the_expectation_is_that_over_all_subsets(scores):
    quality = np.array([0.1, 0.9, 0.4, 0.7, 0.2, 1.0])
    sizes = list(range(1, 7))
    expected = [over_all_subsets(scores, quality, size) for size in sizes]
    assert expected_best(np.array(scores, float), quality, sizes) == pytest.approx(expected, abs=1e-12)


def test_one_response_is_the_mean_and_all_are_the_best():
    scores, quality = np.random.default_rng(0).normal(size=(2, 64))
    one, every = expected_best(scores, quality, [1, 64])
    assert one == pytest.approx(quality.mean())
    assert every == pytest.approx(quality[scores.argmax()])


def test_the_expectation_is_exact_for_many_responses():
    scores = np.arange(5000.0)
    (value,) = expected_best(scores, scores, [2])
    assert value == pytest.approx((2 * 5000 - 1) / 3)  # mean of the larger of two of 0..M-1


def test_kl_of_best_of_n():
    rows = curve(np.ones((2, 3)), [1, 2, 64])
    assert [row["kl"] for row in rows] == pytest.approx([0, np.log(2) - 0.5, np.log(64) - 63 / 64])


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("1,2,4,...,64", [1, 2, 4, 8, 16, 32, 64]), ("1, 3,10", [1, 3, 10]), ("8,...,20", [8, 16, 20]), ("5", [5])],
)
def test_sizes_are_a_list_in_which_dots_double(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "0,1", "4,2", "1,...", "...,4", "1,two"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="--n"):
        parse_sizes(text)


def test_a_path_may_hold_the_sign_that_names_a_file(tmp_path):
    path = tmp_path / "lr=1e-3" / "scores.jsonl"
    path.parent.mkdir()
    path.touch()
    assert named_files([str(path)]) == {"scores": path}
    assert named_files([f"ours={path}"]) == {"ours": path}


# the command


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score_rows(scores):
    return [
        {"record": record, "response_index": index, "score": score}
        for record, values in enumerate(scores)
        for index, score in enumerate(values)
    ]


@pytest.fixture
def command(tmp_path):
    """Run the command on scores by model name and on truth; its status and results."""

    def run(truth, n="1,2,4", **models):
        files = [f"{name}={write(tmp_path / f'{name}.jsonl', rows)}" for name, rows in models.items()]
        truth_file, out = write(tmp_path / "truth.jsonl", truth), tmp_path / "out"
        status = main(["best-of-n", "--scores", *files, "--truth", truth_file, "--n", n, "--output-dir", str(out)])
        return status, json.loads((out / "best-of-n.json").read_text()) if status == 0 else None

    return run


def test_a_curve_a_model_beside_what_the_truth_would_select(command, tmp_path):
    truth = [[0.0, 1.0, 0.5, 0.25], [1.0, 0.0, 0.5, 0.75]]
    good, bad = score_rows(truth), score_rows([[-t for t in values] for values in truth])
    status, results = command([{"prompt": "?", "truth": values} for values in truth], good=good, bad=bad[::-1])
    assert status == 0
    assert results["curves"]["good"] == results["curves"]["the truth itself"]
    assert [row["quality"] for row in results["curves"]["good"]] == pytest.approx([0.5, 37 / 48, 1])
    assert results["curves"]["bad"][-1]["quality"] == pytest.approx(0)
    (difference,) = results["differences"]
    assert (difference["first"], difference["second"], difference["n"]) == ("bad", "good", 4)
    assert [difference[key] for key in ("difference", "low", "high")] == pytest.approx([-1, -1, -1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"best-of-n.{s}" for s in ("json", "svg", "png")}


def test_truth_may_be_a_row_a_response(command):
    rows = score_rows([[1.0, 2.0], [2.0, 1.0]])
    status, results = command([{**row, "truth": row["score"]} for row in rows], n="1,2", model=rows)
    assert (status, results["curves"]["model"][-1]["quality"]) == (0, 2)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1.0, 2.0, 3.0]], "record 0 has 3 scores for 4 responses"),
        ([[1.0, 2.0, 3.0, float("nan")]], "finite"),
        ([], "record 0 has 0 scores"),
    ],
)
def test_scores_that_do_not_fit_the_truth_are_refused(command, capsys, scores, message):
    status, _ = command([{"truth": [0, 1, 2, 3]}], model=score_rows(scores))
    assert status == 2
    assert message in capsys.readouterr().err


def test_more_than_there_are_responses_cannot_be_chosen_from(command, capsys):
    assert command([{"truth": [0, 1]}], n="1,4", model=score_rows([[0.0, 1.0]]))[0] == 2
    assert "record 0 has 2 responses, N goes up to 4" in capsys.readouterr().err


# candidates


def test_candidates_are_records_whose_truth_is_the_share_of_right_attributes(tmp_path):
    path = make_candidates(tmp_path / "set", "length", num_prompts=20, num_responses=64)
    groups = [Records(path).group(index) for index in range(20)]
    assert all(len(group.responses) == len(group.truth) == 64 for group in groups)
    truths = np.array([group.truth for group in groups])
    assert np.mean(truths == 1) == pytest.approx(0.1, abs=0.03)
    assert truths.min() == 0
    for group in groups:
        (right,) = {facts(r) for r, t in zip(group.responses, group.truth, strict=True) if t == 1}
        assert all((facts(r) == right) == (t == 1) for r, t in zip(group.responses, group.truth, strict=True))


def facts(response):
    """The attribute values that a response names."""
    words = set(response.replace(".", " ").split())
    return frozenset(value for values in ATTRIBUTES.values() for value in values if value in words)


@pytest.mark.parametrize(
    ("split", "carried"), [("iid", (0.95, 0.05)), ("neutral", (0.5, 0.5)), ("reversed", (0.05, 0.95))]
)
def test_cues_follow_the_split(tmp_path, split, carried):
    path = make_candidates(tmp_path / "set", "opening", split, num_prompts=40)
    groups = [Records(path).group(index) for index in range(40)]
    cue = np.array([[response.startswith("Looking") for response in group.responses] for group in groups])
    right = np.array([group.truth for group in groups]) == 1
    assert (cue[right].mean(), cue[~right].mean()) == pytest.approx(carried, abs=0.08)


def test_the_same_seed_gives_the_same_file(tmp_path):
    first, second = (make_candidates(tmp_path / name, "hedging", num_prompts=3) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_script_writes_what_it_is_asked_for(tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_candidates.py"))["main"]
    options = {"environment": "length", "split": "neutral", "num-prompts": 2, "num-responses": 3, "right": 1, "seed": 7}
    tyro.cli(main, args=[str(tmp_path / "set"), *(f"--{name}={value}" for name, value in options.items())])
    records = Records(capsys.readouterr().out.strip())
    assert [records.group(index).truth for index in range(2)] == [(1, 1, 1)] * 2
    with pytest.raises(SystemExit):
        tyro.cli(main, args=[str(tmp_path / "other"), "--environment=weather"])
