"""JSONL lines to groups: the three record forms, their pairs, and an error naming file, line and field for the rest."""

import json
import pickle
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mmrm_fast.data.records import Group, Pairs, RecordError, Records, iter_groups, parse_group

GOLDEN = Path(__file__).parents[1] / "golden" / "common"


def rated(*ratings):
    """One annotation a response, each with one aspect a rating."""
    return [{f"aspect {i}": {"Rating": rating} for i, rating in enumerate(values)} for values in ratings]


def kwise(*ratings):
    responses = [f"response {i}" for i in range(len(ratings))]
    return {"prompt": "p", "completions": {"annotations": rated(*ratings), "response": responses}}


def parse(fields) -> Group:
    return parse_group(fields, source="file.jsonl:1")


def chosen_rejected(group: Group) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in group.pairs]


# the three forms


def test_a_pairwise_record_prefers_chosen():
    group = parse({"id": 7, "prompt": "p", "img_path": "a.png", "chosen": "c", "rejected": "r", "margin": 0.5})
    assert (group.id, group.prompt, group.img_path, group.images) == ("7", "p", "a.png", ("a.png",))
    assert group.responses == ("c", "r")
    assert group.pairs == Pairs.of((0, 1, 0.5))


def test_a_scoring_record_has_responses_and_no_pairs():
    group = parse({"prompt": "p", "img_path": "a.png", "responses": ["x", "y", "x"]})
    assert group.responses == ("x", "y", "x")
    assert len(group.pairs) == 0


def test_a_kwise_record_pairs_every_two_responses_with_different_means():
    group = parse(kwise(["5", "3"], ["4", "4"], ["1", "2"]))
    assert chosen_rejected(group) == [(0, 2), (1, 2)]


def test_completions_may_be_a_list_of_objects():
    columns = kwise(["5"], ["1"], ["3"])["completions"]
    rows = [
        {"annotations": annotation, "model": "m", "response": response}
        for annotation, response in zip(columns["annotations"], columns["response"], strict=True)
    ]
    columns["model"] = ["m"] * 3
    assert parse({"prompt": "p", "completions": rows}) == parse({"prompt": "p", "completions": columns})


def test_golden_pairs_come_in_the_reference_order():
    expected = json.loads((GOLDEN / "expected_pairs.json").read_text(encoding="utf-8"))
    file = Records(GOLDEN / "vlfeedback.jsonl", need_pairs=True)
    pairs = [
        {
            "prompt": group.prompt,
            "img_path": group.img_path,
            "chosen": group.responses[pair.chosen],
            "rejected": group.responses[pair.rejected],
        }
        for group in iter_groups(file)
        for pair in group.pairs
    ]
    assert len(pairs) == expected["num_pairs"]
    assert pairs == expected["pairs"]


def test_truth_follows_the_responses():
    group = parse({"prompt": "p", "chosen": "c", "rejected": "r", "truth": [0, 1.5]})
    assert group.truth == (0.0, 1.5)


# ratings


@pytest.mark.parametrize("rating", ["N/A", "", None, True, "nan", "inf", float("nan"), [], {}, 10**400])
def test_a_rating_that_is_no_finite_number_drops_its_response_from_pairs_and_is_counted(rating):
    group = parse(kwise(["5", "5"], ["1", rating], ["3", "3"]))
    assert chosen_rejected(group) == [(0, 2)]
    assert group.num_unrated == 1


@pytest.mark.parametrize("rating", [" 4 ", "4.5", 4, 4.5, "4\n"])
def test_numbers_and_numeric_text_are_ratings(rating):
    group = parse(kwise(["3"], [rating]))
    assert chosen_rejected(group) == [(1, 0)]
    assert group.num_unrated == 0


@pytest.mark.parametrize("annotation", [{}, None, "4", {"aspect": "4"}, {"aspect": {}}])
def test_an_annotation_without_ratings_is_counted(annotation):
    record = kwise(["3"], ["4"])
    record["completions"]["annotations"][0] = annotation
    group = parse(record)
    assert (len(group.pairs), group.num_unrated) == (0, 1)


