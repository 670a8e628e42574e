"""Rows as the benchmarks publish them, with every column of their cards: counts, groups and figures worked by hand."""

import json
import math
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from mmrm_fast.evaluate.benchmarks import Item, MissingImage, Unread, read_items
from mmrm_fast.evaluate.command import ScoredPair, metrics
from mmrm_fast.score.scored import Scored


@pytest.fixture
def picture(pictures):
    """The bytes of a picture, as Parquet files hold it."""
    return {"bytes": Path(pictures["square"]).read_bytes(), "path": None}


def vl(number, source, ranking, picture, **fields):
    return {
        "id": f"{source}-{number}", "query": "What?", "response": ["A cat.", "A dog."], "image": picture,
        "human_ranking": ranking, "models": ["a", "b"], "judge": None, "rationale": None, "query_source": source,
        "ground_truth": None, **fields,
    }  # fmt: skip


def multimodal(identity, category, better, picture, **fields):
    return {
        "ID": identity, "Text": "What?", "Output1": "A cat.", "Output2": "A dog.", "Better": better, "Image": picture,
        "Category": category, "Meta": None, **fields,
    }  # fmt: skip


def mm_rlhf(identity, picture, **fields):
    return {
        "id": identity, "prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "chosen_reason": "r",
        "rejected_reason": "r", "image": picture, "video": None, **fields,
    }  # fmt: skip


def text(identity, subset, **fields):
    return {
        "id": identity, "prompt": "What?", "chosen": "A cat.", "chosen_model": "a", "rejected": "A dog.",
        "rejected_model": "b", "subset": subset, **fields,
    }  # fmt: skip


def read(bench, rows, tmp_path, **options):
    """Items of rows through Parquet, where a column that only some rows have is null in the others."""
    names = {name: None for row in rows for name in row}
    path = tmp_path / "test-00000.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{**names, **row} for row in rows]), path)
    return list(read_items(bench, path, **options))


def figures(bench, items, margins):
    """The metrics where the responses that were labelled better get these margins."""
    pairs, unread = [], [item for item in items if isinstance(item, Unread)]
    for item, margin in zip((item for item in items if isinstance(item, Item)), margins, strict=True):
        (pair,) = item.record.pairs
        rewards = (margin, 0.0) if pair.chosen == 0 else (0.0, margin)
        pairs.append(ScoredPair(item, Scored(item.record, rewards, (False, False)), pair.chosen, pair.rejected))
    return metrics(bench, pairs, unread)


def accuracies(groups):
    return {name: own["accuracy"] for name, own in groups.items()}


def test_vl_rewardbench(tmp_path, picture):
    rows = [
        vl(0, "WildVision", [0, 1], picture),
        vl(1, "RLAIF-V", [1, 0], picture),
        vl(2, "POVID", [0, 1], picture),
        vl(3, "MathVerse", [0, 1], picture, response=["A cat.", "A dog."], image=None),  # without its picture
        vl(4, "MMMU", [0, 0], picture),  # without a label
        vl(5, None, [0, 1], picture, id="RLHF-V-5"),
    ]
    items = read("vl-rewardbench", rows, tmp_path)
    found = figures("vl-rewardbench", items, [1.0, 0.0, -1.0, 2.0])
    groups = found["all"]["groups"]
    assert {name: own["pairs"] for name, own in groups.items()} == {"general": 1, "hallucination": 3}
    assert accuracies(groups) == {"general": 1.0, "hallucination": 0.5}  # a tie is a half
    assert (found["all"]["overall"]["accuracy"], found["all"]["macro"]["accuracy"]) == (0.625, 0.75)
    assert (found["training-set items"]["pairs"], found["without training-set items"]["pairs"]) == (2, 2)
    assert (found["scored"], found["unscored"], found["missing_images"]) == (4, 2, 1)
    assert [type(item.error) is MissingImage for item in items if isinstance(item, Unread)] == [True, False]


def test_multimodal_rewardbench(tmp_path, picture):
    rows = [
        multimodal("vqa-1", "vqa", "Output1", picture),
        multimodal("pairs-2", "safety", "Output2", picture),
        multimodal("hateful-3", "safety", "Output1", picture),
        multimodal("math-4", "reasoning", "Output1", picture),
        multimodal("x-5", None, "Output1", picture),  # in no category
        multimodal("x-6", "vqa", None, picture),  # without a label
    ]
    items = read("multimodal-rewardbench", rows, tmp_path)
    found = figures("multimodal-rewardbench", items, [1.0, 1.0, -1.0, 0.0])
    assert accuracies(found["all"]["groups"]) == {"vqa": 1.0, "safety": 0.5, "reasoning": 0.5}
    assert accuracies(found["subgroups"]) == {"safety/bias": 1.0, "safety/toxicity": 0.0, "reasoning/math": 0.5}
    assert (found["all"]["overall"]["accuracy"], found["unscored"], found["missing_images"]) == (0.625, 2, 0)
    assert [item.error.field for item in items if isinstance(item, Unread)] == ["Category", "Better"]


