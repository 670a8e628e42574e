"""The audit of preference files: each environment's cue is found and named, labels are judged, the page is whole."""

import json

import pytest
from pages import Checker, chromium, fits, needs_chromium, visit

from mmrm_fast.cli import main
from mmrm_fast.data.shapes import ALL_ENVIRONMENTS, ShapesConfig, make_environments
from mmrm_fast.shortcuts import chunks
from mmrm_fast.shortcuts.chunks import CHUNK, WORTH_WORKERS
from mmrm_fast.tables import percent

NAMES = {  # of each environment's dominant cue
    "opening": "closely", "length": "words", "hedging": "clearly", "prompt": ", by the question: ",
    "order": " before ", "xor": "exactly one of ",
}  # fmt: skip


pytestmark = pytest.mark.xdist_group("audit")  # made once


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    config = ShapesConfig(num_train=WORTH_WORKERS * CHUNK, num_test=40)  # read by this process
    folder = tmp_path_factory.mktemp("shapes") / "set"
    return make_environments(folder, config, ALL_ENVIRONMENTS, progress=False)


@pytest.fixture(scope="module")
def audited(environments, tmp_path_factory):
    """The audit of all environments' training files, by environment, and its folder."""
    folder = tmp_path_factory.mktemp("audit")
    files = [str(own / "train.jsonl") for own in environments.values()]
    assert main(["audit", *files, "--output-dir", str(folder)]) == 0
    return json.loads((folder / "audit.json").read_text()), folder


@pytest.mark.parametrize("environment", NAMES)
def test_the_dominant_cue_is_the_first_with_its_strength(audited, environment):
    first = audited[0]["files"][f"{environment}/train"]["cues"][0]
    assert NAMES[environment] in first["cue"]
    assert first["accuracy"] == pytest.approx(0.95, abs=0.01)


def test_of_a_mixture_both_cues_are_named_first(audited):
    cues = audited[0]["files"]["mixture/train"]["cues"][:2]  # of one strength
    opening, length = sorted(cues, key=lambda cue: cue["cue"] == "words")
    assert "looking closely" in opening["also"] and length["cue"] == "words"


def test_cues_that_flip_between_environments_are_named(audited):
    cycle = {"opening": "length", "length": "hedging", "hedging": "opening"}  # where each is preferred in 30 %
    for environment, other in cycle.items():
        cue = audited[0]["files"][f"{environment}/train"]["cues"][0]["elsewhere"]
        flips = {name for name, there in cue.items() if there["flips"]}
        assert flips == {f"{other}/train"}
        assert cue[f"{other}/train"]["accuracy"] == pytest.approx(0.3, abs=0.03)


def test_the_matrix_says_which_shortcut_carries_over(audited):
    matrix = audited[0]["matrix"]
    assert matrix["opening/train"]["opening/train"]["accuracy"] == pytest.approx(0.95, abs=0.015)
    assert matrix["opening/train"]["length/train"]["accuracy"] < 0.4
    cell = matrix["order/train"]["order/train"]
    assert cell["low"] < cell["accuracy"] < cell["high"]
    assert cell["accuracy"] == pytest.approx(0.5, abs=0.04)  # two words in a row do not tell it


def test_advice_names_what_words_do_not_see_and_what_does_not_carry_over(audited):
    advice, matrix = "\n".join(audited[0]["advice"]), audited[0]["matrix"]
    order, here = audited[0]["files"]["order/train"]["cues"][0], matrix["opening/train"]["opening/train"]
    told = f"“looked” before “twice” alone is right on {percent(order['accuracy'])} %, which --proxy-model ngrams"
    assert f"order/train: {told}" in advice
    assert f"opening/train: text alone is right on {percent(here['accuracy'])} % here and on " in advice


def test_robust_weights_listen_to_a_share_of_the_pairs(audited):
    listened = audited[0]["files"]["opening/train"]["listened_to"]
    assert 0.05 < listened["balanced"] < listened["paper"] < 0.6
    assert audited[0]["files"]["order/train"]["listened_to"]["paper"] > 0.95


