"""Margins of text alone: what is seen of a response, and that no pair is judged by a regression that saw it."""

from collections import Counter

import numpy as np
import pytest

from mmrm_fast.data.records import Records
from mmrm_fast.data.types import Group, Message, Pairs
from mmrm_fast.pairs import accuracy
from mmrm_fast.shortcuts import crossfit, fit
from mmrm_fast.shortcuts.chunks import NgramFeatures
from mmrm_fast.shortcuts.crossfit import Ranks, fold_of, level_of
from mmrm_fast.shortcuts.features import COUNTED, MEASURES, measured, read_words, response_features, words_of

NOUNS = ("cat", "dog", "boat", "tree", "house", "lamp", "road", "cloud")


def group(*responses, prompt="What is this?", record=0):
    return Group("f:1", record, None, prompt, None, (), responses, Pairs.of((0, 1)))


def show(rows, total=None):
    return rows


def preferences(number, strength, seed=0, *, responses=2):
    """Records of two or three responses that say anything; the preferred one says "surely" as often as `strength`."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        texts = [" ".join(rng.choice(NOUNS, 4)) for _ in range(responses)]
        carrier = 0 if rng.random() < strength else int(rng.integers(1, responses))
        texts[carrier] += " surely"
        record = {"prompt": f"What is number {seed} {i // 2}?", "img_path": f"{i // 2}.png"}
        if responses == 2:
            yield record | {"chosen": texts[0], "rejected": texts[1]}
        else:
            ratings = [{"Quality": {"Rating": str(5 - place)}} for place in range(responses)]
            yield record | {"completions": {"annotations": ratings, "response": texts}}


def margins_of(path, *, seed=0, order=None, limit=10**8):
    """Cross-fitted margins by (record, chosen, rejected)."""
    records = Records(path)
    features, numbers = NgramFeatures(records, limit), np.arange(len(records)) if order is None else order
    fitted = crossfit.fit(features, numbers, seed=seed, ranks=Ranks(), progress=show).fitted
    parts = crossfit.margins(features, fitted, numbers, seed=seed, ranks=Ranks(), progress=show)
    rows = {
        tuple(pair): margin
        for part in parts
        for pair, margin in zip(*(column.tolist() for column in part), strict=True)
    }
    return rows, fitted


def judged(rows):
    return accuracy(np.array(list(rows.values())))


# features


def test_a_feature_is_a_word_two_in_a_row_or_a_word_with_how_the_prompt_begins():
    one, other = group("red cat", "cat red"), group("red cat", prompt="Where is it?")
    rows = response_features([one, other]).toarray() > 0
    words, twos = read_words([one]).ones()[1], read_words([one]).twos()[1]
    assert rows[:, words[:2]].all() and set(words[:2]) == set(words[2:])
    assert [row[twos[0]] for row in rows] == [True, False, True]
    assert (rows[0] != rows[2]).sum() >= 4  # crossed: two words, and measures


def test_how_a_prompt_begins_is_what_is_asked_last_without_images():
    turns = (Message("user", "Hello there"), Message("assistant", "Hi"), Message("user", "<image>\nWhat is this?"))
    one, other = (read_words([group("a", prompt=prompt)]).start_R for prompt in (turns, "What is that?"))
    assert one == other


def test_measures_count_form_and_overlap():
    text = "Sorry, as an AI I cannot.\n- a **bold** `cat`\n# Perhaps"
    row = dict(zip(MEASURES, measured([group(text, prompt="A cat")], [words_of(text)])[0], strict=True))
    counts = {name: round(float(np.expm1(row[name]))) for name in COUNTED}
    assert (counts["words"], counts["list items"], counts["headings"], counts["bold"], counts["code"]) == (
        10,
        1,
        1,
        2,
        2,
    )
    assert (counts["refusals"], counts["hedges"], counts["commas"], counts["line breaks"]) == (2, 1, 1, 2)
    assert row["share of the prompt in it"] == 1.0 and row["share of it from the prompt"] == pytest.approx(0.2)


def test_a_chinese_character_is_a_word():
    assert words_of("图中有 two Äpfel") == ["图", "中", "有", "two", "äpfel"]


# folds and sample


def test_folds_are_even_and_a_level_more_halves_the_records():
    keys = np.arange(1, 20001, dtype=np.uint64)
    assert all(abs(count - 4000) < 300 for count in Counter(fold_of(keys, 0).tolist()).values())
    assert not (fold_of(keys, 0) == fold_of(keys, 1)).all()
    assert [(level_of(keys, 0) >= level).mean() for level in (0, 1, 2)] == pytest.approx([1, 0.5, 0.25], abs=0.02)


def test_the_cue_is_found_and_margins_are_calibrated(write_jsonl):
    rows, fitted = margins_of(write_jsonl(preferences(600, 0.9)))
    assert judged(rows) == pytest.approx(0.9, abs=0.035)
    bayes = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert fitted.log_loss == pytest.approx(bayes, abs=0.06)


def test_margins_of_a_record_agree_with_each_other(write_jsonl):
    rows, _ = margins_of(write_jsonl(preferences(60, 0.9, responses=3)))
    assert len(rows) == 3 * 60
    for record in range(60):
        assert rows[record, 0, 1] + rows[record, 1, 2] == pytest.approx(rows[record, 0, 2], abs=1e-5)


def test_neither_the_order_of_records_nor_threads_change_a_bit(write_jsonl):
    path = write_jsonl(preferences(300, 0.8))
    rows, _ = margins_of(path)
    assert margins_of(path, order=np.random.default_rng(0).permutation(300))[0] == rows
    assert margins_of(path, seed=1)[0] != rows


def test_what_is_fitted_on_is_bounded_and_every_pair_has_a_margin(write_jsonl):
    path = write_jsonl(preferences(600, 0.9))
    rows, fitted = margins_of(path, limit=60_000)
    assert len(rows) == 600 and 50 < len(fitted.margins_P) < 400
    assert judged(rows) == pytest.approx(0.9, abs=0.04)
    assert margins_of(path, limit=60_000, order=np.arange(600)[::-1])[0] == rows


@pytest.mark.parametrize("number", [1, 2, 7])
def test_a_handful_of_records_has_margins_too(write_jsonl, number):
    rows, _ = margins_of(write_jsonl(preferences(number, 1.0)))
    assert len(rows) == number and all(map(np.isfinite, rows.values()))


# no leak


@pytest.mark.parametrize("seed", range(3))
def test_with_labels_by_lot_accuracy_is_a_half_within_its_interval(write_jsonl, seed):
    rows, _ = margins_of(write_jsonl(preferences(600, 0.5, seed)), seed=seed)
    assert judged(rows) == pytest.approx(0.5, abs=2.6 * 0.5 / 600**0.5)


def test_duplicates_of_a_pair_are_in_one_fold_and_do_not_raise_the_accuracy(write_jsonl):
    """Every record thrice, each with words of its own that tell its label to whoever saw it, and a label by lot."""
    rng = np.random.default_rng(0)
    unique = [
        {
            "prompt": f"p{i}",
            "img_path": f"{i}.png",
            "chosen": f"word{2 * i + flip} a",
            "rejected": f"word{2 * i + 1 - flip} a",
        }
        for i, flip in enumerate(rng.integers(0, 2, 200).tolist())
    ]
    rows, _ = margins_of(write_jsonl([record for record in unique for _ in range(3)]))
    assert judged(rows) == pytest.approx(0.5, abs=2.6 * 0.5 / 200**0.5)
    renamed = [record | {"prompt": f"{record['prompt']} {copy}"} for record in unique for copy in range(3)]
    leaked, _ = margins_of(write_jsonl(renamed, "renamed.jsonl"))
    assert judged(leaked) > 0.9  # as it would be


def test_worker_processes_fit_the_same_regressions(write_jsonl, monkeypatch):
    path = write_jsonl(preferences(60, 0.9))
    here, _ = margins_of(path)
    monkeypatch.setattr(fit, "WORTH_WORKERS", 0)
    assert margins_of(path)[0] == here
