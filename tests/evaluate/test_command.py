"""The evaluate command end to end: a random reward model on small files in published layouts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from evaluate.test_benchmarks import vl_item, write_json_lines

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.cli import main
from mmrm_fast.data.types import Group
from mmrm_fast.evaluate import command
from mmrm_fast.evaluate.benchmarks import Item, MissingImage, Unread
from mmrm_fast.evaluate.command import ScoredPair, accuracy_plus, metrics
from mmrm_fast.evaluate.rewardbench import section_scores
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.scorer import Scorer


def pair(margin, identity="a", group="all", training=False):
    record = Group(f"f:{identity}", 0, None, "?", None, (), ("a", "b"))
    return ScoredPair(Item(identity, record, group, None, training), Scored(record, (margin, 0.0), (False,) * 2), 0, 1)


@pytest.fixture
def folder(make_checkpoint, tmp_path):
    save_checkpoint(tmp_path / "model", make_checkpoint())
    return tmp_path / "model"


def run(folder, bench, data, *more):
    """Run the command; its exit status and results."""
    out = data.parent / "out"
    status = main(
        ["evaluate", "--bench", bench, "--data", str(data), "--model", str(folder), "--output-dir", str(out), *more]
    )
    return status, json.loads((out / "results.json").read_text())


# metrics


def test_a_tie_is_half_a_point_overall_and_in_its_group():
    pairs = [pair(1.0, "1", "x"), pair(0.0, "2", "x"), pair(-1.0, "3", "y"), pair(0.0, "4", "y")]
    figures = metrics("pairs", pairs, [])["all"]
    assert {name: group["accuracy"] for name, group in figures["groups"].items()} == {"x": 0.75, "y": 0.25}
    assert figures["overall"]["accuracy"] == figures["macro"]["accuracy"] == 0.5


def test_overall_is_over_items_and_macro_over_groups():
    pairs = [pair(1.0, str(i), "large") for i in range(9)] + [pair(-1.0, "9", "small")]
    figures = metrics("pairs", pairs, [])["all"]
    assert figures["overall"]["accuracy"] == 0.9
    assert figures["macro"]["accuracy"] == 0.5


def test_vl_rewardbench_is_reported_with_and_without_training_set_items():
    pairs = [pair(1.0, "1", training=True), pair(1.0, "2", training=True), pair(-1.0, "3")]
    figures = metrics("vl-rewardbench", pairs, [])
    parts = [figures[name] for name in ("all", "without training-set items", "training-set items")]
    assert [part["pairs"] for part in parts] == [3, 1, 2]
    assert [part["overall"]["accuracy"] for part in parts] == [pytest.approx(2 / 3), 0, 1]


def test_acc_plus_needs_every_pair_of_an_id_right_and_leaves_out_ids_with_an_unscored_one():
    pairs = [pair(1, "a"), pair(2, "a"), pair(1, "b"), pair(-1, "b"), pair(0, "c"), pair(1, "d")]
    lost = [Unread("d", "all", MissingImage("f:9", "image", "absent"))]
    assert accuracy_plus(pairs, lost) == {"ids": 3, "accuracy": pytest.approx(1 / 3), "ids_left_out": 1}


def test_rewardbench_sections_weigh_mathematics_like_all_code():
    groups = {
        "math-prm": {"pairs": 447, "accuracy": 0.5},
        **{f"hep-{name}": {"pairs": 164, "accuracy": 1.0} for name in ("cpp", "go", "java", "js", "python", "rust")},
        "mt-bench-easy": {"pairs": 28, "accuracy": 1.0},
        "mt-bench-med": {"pairs": 40, "accuracy": 0.0},
    }
    sections = section_scores(groups)
    assert sections["Reasoning"] == pytest.approx(0.75)
    assert sections["Chat"] == pytest.approx(28 / 68)
    assert sections["score"] == pytest.approx((0.75 + 28 / 68) / 2)


# the command


def test_every_item_is_scored_as_the_scorer_scores_it(folder, tmp_path, pictures):
    names = list(pictures)
    rows = [vl_item(i, image=f"{names[i % 4]}.png", ranking=((0, 1), (1, 0))[i % 2]) for i in range(9)]
    status, results = run(folder, "vl-rewardbench", write_json_lines(tmp_path / "data.jsonl", rows))
    assert status == 0
    records = [
        {"prompt": row["query"], "img_path": str(tmp_path / row["image"]), "responses": row["response"]} for row in rows
    ]
    rewards = Scorer.from_pretrained(folder, "cpu").score(records)
    for i, (item, expected) in enumerate(zip(results["items"], rewards, strict=True)):
        assert item["scores"] == pytest.approx(expected, abs=1e-5)
        better, other = item["scores"][:: 1 if i % 2 == 0 else -1]
        assert item["margin"] == pytest.approx(better - other)
    assert results["reliability"]["repeatability"]["rewards"] == 18
    assert results["reliability"]["repeatability"]["largest"] < 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "reliability.svg", "margins.svg"}


def test_repeatability_is_the_range_of_each_reward_over_batch_sizes():
    record = Group("f:1", 0, None, "?", None, (), ("a", "b"))
    runs = iter([(1.0, 2.0), (1.5, 2.0), (1.25, 2.0)])
    scorer = SimpleNamespace(score_stream=lambda records, size: [Scored(record, next(runs), (False,) * 2)])
    figures = command.repeatability(scorer, [Item("a", record)])
    assert (figures["rewards"], figures["largest"], figures["mean"]) == (2, 0.5, 0.25)


def test_a_missing_image_is_listed_and_counted_and_neither_right_nor_wrong(folder, tmp_path, pictures, capsys):
    rows = [vl_item(0, image="square.png"), vl_item(1, image="absent.png"), vl_item(2, image="wide.png")]
    status, results = run(folder, "vl-rewardbench", write_json_lines(tmp_path / "data.jsonl", rows))
    assert status == command.EXIT_SOME_UNSCORED
    figures = results["metrics"]
    assert (figures["scored"], figures["unscored"], figures["missing_images"]) == (2, 1, 1)
    assert figures["all"]["overall"]["accuracy"] == np.mean([item["margin"] > 0 for item in results["items"]])
    assert [(row["id"], row["missing_image"]) for row in results["unscored"]] == [("RLAIF-V-1", True)]
    out = capsys.readouterr().out
    assert "absent.png" in out
    assert "data.jsonl: 3 records, 2 with pictures, 0 without, 1 that cannot be used; read: human_ranking, id, " in out


def test_position_is_a_rule_only_where_an_order_was_published(folder, tmp_path, pictures):
    rows = [vl_item(i, image="square.png", ranking=((0, 1), (1, 0))[i == 0]) for i in range(4)]
    _, results = run(folder, "vl-rewardbench", write_json_lines(tmp_path / "vl.jsonl", rows))
    assert results["controls"]["rules"]["first wins"] == 0.75
    rows = [{"prompt": "What?", "chosen": "A", "rejected": "B"}] * 2
    _, results = run(folder, "pairs", write_json_lines(tmp_path / "pairs.jsonl", rows))
    assert "first wins" not in results["controls"]["rules"]


def test_pairs_whose_sides_are_the_same_are_told_apart(folder, tmp_path, capsys):
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
    long = " and so on" * 300
    rows = [
        row,
        {**row, "id": "text", "rejected": "A cat."},
        {**row, "id": "cut", "chosen": long + "x", "rejected": long},
    ]
    path = write_json_lines(tmp_path / "pairs.jsonl", rows)
    _, results = run(folder, "pairs", path, "--max-length", "64")
    assert [item["id"] for item in results["items"]] == ["0"]
    assert [item["id"] for item in results["identical_pairs"]] == ["text", "cut"]
    assert results["metrics"]["all"]["pairs"] == 1
    assert "2 pairs whose two sides are the same are in no figure: text, cut" in capsys.readouterr().out
    path = write_json_lines(tmp_path / "pairs.jsonl", rows[1:2])
    arguments = ["--data", str(path), "--model", str(folder), "--output-dir", str(tmp_path / "none")]
    assert main(["evaluate", *arguments]) == 2
    assert "all pairs have two sides of the same tokens" in capsys.readouterr().err


def test_pairs_over_the_most_of_a_record_are_counted(folder, tmp_path, capsys):
    row = {"prompt": "What?", "responses": list("abcde"), "scores": [1, 2, 3, 4, 5]}
    path = write_json_lines(tmp_path / "pairs.jsonl", [row, {**row, "scores": [1, 1, 1, 1, 2]}])
    _, results = run(folder, "pairs", path, "--max-pairs", "5")
    assert (len(results["items"]), results["pairs_over_max_pairs"]) == (9, 5)
    assert all(len(item[name]) == 2 for item in results["items"] for name in ("scores", "truncated", "lengths"))
    assert "5 pairs over --max-pairs 5 of a record were not drawn" in capsys.readouterr().out


def test_where_nothing_can_be_scored_the_first_reason_is_the_error(folder, tmp_path, capsys):
    path = write_json_lines(tmp_path / "data.jsonl", [vl_item(image="absent.png")])
    assert main(["evaluate", "--bench", "vl-rewardbench", "--data", str(path), "--model", str(folder)]) == 2
    assert "absent.png" in capsys.readouterr().err
