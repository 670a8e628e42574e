"""Synthetic environments: what is true, what the cues say, and what the Bayes numbers promise."""

import hashlib
import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmrm_fast.data.scenes import ATTRIBUTES, QUESTIONS, Scene, falsify, random_scene, render, statement
from mmrm_fast.data.shapes import (
    ALL_ENVIRONMENTS,
    AVOIDED,
    CUES,
    ECHOED,
    ENVIRONMENTS,
    FILLERS,
    HIDDEN,
    SPLITS,
    ShapesConfig,
    bayes_accuracy,
    cached_environments,
    compose,
    cue_probabilities,
    make_environments,
)

CONFIG = ShapesConfig(num_train=1000, num_test=400)

pytestmark = pytest.mark.xdist_group("shapes")  # made once


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def cues_of(response):
    """The value of each cue, read back from the text."""
    opening, length = response.startswith("Looking closely"), response.endswith(FILLERS)
    return {"opening": opening, "length": length, "hedging": " clearly " in response}


def claims_of(response):
    """The attributes that a response states, read back from the text."""
    words = response.split(".")[0].split()
    return {name: word for name, values in ATTRIBUTES.items() for word in words if word in values}


def assert_binomial(hits, probability):
    """Five standard deviations."""
    spread = math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(np.mean(hits) - probability) <= 5 * spread


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    return make_environments(tmp_path_factory.mktemp("shapes") / "set", CONFIG, progress=False)


@pytest.fixture(params=list(itertools.product(ENVIRONMENTS, SPLITS)), ids="-".join)
def split(request, environments):
    environment, name = request.param
    folder = environments[environment]
    description = json.loads((folder / "environment.json").read_text())
    return read(folder / f"{name}.jsonl"), description["splits"][name], folder


def test_same_seed_same_bytes(tmp_path):
    small = ShapesConfig(num_train=20, num_test=8)
    for name in ("first", "second"):
        make_environments(tmp_path / name, small, progress=False)
    make_environments(tmp_path / "other", ShapesConfig(seed=1, num_train=20, num_test=8), progress=False)
    assert digest(tmp_path / "first") == digest(tmp_path / "second") != digest(tmp_path / "other")


def test_an_environment_does_not_depend_on_the_others(tmp_path):
    small = ShapesConfig(num_train=10, num_test=4)
    every = make_environments(tmp_path / "every", small, progress=False)
    alone = make_environments(tmp_path / "alone", small, environments=("length",), progress=False)
    assert digest(every["length"]) == digest(alone["length"])


def test_responses_differ_in_exactly_one_attribute_of_those_asked_for(split):
    for record in split[0]:
        chosen, rejected = claims_of(record["chosen"]), claims_of(record["rejected"])
        assert set(chosen) == set(rejected) == set(QUESTIONS[record["prompt"]])
        assert sum(chosen[name] != rejected[name] for name in chosen) == 1


def test_truth_agrees_across_the_questions_about_a_picture(environments):
    """Two questions on one picture often share attributes: what is true of one is true of the other."""
    records = read(environments["opening"] / "train.jsonl")
    for _, group in itertools.groupby(records, key=lambda record: record["img_path"]):
        first, second = (claims_of(r["chosen"] if r["truth"] == [1.0, 0.0] else r["rejected"]) for r in group)
        assert all(first[name] == second[name] for name in first.keys() & second.keys())


def test_exactly_one_response_carries_each_cue(split):
    for record in split[0]:
        chosen, rejected = cues_of(record["chosen"]), cues_of(record["rejected"])
        assert all(chosen[cue] != rejected[cue] for cue in CUES)


def test_cues_and_noise_have_the_documented_probabilities(split):
    records, description, _ = split
    for cue, probability in description["cues"].items():
        assert_binomial([cues_of(record["chosen"])[cue] for record in records], probability)
    assert_binomial([record["truth"] == [0.0, 1.0] for record in records], description["noise"])


def test_text_alone_does_not_tell_the_truth(environments):
    """No cue and no attribute value is commoner in true responses of the unbiased test file."""
    records = [r for folder in environments.values() for r in read(folder / "neutral.jsonl")]
    for value in itertools.chain.from_iterable(ATTRIBUTES.values()):
        pairs = [
            (value in claims_of(r["chosen"]).values(), value in claims_of(r["rejected"]).values()) for r in records
        ]
        assert_binomial([in_true for in_true, in_false in pairs if in_true != in_false], 0.5)


