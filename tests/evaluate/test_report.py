"""The report of runs: one page that needs nothing else, whatever a run has or lacks."""

import json
import re

import numpy as np
import pytest
import torch
from pages import Checker, chromium, fits, needs_chromium, visit
from reward_server import picture

from mmrm_fast.cli import main
from mmrm_fast.evaluate.report import read_rows
from mmrm_fast.ops.pair_loss import pair_loss_ref

pytestmark = pytest.mark.xdist_group("report")  # pages made once
CURVES = ("metrics.jsonl", "evaluations.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A test set of twelve records."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "wide.png").write_bytes(picture())
    row = {"img_path": str(folder / "wide.png"), "chosen": "two", "rejected": "a cat"}
    rows = [{"prompt": f"<b>What</b> is in picture {i}?", **row} for i in range(12)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "test.jsonl"


def run_files(data):
    """What a robust training leaves in its folder, with a test set of twelve records."""
    rng = np.random.default_rng(0)
    metrics = [
        {"step": step, "loss_main": 1 / step, "loss_proxy": 0.5, "accuracy": 0.7, "proxy_accuracy": 0.9, "pairs": 8,
         "sfc_mean": 0.4, "sfc_histogram": rng.integers(0, 5, 20).tolist(), "grad_norm": None, "lr": 1e-5,
         "seconds": 2.0}
        for step in range(1, 200)
    ]  # fmt: skip
    pairs = [
        {"record": i, "source": f"{data}:{i + 1}", "chosen": 0, "rejected": 1, "margin": i - 6.0,
         "proxy_margin": 3.0 - i, "truth": None}
        for i in range(12)
    ]  # fmt: skip
    figures = {"iid": {"kind": "iid", "pairs": 12, "accuracy": 0.75, "proxy_accuracy": 0.5, "sfd": float("nan")}}
    return {
        "config.json": {"robust": True, "lr": 1e-5, "data": ["a", "b"], "image_root": None},
        "environment.json": {"torch": "2.13", "gpus": "none"},
        "results.json": figures,
        "metrics.jsonl": metrics,
        "evaluations.jsonl": [{"step": 100, "sets": figures}],
        "eval-iid.jsonl": pairs,
    }


@pytest.fixture(scope="module")
def report(data, tmp_path_factory):
    """The page of runs by name, each with what it has in place of usual files; None is a file that it lacks."""

    def report(**runs):
        place = tmp_path_factory.mktemp("report")
        for name, changed in runs.items():
            (place / name).mkdir()
            for file, content in {**run_files(data), **changed}.items():
                if content is not None:
                    lines = [json.dumps(row) for row in content] if isinstance(content, list) else [json.dumps(content)]
                    (place / name / file).write_text("\n".join(lines) + "\n")
        assert main(["report", *(str(place / name) for name in runs), "--out", str(place / "report.html")]) == 0
        return place / "report.html"

    return report


@pytest.fixture(scope="module")
def page_of_one(report):
    return report(a={}).read_text()


@pytest.fixture(scope="module")
def page_of_two(report):
    return report(a={}, b={})


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def test_a_page_is_whole_and_refers_to_nothing_outside(page_of_two):
    tags = Checker(page_of_two.read_text()).tags
    assert tags.count("article") == 40 and tags.count("svg") > 8


def test_a_page_shows_curves_accuracies_pairs_config_and_environment(page_of_one):
    text = page_of_one
    for title in ("loss", "mean SFC", "SFC of the training pairs", "Calibration", "margins on iid", "test accuracy"):
        assert f'aria-label="{title}"' in text
    assert text.count("<article>") == 20 and text.count("data:image/jpeg;base64,") == 20
    assert "<dt>lr</dt><dd>1e-05</dd>" in text and "<dt>torch</dt>" in text
    assert "&lt;b&gt;What&lt;/b&gt; is in picture 0?" in text


def test_pairs_are_sorted_by_what_they_are_shown_for(page_of_one):
    weighted, worst = page_of_one.split("Worst pairs")
    margins = [float(value) for value in re.findall(r"margin <b>(.*?)</b>", worst)]
    assert margins == sorted(margins) and margins[0] == -6
    weights = [float(value) for value in re.findall(r"weight <b>(.*?)</b>", weighted)]
    assert weights == sorted(weights, reverse=True) and weights[0] > 0.99


@pytest.mark.parametrize("mode", ["paper", "reference", "balanced"])
def test_up_weighted_pairs_are_those_of_the_run_s_own_mode(report, mode):
    config = {"robust": True, "sfc_mode": mode, "image_root": None}
    page = report(a={"config.json": config, **dict.fromkeys(CURVES)}).read_text()
    weighted, _ = page.split("Worst pairs")
    number = r"<b>(-?[\d.]+)</b>"
    pairs = re.findall(rf"margin {number} · proxy {number} · weight {number}", weighted)
    margins, proxy_margins, weights = np.array(pairs, float).T
    expected = pair_loss_ref(*map(torch.from_numpy, (margins.copy(), proxy_margins.copy())), None, None, mode, 0.0)[1]
    assert weights == pytest.approx(expected.numpy(), abs=6e-4)
    assert (np.diff(weights) <= 0).all() and f"mode, {mode}," in weighted


def test_what_is_written_is_shown_as_text(report):
    text = report(**{"a$\\1$<i>": {}}).read_text()
    assert "<i>\n" not in text and "a$\\1$&lt;i&gt;" in text


def test_pairs_of_a_json_array_are_found_by_their_place(report, tmp_path):
    pairs = [{"prompt": f"What is {i}?", "chosen": "a", "rejected": "b"} for i in range(3)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    source = {"record": 7, "source": f"{tmp_path / 'pairs.json'}[2]"}
    row = {**source, "chosen": 0, "rejected": 1, "margin": -1.0, "proxy_margin": None}
    assert "What is 2?" in report(a={"eval-iid.jsonl": [row], **dict.fromkeys(CURVES)}).read_text()


@pytest.mark.parametrize("missing", [CURVES, ["eval-iid.jsonl", "results.json"], ["environment.json"]])
def test_what_a_run_lacks_is_left_out(report, missing):
    Checker(report(a=dict.fromkeys(missing)).read_text())


def test_a_standard_run_has_no_proxy_and_no_weights(report):
    rows = [{"record": 0, "source": "gone.jsonl:1", "chosen": 0, "rejected": 1, "margin": -1.0, "proxy_margin": None}]
    text = report(a={"eval-iid.jsonl": rows, **dict.fromkeys(CURVES)}).read_text()
    assert "Most up-weighted" not in text and "gone.jsonl: no such file" in text


def test_a_row_cut_short_by_a_kill_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("arguments", [[], ["nowhere"]])
def test_no_run_is_a_message(arguments, capsys):
    assert main(["report", *arguments]) == 2
    assert "run" in capsys.readouterr().err


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_renders_it_without_a_complaint(page_of_two, browser, width):
    with visit(browser, page_of_two.as_uri(), width=width) as page:
        assert page.locator("article").count() == 40 and fits(page)
    assert page.complaints == page.foreign == []