def test_mm_rlhf_rewardbench(tmp_path, picture):
    rows = [
        mm_rlhf("1", picture),
        mm_rlhf("1", picture),
        mm_rlhf("2", picture),
        mm_rlhf("3", picture),
        mm_rlhf("3", None, video="videos/3"),  # which is not read
        mm_rlhf("4", picture),
    ]
    items = read("mm-rlhf-rewardbench", rows, tmp_path)
    found = figures("mm-rlhf-rewardbench", items, [1.0, 2.0, 1.0, 1.0, 0.0])
    assert found["all"]["overall"]["accuracy"] == 0.9
    assert found["acc_plus"] == {"ids": 3, "accuracy": pytest.approx(2 / 3), "ids_left_out": 1}  # a tie is not right
    (unread,) = (item for item in items if isinstance(item, Unread))
    assert (unread.id, unread.group, unread.error.field) == ("3", "all", "video")


def test_rewardbench(tmp_path):
    subsets = ["alpacaeval-easy", "alpacaeval-hard", "math-prm", "hep-go", "hep-go", None]
    items = read("rewardbench", [text(i, subset) for i, subset in enumerate(subsets)], tmp_path)
    found = figures("rewardbench", items, [1.0, -1.0, 1.0, -1.0, 0.0, 1.0])
    assert accuracies(found["all"]["groups"]) == {
        "alpacaeval-easy": 1.0, "alpacaeval-hard": 0.0, "math-prm": 1.0, "hep-go": 0.25, "all": 1.0,
    }  # fmt: skip
    reasoning = (984 * 1.0 + 2 * 0.25) / 986
    assert found["sections"] == {"Chat": 0.5, "Reasoning": reasoning, "score": (0.5 + reasoning) / 2}


def two(identity, subset, chosen, rejected, **fields):
    """A row of RewardBench 2, whose responses are the rewards that they get."""
    counts = {"num_correct": len(chosen), "num_incorrect": len(rejected), "total_completions": len(chosen + rejected)}
    return {
        "id": identity, "prompt": "What?", "chosen": [*map(str, chosen)], "rejected": [*map(str, rejected)], **counts,
        "models": ["a", "human"], "subset": subset, "additional_metadata": {"category": "x", "index": 1.0}, **fields,
    }  # fmt: skip


@pytest.fixture
def subsets(tmp_path):
    """The sections of rows of RewardBench 2."""

    def subsets(rows, tie=0.5):
        pairs = []
        for item in read("rewardbench-2", rows, tmp_path):
            scored = Scored(
                item.record, tuple(map(float, item.record.responses)), (False,) * len(item.record.responses)
            )
            pairs += [ScoredPair(item, scored, pair.chosen, pair.rejected) for pair in item.record.pairs]
        return metrics("rewardbench-2", pairs, [], tie)

    return subsets


@pytest.mark.parametrize(("tie", "focus", "pairwise"), [(0.5, (1 + 0 + 1 / 3) / 3, 6 / 9), (0.0, 1 / 3, 5 / 9)])
def test_rewardbench_2_counts_how_often_the_right_response_of_four_is_first(subsets, tie, focus, pairwise):
    rows = [
        two("0", "Focus", [4], [1, 2, 3]),
        two("1", "Focus", [3], [4, 2, 5]),
        two("2", "Focus", [3], [3, 3, 1]),  # a third of the first place
        two("3", "Math", [1], [0, 0, 0]),
    ]
    found = subsets(rows, tie)
    assert found["sections"] == pytest.approx({"Focus, first": focus, "Math, first": 1.0, "score": (focus + 1) / 2})
    assert found["all"]["groups"]["Focus"]["accuracy"] == pytest.approx(pairwise)