@pytest.fixture
def faulty(write_jsonl, tmp_path):
    """Records with every fault once, and a test file that shares a pair and a picture with them."""
    pair = {"prompt": "What?", "img_path": "a.png", "chosen": "a cat", "rejected": "a dog"}
    rows = [pair, pair, pair | {"img_path": "b.png", "chosen": "x", "rejected": "x"}]
    rows += [pair | {"prompt": "Who?", "chosen": own, "rejected": other} for own, other in (("m", "n"), ("n", "m"))]
    rows += [pair | {"prompt": f"{i}?", "img_path": f"{i}.png", "chosen": "yes " + "so " * i} for i in range(20)]
    rows.insert(2, {"prompt": "no responses", "responses": []})
    train = write_jsonl(rows, "train.jsonl")
    test = write_jsonl([pair, pair | {"prompt": "Where?"}, pair | {"img_path": "z.png"}], "test.jsonl")
    return str(train), str(test)


def test_labels_are_judged(faulty, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chunks, "WORTH_WORKERS", 0)  # by worker processes
    train, test = faulty
    assert main(["audit", train, "--eval", f"held={test}", "--output-dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "audit.json").read_text())
    health = results["files"]["train"]["health"]
    wanted = {"unreadable": 1, "identical sides": 1, "duplicates": 1, "contradictory": 2}
    assert {name: health[name] for name in wanted} == wanted
    (shared,) = results["shared"]
    assert {key: shared[key] for key in ("pairs", "image and prompt", "image")} == {
        "pairs": 1, "image and prompt": 1, "image": 2,
    }  # fmt: skip
    assert results["files"]["train"]["first_problem"].startswith(f"{train}:3: ")
    printed = capsys.readouterr().out
    assert "train: 2 of 25 pairs: the same two responses stand with either one preferred" in printed
    assert "held: 1 records are in train with their image and prompt" in printed
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "<h3>train</h3>" in page and "<li>2 of 25 pairs: the same two responses stand" in page
    assert "<h3>held</h3>" in page and "<li>1 records are in train with their image and prompt" in page


def test_a_model_s_states_are_a_further_proxy_with_a_matrix_of_its_own(environments, model_folder, tmp_path):
    files = [str(environments[name] / "iid.jsonl") for name in ("hedging", "length")]
    assert main(["audit", *files, "--model", str(model_folder), "--output-dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert {*results["probe_matrix"]} == {"hedging/iid", "length/iid"}
    for name, own in results["files"].items():
        figures = own["proxies"]["probe"]
        assert {*figures} == {"accuracy", "low", "high", "log_loss"}
        assert {*results["probe_matrix"][name]} == {"hedging/iid", "length/iid"}
        assert results["probe_matrix"][name][name]["accuracy"] == figures["accuracy"]
    assert (tmp_path / "out" / "audit.html").read_text().count('<table class="map">') == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give preference files"),
        (["{train}", "{train}"], "a file is given twice"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["{train}", "--eval", "train={test}"], "the name of a file"),
    ],
)
def test_what_cannot_be_audited_is_said(faulty, tmp_path, capsys, arguments, reason):
    named = [text.format(train=faulty[0], test=faulty[1]) for text in arguments]
    assert main(["audit", *named, "--output-dir", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err


def test_the_page_stands_alone(audited):
    text = (audited[1] / "audit.html").read_text()
    checker = Checker(text)
    assert checker.tags.count("article") >= 2 * len(ALL_ENVIRONMENTS) and "looking closely" in text


@needs_chromium
def test_the_page_fits_the_screen_of_a_desktop_and_of_a_phone(audited):
    with chromium() as browser:
        for width in (1280, 390):
            with visit(browser, (audited[1] / "audit.html").as_uri(), width=width) as page:
                assert fits(page) and page.complaints == [] and page.foreign == []