# malformed records

MALFORMED = {
    "broken JSON": ('{"prompt": "p", ', "", "not valid JSON"),
    "two objects on a line": ("{} {}", "", "not valid JSON"),
    "a number of 5,000 digits": ('{"prompt": "p", "id": ' + "1" * 5000 + "}", "", "not valid JSON"),
    "an array": ("[1, 2]", "", "a record is a JSON object, this is a list"),
    "a string": ('"prompt"', "", "this is a string"),
    "null": ("null", "", "this is null"),
    "id is a list": ('{"id": [1], "prompt": "p", "responses": ["a"]}', "id", "got a list"),
    "id is an empty list": ('{"id": [], "prompt": "p", "responses": ["a"]}', "id", "got an empty list"),
    "no form": ('{"prompt": "p"}', "", "needs `chosen` and `rejected`"),
    "no prompt": ('{"chosen": "a", "rejected": "b"}', "prompt", "missing"),
    "no rejected": ('{"prompt": "p", "chosen": "a"}', "rejected", "missing"),
    "no chosen": ('{"prompt": "p", "rejected": "a"}', "chosen", "missing"),
    "prompt is null": ('{"prompt": null, "responses": ["a"]}', "prompt", "missing"),
    "prompt is a number": ('{"prompt": 3, "responses": ["a"]}', "prompt", "got a number"),
    "chosen is a list": ('{"prompt": "p", "chosen": ["a"], "rejected": "b"}', "chosen", "got a list"),
    "no responses": ('{"prompt": "p", "responses": []}', "responses", "got an empty list"),
    "responses is a string": ('{"prompt": "p", "responses": "a"}', "responses", "got a string"),
    "a response is null": ('{"prompt": "p", "responses": ["a", null]}', "responses[1]", "got null"),
    "lone surrogate in a prompt": (r'{"prompt": "\ud800", "responses": ["a"]}', "prompt", "lone surrogate"),
    "lone surrogate in a response": (r'{"prompt": "p", "responses": ["\udfff"]}', "responses[0]", "lone surrogate"),
    "margin is NaN": ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}', "margin", "finite"),
    "margin is infinite": ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1e999}', "margin", "finite"),
    "margin is a word": ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}', "margin", "finite"),
    "img_path is a number": ('{"prompt": "p", "img_path": 3, "responses": ["a"]}', "img_path", "got a number"),
    "img_path in a list is null": ('{"prompt": "p", "img_path": [null], "responses": ["a"]}', "img_path", "got null"),
    "img_path with a NUL": (r'{"prompt": "p", "img_path": "a\u0000", "responses": ["a"]}', "img_path", "expected"),
    "completions is a string": ('{"prompt": "p", "completions": "x"}', "completions", "got a string"),
    "completions holds numbers": ('{"prompt": "p", "completions": [1]}', "completions", "expected objects"),
    "completions is empty": ('{"prompt": "p", "completions": {}}', "completions.response", "got null"),
    "completions lacks annotations": (
        '{"prompt": "p", "completions": {"response": ["a"]}}', "completions.annotations", "expected a list of 1"),
    "completions lacks an annotation": (
        '{"prompt": "p", "completions": {"response": ["a", "b"], "annotations": [{}]}}',
        "completions.annotations", "expected a list of 2"),
    "history is a number": ('{"history": 3, "prompt": "p", "responses": ["a"]}', "history", "got a number"),
    "truth of the wrong length": ('{"prompt": "p", "responses": ["a"], "truth": [1, 2]}', "truth", "a list of 1"),
    "truth is NaN": ('{"prompt": "p", "responses": ["a"], "truth": [NaN]}', "truth", "finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_record_is_an_error_naming_file_line_and_field(write_jsonl, kind):
    line, field, reason = MALFORMED[kind]
    path = write_jsonl(["", line])
    with pytest.raises(RecordError) as caught:
        Records(path).group(0)
    assert (caught.value.source, caught.value.field) == (f"{path}:2", field)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"{path}:2: {field}")


