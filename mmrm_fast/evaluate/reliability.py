"""How far accuracy and rewards can be trusted: calibration, confidence intervals, text-only rules, repeatability.

A margin is the reward of the preferred response minus that of the other; sigmoid(margin) is the probability that
Bradley-Terry gives to the label.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit
from scipy.stats import spearmanr

from mmrm_fast.pairs import accuracy, credit
from mmrm_fast.shortcuts.fit import best_temperature, log_loss

BINS = 10
RESAMPLES = 1000
RESAMPLED_AT_ONCE = 50
LENGTH_EDGES = (-0.5, -0.1, 0.1, 0.5)  # of the difference over the longer one
LENGTH_BUCKETS = ("much shorter", "shorter", "about equal", "longer", "much longer")


def calibration(margins: np.ndarray) -> dict:
    """ECE, Brier score and log-loss of sigmoid(margin), and the bins of the reliability plot.

    The confidence of a pair is sigmoid(|margin|), at least a half, and it is right by `credit`. ECE is the mean over
    pairs of |accuracy - confidence| of their bin, of `BINS` equal ones between 0.5 and 1. Brier is the mean of
    (1 - sigmoid(margin))^2, log-loss that of -log sigmoid(margin); `temperature` is what the margins must be divided
    by for the least log-loss (over 1: overconfident), `log_loss_at_temperature` that loss.
    """
    confidence, right = expit(np.abs(margins)), credit(margins)
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    filled = np.maximum(counts, 1)
    mean_confidence = np.bincount(place, confidence, BINS) / filled
    mean_right = np.bincount(place, right, BINS) / filled
    temperature = best_temperature(margins)
    return {
        "ece": float(np.sum(counts * np.abs(mean_right - mean_confidence)) / len(margins)),
        "brier": float(np.mean((1 - expit(margins)) ** 2)),
        "log_loss": log_loss(margins),
        "temperature": temperature,
        "log_loss_at_temperature": log_loss(margins / temperature),
        "bins": [
            {"low": 0.5 + i / (2 * BINS), "pairs": int(counts[i]), "confidence": float(c), "accuracy": float(a)}
            for i, (c, a) in enumerate(zip(mean_confidence, mean_right, strict=True))
            if counts[i]
        ],
    }


def bootstrap(
    credits: np.ndarray, records: Sequence, groups: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of each group's accuracy, of all pairs' (`overall`) and of the groups' mean (`macro`).

    Whole records are drawn with replacement, since the pairs of a record are not independent. All arguments are [P].
    """
    names, group_P = np.unique(groups, return_inverse=True)
    _, record_P = np.unique(records, return_inverse=True)
    num_records = record_P.max() + 1
    rights_RG, counts_RG = np.zeros((2, num_records, len(names)))
    np.add.at(rights_RG, (record_P, group_P), credits)
    np.add.at(counts_RG, (record_P, group_P), 1.0)
    rng, draws = np.random.default_rng(seed), []
    for _ in range(0, resamples, RESAMPLED_AT_ONCE):
        times_BR = rng.multinomial(num_records, np.full(num_records, 1 / num_records), RESAMPLED_AT_ONCE)
        rights_BG, counts_BG = times_BR @ rights_RG, times_BR @ counts_RG
        with np.errstate(invalid="ignore"):
            by_group = rights_BG / counts_BG  # NaN where a small group was not drawn
        overall = rights_BG.sum(1) / counts_BG.sum(1)
        draws.append(np.column_stack([by_group, overall, np.nanmean(by_group, axis=1)]))
    low, high = np.nanpercentile(np.concatenate(draws), [2.5, 97.5], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip([*names, "overall", "macro"], low, high, strict=True)}


def mean_interval(values: np.ndarray) -> np.ndarray:
    """95 % percentile interval [2, ...] of the mean over records, from values [records, ...] drawn with replacement."""
    number = len(values)
    times = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), 2 * RESAMPLES)
    return np.percentile(times @ values / number, [2.5, 97.5], axis=0)


def text_controls(margins: np.ndarray, chosen: Sequence[str], rejected: Sequence[str]) -> dict:
    """What length and format alone explain.

    Args:
        margins: [P] float.
        chosen, rejected: [P] texts of the preferred and the other response.

    Returns:
        rules: accuracy of rules that look at nothing else; a model has to beat them. buckets: pairs and accuracy of
        the model by how much longer the preferred response is, in characters. correlation: of margin with the
        difference in characters and in format marks, over pairs in both orders, so that it is 0 for a reward that
        ignores them and does not depend on which response is named first.
    """
    size, marks = (
        np.array([list(map(of, texts)) for texts in (chosen, rejected)], float) for of in (len, format_marks)
    )
    longer, marked = size[0] - size[1], marks[0] - marks[1]
    bucket = np.digitize(longer / np.maximum(size.max(0), 1), LENGTH_EDGES)
    both_ways = np.concatenate([margins, -margins])
    return {
        "rules": {
            "longer wins": accuracy(longer),
            "shorter wins": accuracy(-longer),
            "more formatting wins": accuracy(marked),
        },
        "buckets": {
            name: {"pairs": int(np.sum(bucket == i)), "accuracy": accuracy(margins[bucket == i])}
            for i, name in enumerate(LENGTH_BUCKETS)
        },
        "correlation": {
            name: rank_correlation(both_ways, np.concatenate([differences, -differences]))
            for name, differences in (("length", longer), ("format", marked))
        },
    }


def format_marks(text: str) -> int:
    """Marks of Markdown structure: line breaks, bold, headings, list items, code."""
    lines = text.splitlines()
    starts = sum(line.lstrip().startswith(("#", "- ", "* ", "1.", "|")) for line in lines)
    return max(len(lines) - 1, 0) + starts + text.count("**") + text.count("`")


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation; NaN where one of the two never changes."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)
