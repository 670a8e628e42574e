"""Calibration, intervals and controls, each by hand or against a known truth."""

import math

import numpy as np
import pytest
from scipy.special import expit, logit

from mmrm_fast.evaluate import reliability


def test_calibration_of_one_bin_is_by_hand():
    margins = logit(np.array([0.8, 0.8, 0.8, 0.2]))  # 80 % sure four times, right three times
    figures = reliability.calibration(margins)
    assert figures["ece"] == pytest.approx(0.05)
    assert figures["brier"] == pytest.approx((3 * 0.2**2 + 0.8**2) / 4)
    assert figures["log_loss"] == pytest.approx(-(3 * math.log(0.8) + math.log(0.2)) / 4)
    assert figures["bins"] == [
        {"low": 0.8, "pairs": 4, "confidence": pytest.approx(0.8), "accuracy": pytest.approx(0.75)}
    ]


def test_a_calibrated_reward_has_no_error_and_temperature_one():
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 2, 200_000))
    margins = np.where(rng.random(size.shape) < expit(size), size, -size)
    figures = reliability.calibration(margins)
    assert figures["ece"] < 0.005
    assert figures["temperature"] == pytest.approx(1, abs=0.02)
    assert reliability.calibration(3 * margins)["temperature"] == pytest.approx(3, abs=0.06)


def test_a_tie_is_half_right_at_no_confidence():
    assert reliability.calibration(np.zeros(3))["bins"] == [
        {"low": 0.5, "pairs": 3, "confidence": 0.5, "accuracy": 0.5}
    ]


def test_an_interval_covers_the_true_accuracy_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for seed in range(200):
        right = (rng.random(150) < 0.7).astype(float)
        low, high = reliability.bootstrap(right, range(150), ["all"] * 150, resamples=400, seed=seed)["overall"]
        covered += low <= 0.7 <= high
    assert covered / 200 == pytest.approx(0.95, abs=0.04)


def test_pairs_of_one_record_do_not_narrow_the_interval():
    right = np.repeat([1.0, 0.0] * 25, 6)
    widths = [
        np.subtract(*reliability.bootstrap(right, records, ["all"] * 300)["overall"])
        for records in (range(300), np.repeat(range(50), 6))
    ]
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(6), rel=0.2)


def test_macro_weighs_groups_equally():
    right, groups = np.array([1.0] * 90 + [0.0] * 10), ["a"] * 90 + ["b"] * 10
    intervals = reliability.bootstrap(right, range(100), groups)
    assert intervals["macro"] == (0.5, 0.5) == tuple(np.mean([intervals["a"], intervals["b"]], axis=0))
    assert intervals["overall"][0] < 0.9 < intervals["overall"][1]


def test_text_rules_and_buckets_are_by_hand():
    chosen, rejected = ["aaaa", "aa", "aaa", "**a**\nb"], ["a", "aaaa", "aaa", "abcdefgh"]
    figures = reliability.text_controls(np.array([1.0, -1.0, 2.0, 3.0]), chosen, rejected)
    assert figures["rules"] == {"longer wins": 0.375, "shorter wins": 0.625, "more formatting wins": 0.625}
    pairs = {name: bucket["pairs"] for name, bucket in figures["buckets"].items()}
    assert pairs == {"much shorter": 0, "shorter": 2, "about equal": 1, "longer": 0, "much longer": 1}
    assert figures["buckets"]["shorter"]["accuracy"] == 0.5
    assert figures["buckets"]["about equal"]["accuracy"] == 1


def test_correlation_does_not_depend_on_which_response_is_named_first():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, (2, 400))
    margins = (lengths[0] - lengths[1]) + rng.normal(0, 5, 400)
    flip = np.where(rng.random(400) < 0.5, 1, -1)
    texts = np.where(flip > 0, lengths, lengths[::-1])
    straight, flipped = (
        reliability.text_controls(m, ["a" * n for n in t[0]], ["a" * n for n in t[1]])["correlation"]["length"]
        for m, t in ((margins, lengths), (margins * flip, texts))
    )
    assert straight == pytest.approx(flipped)
    assert straight > 0.9