def test_json_nested_without_end_is_an_error(write_jsonl):
    with pytest.raises(RecordError, match="not valid JSON"):
        Records(write_jsonl(["[" * 100_000])).group(0)


@pytest.mark.parametrize("field", ["id", "img_path"])
def test_a_lone_surrogate_in_a_field_that_is_written_out_is_an_error(write_jsonl, field):
    path = write_jsonl([f'{{"{field}": "\\ud800", "prompt": "p", "responses": ["a"]}}'])
    with pytest.raises(RecordError, match=field):
        Records(path).group(0)


@pytest.mark.parametrize("more", [{}, {"text": "a caption"}])
def test_a_record_without_preferences_is_an_error_where_pairs_are_needed(write_jsonl, more):
    path = write_jsonl([{"prompt": "p", "responses": ["a", "b"], **more}])
    with pytest.raises(RecordError, match="chosen: missing; training and evaluation need"):
        Records(path, need_pairs=True).group(0)


def test_an_error_takes_its_place_among_the_groups(write_jsonl):
    good = {"prompt": "p", "responses": ["a"]}
    results = list(iter_groups(Records(write_jsonl([good, "[", good]))))
    assert [type(result) for result in results] == [Group, RecordError, Group]
    assert [results[0].record, results[2].record] == [0, 2]


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RecordError("file.jsonl:3", "prompt", "missing")))
    assert (error.source, error.field, error.reason) == ("file.jsonl:3", "prompt", "missing")


# images

IMG_PATHS = {
    "absent": (None, []),
    "relative": ("a.png", ["{root}/a.png"]),
    "in a folder": ("images/a.png", ["{root}/images/a.png"]),
    "absolute": ("/pictures/a.png", ["/pictures/a.png"]),
    "several": (["a.png", "/b.png"], ["{root}/a.png", "/b.png"]),
}


@pytest.mark.parametrize("root", [None, "elsewhere"])
@pytest.mark.parametrize("kind", IMG_PATHS)
def test_relative_images_start_from_the_root_or_the_folder_of_the_file(tmp_path, write_jsonl, kind, root):
    img_path, expected = IMG_PATHS[kind]
    path = write_jsonl([{"prompt": "p", "img_path": img_path, "responses": ["a"]}])
    group = Records(path, image_root=root).group(0)
    assert group.images == tuple(image.format(root=root or tmp_path) for image in expected)
    assert group.img_path == img_path


# many responses

RATED = {"prompt": "p", "responses": [str(i) for i in range(4000)], "scores": [*range(3998), 0, None]}


def test_of_millions_of_pairs_so_many_are_drawn_and_the_others_counted():
    group = parse_group(RATED, source="file.jsonl:1", max_pairs=1000)
    scores, ends = np.array(RATED["scores"], float), group.pairs.ends
    assert (scores[ends[:, 0]] > scores[ends[:, 1]]).all()
    assert len(np.unique(ends, axis=0)) == len(group.pairs) == 1000
    assert group.num_undrawn == 3999 * 3998 // 2 - 1 - 1000
    assert np.bincount(ends[:, 0] // 1000)[1:].argmax() == 2  # the better of a pair is mostly among the best


def test_what_is_drawn_depends_on_responses_and_ratings_alone():
    first, second = (parse_group(RATED, source=f"file.jsonl:{i}", record=i, max_pairs=10) for i in range(2))
    other = parse_group({**RATED, "responses": ["x", *RATED["responses"][1:]]}, source="f", max_pairs=10)
    assert first.pairs == second.pairs != other.pairs


@pytest.mark.parametrize("scores", [[3, 1, 2], [1, 1, 1], [2, None, 2, 5], [None], [1.5, 3, 1.5, 3, 0]])
def test_pairs_are_those_of_every_two_ratings_that_differ_in_the_order_of_the_responses(scores):
    group = parse({"prompt": "p", "responses": ["r"] * len(scores), "scores": scores})
    rated = [i for i, score in enumerate(scores) if score is not None]
    both = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(rated, 2) if scores[i] != scores[j]]
    assert (chosen_rejected(group), group.num_undrawn) == (both, 0)