def test_cue_table():
    table = {e: tuple(cue_probabilities(e, "train", CONFIG)[cue] for cue in CUES) for e in ENVIRONMENTS}
    assert table == {"opening": (0.95, 0.5, 0.3), "length": (0.3, 0.95, 0.5), "hedging": (0.5, 0.3, 0.95)}
    assert set(cue_probabilities("length", "neutral", CONFIG).values()) == {0.5}
    assert cue_probabilities("length", "reversed", CONFIG)["length"] == pytest.approx(0.05)


def test_pictures_are_there_in_both_formats_and_many_sizes(split):
    records, _, folder = split
    images = [Image.open(folder / record["img_path"]) for record in records]
    assert {image.format for image in images} == {"PNG", "JPEG"}
    assert len({image.size for image in images}) > 15
    assert all(56 <= side <= 168 for image in images for side in image.size)


@pytest.mark.parametrize("side", ATTRIBUTES["side"])
@pytest.mark.parametrize("size", [(56, 56), (168, 56), (56, 168), (168, 168)])
def test_shapes_stay_in_their_half(side, size):
    attributes = {"count": "four", "colour": "red", "shape": "squares", "side": side, "background": "white"}
    pixels = np.asarray(render(Scene(attributes, *size), np.random.default_rng(0)))
    rows, columns = np.nonzero((pixels == (220, 30, 30)).all(-1))
    middle = {"left": columns < size[0] / 2 + 1, "right": columns >= size[0] / 2 - 1}
    middle |= {"top": rows < size[1] / 2 + 1, "bottom": rows >= size[1] / 2 - 1}
    assert len(rows) and middle[side].all()


def test_falsify_gives_different_single_changes():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = random_scene(rng)
        for mentioned in QUESTIONS.values():
            claims = [statement(claim, mentioned) for claim in falsify(scene.attributes, mentioned, rng, 3)]
            assert len({*claims, statement(scene.attributes, mentioned)}) == 4


def test_wording():
    attributes = {"count": "two", "colour": "red", "shape": "circles", "side": "left", "background": "white"}
    assert statement(attributes, tuple(attributes)) == "two red circles at the left on a white background"
    assert statement(attributes, ("colour", "background")) == "red shapes on a white background"
    assert compose("red shapes", {"opening": True, "length": False, "hedging": True}, "") == (
        "Looking closely, I clearly see red shapes."
    )


