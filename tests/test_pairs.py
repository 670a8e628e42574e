"""Figures of a test set, each by hand on a small table."""

import math

import numpy as np
import pytest

from mmrm_fast.data.types import Group, Pair, Pairs
from mmrm_fast.pairs import (
    PairRow,
    accuracy,
    pair_rows,
    read_rows,
    shortcut_failure_degradation,
    summarize,
    write_rows,
)  # fmt: skip

NAN = math.nan


def row(margin, proxy_margin=None, truth=None):
    return PairRow(0, "file.jsonl:1", 0, 1, margin, proxy_margin, truth)


@pytest.mark.parametrize(
    ("margins", "share"),
    [([1, 2], 1), ([-1, -2], 0), ([1, -1, 1, 1], 0.75), ([0], 0.5), ([0, 1], 0.75), ([0, -1], 0.25), ([], NAN)],
)
def test_accuracy_counts_a_tie_as_half(margins, share):
    assert accuracy(np.array(margins)) == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize(
    ("margins", "proxy_margins", "sfd"),
    [
        ([1, 1, -1, -1], [1, 1, -1, -1], 1),  # right exactly where the proxy is
        ([1, 1, 1, 1], [1, 1, -1, -1], 0),
        ([-1, -1, 1, 1], [1, 1, -1, -1], -1),
        ([1, 1, 1, -1, 1, -1, -1, 0], [1, 1, 2, 3, -1, -1, -2, -3], 0.75 - 0.375),
        ([1, -1, 1], [1, -1, 0], 1),  # a tie of the proxy is on neither side
        ([1, -1], [1, 1], NAN),
        ([1, -1], [-1, -1], NAN),
    ],
)
def test_sfd_is_accuracy_where_the_proxy_is_right_minus_where_it_is_wrong(margins, proxy_margins, sfd):
    value = shortcut_failure_degradation(np.array(margins), np.array(proxy_margins))
    assert value == pytest.approx(sfd, nan_ok=True)


# summarize


def test_without_proxy_and_truth_there_is_accuracy_alone():
    assert summarize([row(1.0), row(-1.0), row(0.0), row(2.0)]) == {"pairs": 4, "accuracy": 0.625}


def test_with_a_proxy_sfd_is_against_the_labels():
    figures = summarize([row(1.0, 1.0), row(1.0, 2.0), row(-1.0, 1.0), row(-1.0, -1.0)])
    assert figures == {
        "pairs": 4,
        "accuracy": 0.5,
        "proxy_accuracy": 0.75,
        "proxy_truth_accuracy": 0.75,
        "sfd": pytest.approx(2 / 3),
    }


def test_truth_turns_wrong_labels_around():
    figures = summarize([row(1.0, truth=2.0), row(1.0, truth=-1.0), row(-1.0, truth=-3.0)])
    assert figures == {"pairs": 3, "accuracy": pytest.approx(2 / 3), "truth_accuracy": pytest.approx(2 / 3)}


def test_pairs_of_equal_truth_are_judged_by_labels_only():
    figures = summarize([row(1.0, truth=1.0), row(-1.0, truth=0.0)])
    assert figures == {"pairs": 2, "accuracy": 0.5, "truth_accuracy": 1.0}


def test_with_truth_and_proxy_sfd_is_against_the_truth():
    rows = [
        row(1.0, 1.0, truth=1.0),  # both right
        row(1.0, 1.0, truth=-1.0),  # both wrong, though both agree with the label
        row(-1.0, 1.0, truth=-1.0),  # the model right, the proxy wrong
        row(2.0, -1.0, truth=0.0),  # not judged
    ]
    assert summarize(rows) == {
        "pairs": 4,
        "accuracy": 0.75,
        "truth_accuracy": pytest.approx(2 / 3),
        "proxy_accuracy": 0.75,
        "proxy_truth_accuracy": pytest.approx(1 / 3),
        "sfd": 1.0 - 0.5,
    }


def test_truth_of_some_pairs_only_is_not_used():
    assert "truth_accuracy" not in summarize([row(1.0, truth=1.0), row(1.0)])


def test_no_rows_have_no_accuracy():
    figures = summarize([])
    assert figures["pairs"] == 0
    assert math.isnan(figures["accuracy"])


# rows


def group(*pairs, truth=None):
    return Group("file.jsonl:4", 3, None, "p", None, (), ("a", "b", "c"), Pairs.of(*pairs), truth)


def test_a_row_holds_the_margins_of_its_pair():
    rows = list(pair_rows(group(Pair(2, 0), Pair(0, 1), truth=(5.0, 1.0, 2.0)), [1.0, 2.0, 4.0], [-0.5, 0.25]))
    assert rows == [
        PairRow(3, "file.jsonl:4", 2, 0, 3.0, -0.5, -3.0, 4.0),
        PairRow(3, "file.jsonl:4", 0, 1, -1.0, 0.25, 4.0, 1.0),
    ]


def test_without_proxy_and_truth_their_columns_are_empty():
    (only,) = pair_rows(group(Pair(0, 1)), [1.0, 2.0, 4.0], None)
    assert (only.proxy_margin, only.truth) == (None, None)


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [row(1.0), row(-0.1, 0.30000000000000004, 2.0)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
