"""The report of runs: one page that needs nothing else, whatever a run has or lacks."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from mmrm_fast.cli import main
from mmrm_fast.evaluate.report import read_rows, shortcut_failure

VOID = {"meta", "link", "img", "br"}


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


@pytest.fixture
def report(tmp_path):
    def report(*folders):
        out = tmp_path / "report.html"
        assert main(["report", *map(str, folders), "--out", str(out)]) == 0
        return out.read_text()

    return report


class Checker(HTMLParser):
    """Collects what a page refers to, and fails on elements that are closed in the wrong order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_whole_and_refers_to_nothing_outside(make_run, report):
    page = Checker(report(make_run("a"), make_run("b")))
    assert "script" not in page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)


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
    sfc = [float(value) for value in re.findall(r"SFC <b>(.*?)</b>", weighted)]
    assert sfc == sorted(sfc, reverse=True) and sfc[0] > 0.99


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


def test_sfc_of_a_pair():
    assert shortcut_failure({"margin": 1.0, "proxy_margin": 1.0}) == 0.5
    assert shortcut_failure({"margin": -2.0, "proxy_margin": 5.0}) == pytest.approx(0.0031, abs=1e-4)
    assert shortcut_failure({"margin": 1.0}) is None


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_renders_it_without_a_complaint(make_run, report, tmp_path, width):
    report(make_run("a"), make_run("b"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--window-size={width},2000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, f"file://{tmp_path / 'report.html'}"], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<article>") == 40
    assert "CONSOLE" not in done.stderr