TIED = {  # rows of one prompt, with one right answer and with several: how much of the score they are, by hand
    "right answers close together": (([5], [1]), ([6, 5], [2, 1]), 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * 0.9640276),
    "further apart than from wrong ones": (([5], [1]), ([9, 4], [2, 1]), 0.3 + 0.3 - 0.01 * 0.5370496),
    "the twin is closer": (([3], [2]), ([6, 4], [1, 0]), 0.3 + 0.3 + 0.2 - 0.01 * 0.4621172),
    "a tie is not right": (([3], [3]), ([6, 6], [1, 0]), 0.3 + 0.2),
    "a wrong one above": (([3], [1]), ([6, 2], [3, 0]), 0.3 - 0.01 * 0.8482836),
    "no spread": (([3], [1]), ([6, 6], [3, 0]), 1.01),
}


@pytest.mark.parametrize(("one", "several", "score"), TIED.values(), ids=TIED)
def test_rewardbench_2_weighs_ties_by_accuracy_and_by_the_spread_of_right_answers(subsets, one, several, score):
    found = subsets([two("ref:7", "Ties", *one), two("tied:7", "Ties", *several)])["sections"]
    assert found == pytest.approx({"Ties, weighted": score, "score": score})


def test_rewardbench_2_takes_accuracies_of_all_ties_and_spreads_of_those_with_a_twin(subsets):
    rows = [
        two("ref:1", "Ties", [5], [1]), two("tied:1", "Ties", [6, 5], [2]), two("ref:2", "Ties", [1], [5]),
        two("tied:3", "Ties", [1, 2], [5]), two("tied:4", "Ties", [1, 2], [5]), two("tied:5", "Ties", [1, 2], [0]),
    ]  # fmt: skip
    expected = 0.3 / 2 + 0.3 * 2 / 4 + 0.2 + 0.2 + 0.01 * 0.9640276
    assert subsets(rows)["sections"]["Ties, weighted"] == pytest.approx(expected)
    assert math.isnan(subsets(rows[2:])["sections"]["Ties, weighted"])


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (two("7", "Ties", [1, 2], [3]), "id"), (two("7", "Math", [1, 2], [3]), "chosen"),
        (two("7", "Math", [1], []), "rejected"), ({**two("7", "Math", [1], [2]), "chosen": "a string"}, "chosen"),
        (two("7", "Math", [1], [2], prompt=None), "prompt"),
    ],
)  # fmt: skip
def test_a_row_of_rewardbench_2_that_says_something_else_is_refused_by_its_field(tmp_path, row, field):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (refused,) = read_items("rewardbench-2", path)
    assert isinstance(refused, Unread) and refused.error.field == field


BENCHES = {
    "vl-rewardbench": lambda picture, **extra: vl(0, "POVID", [0, 1], picture, **extra),
    "multimodal-rewardbench": lambda picture, **extra: multimodal("1", "vqa", "Output1", picture, **extra),
    "mm-rlhf-rewardbench": lambda picture, **extra: mm_rlhf("1", picture, **extra),
    "rewardbench": lambda picture, **extra: text("1", "donotanswer", **extra),
    "rewardbench-2": lambda picture, **extra: two("1", "Focus", [1], [2], **extra),
    "pairs": lambda picture, **extra: {"prompt": "What?", "chosen": "A", "rejected": "B", "image": picture, **extra},
}


@pytest.mark.parametrize("bench", BENCHES)
def test_a_field_that_may_change_an_item_is_refused_unless_it_is_ignored(tmp_path, picture, bench):
    row = BENCHES[bench](picture, audio="a.wav", audio_notes="none")
    (refused,) = read(bench, [row], tmp_path)
    assert isinstance(refused, Unread) and refused.error.field == "audio"
    (item,) = read(bench, [row], tmp_path, ignored=("audio",))
    assert isinstance(item, Item) and len(item.record.pairs) == 1


def test_ignored_fields_of_messages_are_let_go_too(tmp_path):
    turn = {"role": "user", "content": "What?", "function_call": "f"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(text("1", "hep-go", prompt=[turn])) + "\n")
    (refused,) = read_items("rewardbench", path)
    assert refused.error.field == "prompt[0].function_call"
    (item,) = read_items("rewardbench", path, ignored=("function_call",))
    assert item.record.prompt == "What?"


def test_two_fields_that_name_two_pictures_are_refused(tmp_path, picture, pictures):
    path = tmp_path / "rows.jsonl"
    same = vl(0, "POVID", [0, 1], "square.png", image_path="images/square.png")
    other = vl(1, "POVID", [0, 1], "square.png", image_path="images/wide.png")
    path.write_text("".join(json.dumps(row) + "\n" for row in (same, other)))
    item, refused = read_items("vl-rewardbench", path)
    assert item.record.images == (pictures["square"],) and refused.error.field == "image_path"