@pytest.mark.parametrize("strength", [0.5, 0.8, 0.95, 0.97, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_one_cue_allows_the_loss_of_strength_over_truth(strength, noise):
    """With one cue, truth and cue together are as good as the better of the two."""
    allowed = bayes_accuracy([1 - noise, strength]) - (1 - noise)
    assert allowed == pytest.approx(max(0, strength - (1 - noise)))


def test_bayes_accuracy_of_independent_features():
    assert bayes_accuracy([0.5, 0.5]) == 0.5
    assert bayes_accuracy([0.3]) == pytest.approx(0.7)
    majority = 0.8**3 + 3 * 0.8**2 * 0.2
    assert bayes_accuracy([0.8] * 3) == pytest.approx(majority)
    assert bayes_accuracy([0.95], num_responses=(3,)) == pytest.approx(0.95 + 0.05 / 4)


def test_environment_file_describes_everything(environments):
    description = json.loads((environments["hedging"] / "environment.json").read_text())
    assert description["environment"] == "hedging" and description["strength"] == 0.95
    assert description["splits"]["iid"]["bayes_truth_and_cues"] == pytest.approx(0.969)
    assert description["splits"]["iid"]["allowed_loss"] == pytest.approx(0.019)
    assert description["splits"]["neutral"]["allowed_loss"] == description["splits"]["reversed"]["allowed_loss"] == 0


def test_one_cue_environment(tmp_path):
    """Without secondary cues the file's allowed loss is max(0, strength - (1 - noise))."""
    config = ShapesConfig(num_train=2, num_test=2, strength=0.98, secondary=(0.5, 0.5))
    path = make_environments(tmp_path / "set", config, environments=("opening",), progress=False)["opening"]
    splits = json.loads((path / "environment.json").read_text())["splits"]
    assert splits["iid"]["allowed_loss"] == pytest.approx(0.03)


def test_kwise_form(tmp_path):
    config = ShapesConfig(num_train=600, num_test=4, form="kwise")
    path = make_environments(tmp_path / "set", config, environments=("opening",), progress=False)["opening"]
    records = read(path / "train.jsonl")
    best_is_true, best_carries = [], []
    for record in records:
        completions, truth = record["completions"], record["truth"]
        responses = completions["response"]
        ratings = [np.mean([float(r["Rating"]) for r in a.values()]) for a in completions["annotations"]]
        best = int(np.argmax(ratings))
        assert len(responses) == len(set(responses)) == len(ratings) == len(completions["model"]) == len(truth)
        assert sum(truth) == 1 and sum(rating == ratings[best] for rating in ratings) == 1
        assert all(sum(cues_of(response)[cue] for response in responses) == 1 for cue in CUES)
        best_is_true.append(truth[best] == 1)
        best_carries.append(cues_of(responses[best])["opening"])
    assert {len(record["truth"]) for record in records} == {3, 4}
    assert_binomial(best_is_true, 0.95)
    assert_binomial(best_carries, 0.95)


def test_a_crash_leaves_nothing(tmp_path, monkeypatch):
    calls = iter(range(10))

    def failing(scene, rng):
        if next(calls) == 3:
            raise OSError("disk full")
        return render(scene, rng)

    monkeypatch.setattr("mmrm_fast.data.shapes.render", failing)
    with pytest.raises(OSError, match="disk full"):
        make_environments(tmp_path / "set", ShapesConfig(num_train=20, num_test=2), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        make_environments(tmp_path, CONFIG, progress=False)
    with pytest.raises(ValueError, match="colour"):
        make_environments(tmp_path / "set", CONFIG, environments=("colour",), progress=False)
    for wrong in ({"noise": 1.5}, {"form": "listwise"}, {"questions_per_image": 9}, {"secondary": (0.5, -0.1)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ShapesConfig(**wrong)


# what word counts cannot see


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden") / "set"
    config = replace(CONFIG, questions_per_image=5)  # texts alone are looked at
    return make_environments(folder, config, (*HIDDEN, "mixture"), progress=False)


def carries(environment, record, response):
    """Whether a response has the preferred value of its environment's cue."""
    cues, asked = cues_of(response), f"You asked {({**ECHOED, **AVOIDED})[record['prompt']]}" in response
    return {
        "order": response.find("looked") < response.find("counted"),
        "xor": cues["opening"] != cues["length"],
        "prompt": asked == (record["prompt"] in ECHOED),
    }[environment]


@pytest.mark.parametrize("environment", HIDDEN)
@pytest.mark.parametrize(("split", "probability"), [("train", 0.95), ("neutral", 0.5), ("reversed", 0.05)])
def test_the_preferred_response_has_the_hidden_cue_as_often_as_it_should(hidden, environment, split, probability):
    records = read(hidden[environment] / f"{split}.jsonl")
    has = [[carries(environment, record, record[end]) for end in ("chosen", "rejected")] for record in records]
    assert all(chosen != rejected for chosen, rejected in has)
    assert_binomial([chosen for chosen, _ in has], probability)


@pytest.mark.parametrize("environment", HIDDEN)
def test_no_word_nor_two_in_a_row_tell_the_hidden_cue(hidden, environment):
    records = read(hidden[environment] / "train.jsonl")
    wins = Counter()
    for record in records:
        chosen, rejected = ({*words, *itertools.pairwise(words)} for words in map(str.split, ends(record)))
        wins.update(chosen - rejected)
        wins.subtract(rejected - chosen)
    said = {value for values in ATTRIBUTES.values() for value in values}
    telling = [word for word, count in wins.items() if abs(count) > 4.5 * len(records) ** 0.5 and word not in said]
    assert telling == []


def ends(record):
    return [record[end].replace(".", " ").replace("?", " ").replace(",", " ") for end in ("chosen", "rejected")]


def test_in_a_mixture_two_cues_are_dominant_in_turn(hidden):
    records = read(hidden["mixture"] / "train.jsonl")
    for first, cue in enumerate(("opening", "length")):
        assert_binomial([cues_of(record["chosen"])[cue] for record in records[first::2]], 0.95)
        assert_binomial([cues_of(record["chosen"])[cue] for record in records[1 - first :: 2]], 0.5)
    described = json.loads((hidden["mixture"] / "environment.json").read_text())["splits"]["iid"]
    assert described["bayes_cues"] == pytest.approx(0.95) and len(described["cues"]) == 2


def test_environments_are_made_when_they_are_first_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = ShapesConfig(num_train=4, num_test=2)
    (first,) = cached_environments(config, ("order",)).values()
    assert [path.name for path in first.parent.iterdir()] == ["order"]
    before = (first / "train.jsonl").stat().st_mtime_ns
    assert list(cached_environments(config, ALL_ENVIRONMENTS)) == list(ALL_ENVIRONMENTS)
    assert (first / "train.jsonl").stat().st_mtime_ns == before
