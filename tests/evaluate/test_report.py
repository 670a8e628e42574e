"""The report of runs: one page that needs nothing else, whatever a run has or lacks."""

import json
import re

import numpy as np
import pytest
import torch
from pages import Checker, chromium, fits, needs_chromium, visit

from mmrm_fast.cli import main
from mmrm_fast.evaluate.report import read_rows
from mmrm_fast.ops.pair_loss import pair_loss_ref


@pytest.fixture
def make_run(tmp_path, pictures, write_jsonl):
    """A run folder as a robust training leaves it, with a test set of twelve records."""
    data = write_jsonl(
        [
            {
                "prompt": f"<b>What</b> is in picture {i}?",
                "img_path": pictures["wide"],
                "chosen": "two",
                "rejected": "a cat",
            }
            for i in range(12)
        ],
        "test.jsonl",
    )

    def make(name, **changed):
        folder = tmp_path / name
        folder.mkdir()
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
        files = {
            "config.json": {"robust": True, "lr": 1e-5, "data": ["a", "b"], "image_root": None},
            "environment.json": {"torch": "2.13", "gpus": "none"},
            "results.json": figures,
            "metrics.jsonl": metrics,
            "evaluations.jsonl": [{"step": 100, "sets": figures}],
            "eval-iid.jsonl": pairs,
            **changed,
        }
        for file, content in files.items():
            if content is not None:
                lines = [json.dumps(row) for row in content] if isinstance(content, list) else [json.dumps(content)]
                (folder / file).write_text("\n".join(lines) + "\n")
        return folder

    return make


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def report(tmp_path):
    def report(*folders):
        out = tmp_path / "report.html"
        assert main(["report", *map(str, folders), "--out", str(out)]) == 0
        return out.read_text()

    return report


def test_a_page_is_whole_and_refers_to_nothing_outside(make_run, report):
    tags = Checker(report(make_run("a"), make_run("b"))).tags
    assert tags.count("article") == 40 and tags.count("svg") > 8


def test_a_page_shows_curves_accuracies_pairs_config_and_environment(make_run, report):
    text = report(make_run("a"))
    for title in ("loss", "mean SFC", "SFC of the training pairs", "Calibration", "margins on iid", "test accuracy"):
        assert f'aria-label="{title}"' in text
    assert text.count("<article>") == 20 and text.count("data:image/jpeg;base64,") == 20
    assert "<dt>lr</dt><dd>1e-05</dd>" in text and "<dt>torch</dt>" in text
    assert "&lt;b&gt;What&lt;/b&gt; is in picture 0?" in text


def test_pairs_are_sorted_by_what_they_are_shown_for(make_run, report):
    weighted, worst = report(make_run("a")).split("Worst pairs")
    margins = [float(value) for value in re.findall(r"margin <b>(.*?)</b>", worst)]
    assert margins == sorted(margins) and margins[0] == -6
    weights = [float(value) for value in re.findall(r"weight <b>(.*?)</b>", weighted)]
    assert weights == sorted(weights, reverse=True) and weights[0] > 0.99


@pytest.mark.parametrize("mode", ["paper", "reference", "balanced"])
def test_up_weighted_pairs_are_those_of_the_run_s_own_mode(make_run, report, mode):
    config = {"robust": True, "sfc_mode": mode, "image_root": None}
    weighted, _ = report(make_run("a", **{"config.json": config})).split("Worst pairs")
    number = r"<b>(-?[\d.]+)</b>"
    pairs = re.findall(rf"margin {number} · proxy {number} · weight {number}", weighted)
    margins, proxy_margins, weights = np.array(pairs, float).T
    expected = pair_loss_ref(*map(torch.from_numpy, (margins.copy(), proxy_margins.copy())), None, None, mode, 0.0)[1]
    assert weights == pytest.approx(expected.numpy(), abs=6e-4)
    assert (np.diff(weights) <= 0).all() and f"mode, {mode}," in weighted


def test_what_is_written_is_shown_as_text(make_run, report):
    text = report(make_run("a$\\1$<i>"))
    assert "<i>\n" not in text and "a$\\1$&lt;i&gt;" in text


def test_pairs_of_a_json_array_are_found_by_their_place(make_run, report, tmp_path):
    pairs = [{"prompt": f"What is {i}?", "chosen": "a", "rejected": "b"} for i in range(3)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    source = {"record": 7, "source": f"{tmp_path / 'pairs.json'}[2]"}
    row = {**source, "chosen": 0, "rejected": 1, "margin": -1.0, "proxy_margin": None}
    assert "What is 2?" in report(make_run("a", **{"eval-iid.jsonl": [row]}))


@pytest.mark.parametrize(
    "missing", [["metrics.jsonl", "evaluations.jsonl"], ["eval-iid.jsonl", "results.json"], ["environment.json"]]
)
def test_what_a_run_lacks_is_left_out(make_run, report, missing):
    Checker(report(make_run("a", **dict.fromkeys(missing))))


def test_a_standard_run_has_no_proxy_and_no_weights(make_run, report):
    rows = [{"record": 0, "source": "gone.jsonl:1", "chosen": 0, "rejected": 1, "margin": -1.0, "proxy_margin": None}]
    text = report(make_run("a", **{"eval-iid.jsonl": rows}))
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
def test_a_browser_renders_it_without_a_complaint(make_run, report, browser, tmp_path, width):
    report(make_run("a"), make_run("b"))
    with visit(browser, f"file://{tmp_path / 'report.html'}", width=width) as page:
        assert page.locator("article").count() == 40 and fits(page)
    assert page.complaints == page.foreign == []
