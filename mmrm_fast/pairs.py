"""Accuracy of rewards on preference pairs, of the main model and of the text-only proxy, and what ties them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mmrm_fast.data.types import Group, RewardError
from mmrm_fast.files import json_lines, write_json_lines

FIGURES = ("accuracy", "truth_accuracy", "proxy_accuracy", "proxy_truth_accuracy", "sfd")


@dataclass(frozen=True)
class EvalSet:
    """A named test file: of the training distribution (`iid`), of another (`ood`), or a `probe` of a shortcut."""

    name: str
    kind: str
    path: Path


def named_sets(specs: tuple[str, ...], kind: str) -> list[EvalSet]:
    """Parse NAME=FILE."""
    sets = []
    for spec in specs:
        name, found, path = spec.partition("=")
        if not found or not name or not path:
            raise ValueError(f"{spec!r}: test sets are given as NAME=FILE")
        sets.append(EvalSet(name, kind, Path(path)))
    return sets


@dataclass(frozen=True)
class PairRow:
    """One evaluated pair: margins are r(chosen) - r(rejected)."""

    record: int  # position of its record in the file
    source: str  # file and line
    chosen: int  # by its place in the record
    rejected: int
    margin: float
    proxy_margin: float | None
    truth: float | None  # true quality of chosen minus that of rejected
    reward: float | None = None  # of chosen


def pair_rows(group: Group, rewards: list[float], proxy_margins: list[float] | None) -> Iterable[PairRow]:
    """The rows of one group, from the rewards of its responses and the proxy's margins of its pairs."""
    truth = group.truth
    for place, pair in enumerate(group.pairs):
        chosen, rejected = pair.chosen, pair.rejected
        yield PairRow(
            group.record,
            group.source,
            group.places[chosen],
            group.places[rejected],
            rewards[chosen] - rewards[rejected],
            None if proxy_margins is None else proxy_margins[place],
            None if truth is None else truth[chosen] - truth[rejected],
            rewards[chosen],
        )


def without_numbers(rows: Iterable[PairRow]) -> dict[PairRow, RewardError]:
    """The rows whose rewards are not all finite, and the error of each."""
    errors = {}
    for row in rows:
        for name, margin in (("reward", row.margin), ("reward of the proxy", row.proxy_margin or 0.0)):
            if not math.isfinite(margin):
                errors[row] = RewardError.of(row.source, f"responses {row.chosen} and {row.rejected}, {name}", margin)
    return errors


def credit(margins: np.ndarray, tie: float = 0.5) -> np.ndarray:
    """1 for a right pair, 0 for a wrong one, `tie` for a tie."""
    return (margins > 0) + tie * (margins == 0)


def accuracy(margins: np.ndarray, tie: float = 0.5) -> float:
    """Mean credit; NaN of none."""
    return float(np.mean(credit(margins, tie))) if len(margins) else float("nan")


def shortcut_failure_degradation(margins: np.ndarray, proxy_margins: np.ndarray) -> float:
    """SFD: accuracy where the text-only proxy is right minus accuracy where it is wrong (ties in neither).

    Our reading of Li et al., arXiv 2503.03122; NaN where the proxy is always right or always wrong.
    """
    return accuracy(margins[proxy_margins > 0]) - accuracy(margins[proxy_margins < 0])


def truth_sign(rows: Sequence[PairRow]) -> np.ndarray:
    """1 where the label is true, -1 where it is not, 0 where truth is a tie; 1 everywhere where truth is unknown."""
    if any(row.truth is None for row in rows):
        return np.ones(len(rows))
    return np.sign([row.truth for row in rows])


def summarize(rows: list[PairRow]) -> dict[str, float]:
    """The figures of one test set.

    `accuracy` is against the labels. Where the data knows the truth, `truth_accuracy` is against it. With a proxy,
    `proxy_accuracy` (labels), `proxy_truth_accuracy` and `sfd` (against the truth where known, else the labels).
    """
    margins = np.array([row.margin for row in rows])
    figures = {"pairs": len(rows), "accuracy": accuracy(margins)}
    sign = truth_sign(rows)
    judged = sign != 0
    if rows and all(row.truth is not None for row in rows):
        figures["truth_accuracy"] = accuracy((margins * sign)[judged])
    if rows and rows[0].proxy_margin is not None:
        proxy = np.array([row.proxy_margin for row in rows])
        figures["proxy_accuracy"] = accuracy(proxy)
        figures["proxy_truth_accuracy"] = accuracy((proxy * sign)[judged])
        figures["sfd"] = shortcut_failure_degradation((margins * sign)[judged], (proxy * sign)[judged])
    return figures


def reward_stats(rows: dict[str, list[PairRow]], kinds: dict[str, str]) -> dict:
    """Mean and spread of the rewards of evaluated pairs, by test set and over the i.i.d. ones (else all) together."""
    rewards = {name: [r for row in own for r in (row.reward, row.reward - row.margin)] for name, own in rows.items()}
    iid = [name for name in rewards if kinds[name] == "iid"]
    pooled = [reward for name in iid or rewards for reward in rewards[name]]
    return {**spread(pooled), "sets": {name: spread(own) for name, own in rewards.items()}}


def spread(rewards: list[float]) -> dict[str, float | None]:
    """Number, mean and standard deviation."""
    mean, std = (float(np.mean(rewards)), float(np.std(rewards))) if rewards else (None, None)
    return {"responses": len(rewards), "mean": mean, "std": std}


def write_rows(path: Path, rows: list[PairRow]) -> None:
    """Write evaluated pairs as JSON lines."""
    write_json_lines(path, map(asdict, rows))


def read_rows(path: Path) -> list[PairRow]:
    """Read what `write_rows` wrote."""
    return [PairRow(**row) for _, row in json_lines(path)]


def judged_accuracy(figures: dict) -> float:
    """Accuracy against the truth where the data knows it, else against the labels."""
    return figures.get("truth_accuracy", figures["accuracy"])
