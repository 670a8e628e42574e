"""RewardBench's own figures: the first's sections, the second's subsets with its rule for prompts of many answers.

arXiv 2403.13787, arXiv 2506.01937 and the code that computes their leaderboards.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mmrm_fast.files import read_table

TABLES = read_table("benchmarks")
TIES = "Ties"  # the subset whose prompts have several right answers, beside twins that have one
KINDS = ("ref", "tied")  # what the ids there begin with: one right answer, several


@dataclass(frozen=True)
class Ranked:
    """The rewards of one item of RewardBench 2."""

    id: str
    subset: str
    right: np.ndarray
    wrong: np.ndarray

    @property
    def gap(self) -> float:
        """The worst right response over the best wrong one."""
        return float(self.right.min() - self.wrong.max())


def section_scores(groups: Mapping[str, Mapping]) -> dict[str, float]:
    """RewardBench: the sections that have items here, from their subsets' `pairs` and `accuracy`, and their mean."""
    sections = {}
    for section, subsets in TABLES["rewardbench_sections"].items():
        present = [name for name in subsets if name in groups]
        if present:
            weights = [TABLES["rewardbench_weights"].get(name, groups[name]["pairs"]) for name in present]
            sections[section] = float(np.average([groups[name]["accuracy"] for name in present], weights=weights))
    return with_mean(sections)


def subset_scores(items: Iterable[Ranked], *, ties_count: bool = True) -> dict[str, float]:
    """RewardBench 2: how often the right response comes first, `ties_score` of the subset `TIES`, and their mean.

    Args:
        ties_count: whether a right response that others tie with has its share of the place, else nothing.
    """
    subsets: dict[str, list[Ranked]] = {}
    for item in items:
        subsets.setdefault(item.subset, []).append(item)
    scores = {}
    for name, own in sorted(subsets.items()):
        if name == TIES:
            scores[f"{name}, weighted"] = ties_score(own)
        else:
            scores[f"{name}, first"] = float(np.mean([first_place(item, ties_count) for item in own]))
    return with_mean(scores)


def with_mean(scores: dict[str, float]) -> dict[str, float]:
    """Scores with their mean as `score`."""
    return scores | ({"score": float(np.mean(list(scores.values())))} if scores else {})


def first_place(item: Ranked, ties_count: bool) -> float:
    """The share of the first place that the right response has."""
    if item.gap:
        return float(item.gap > 0)
    return 1 / (1 + np.sum(item.wrong == item.right)) if ties_count else 0.0


def ties_score(items: Iterable[Ranked]) -> float:
    """0.3 of each kind's accuracy, and 0.2 each of where right answers lie closer together than they lie to wrong ones.

    A prompt is right if all right answers are above all wrong ones. The two shares are over prompts that are there in
    both kinds, the gap to wrong answers that of the tied prompt, then the smaller one of the two; a hundredth of
    tanh(gap / spread - 1) breaks ties between models. NaN where no prompt is there in both.
    """
    kinds: dict[str, dict[str, Ranked]] = {kind: {} for kind in KINDS}
    for item in items:
        kind, _, prompt = item.id.partition(":")
        kinds[kind][prompt] = item
    one, many = kinds.values()
    both = [prompt for prompt in many if prompt in one]
    if not both:
        return float("nan")
    spread = np.array([np.ptp(many[prompt].right) for prompt in both])
    tied = np.array([many[prompt].gap for prompt in both])
    least = np.minimum(tied, [one[prompt].gap for prompt in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    right = sum(np.mean([item.gap > 0 for item in own.values()]) for own in (one, many))
    return float(0.3 * right + 0.2 * np.mean(tied > spread) + 0.2 * np.mean(least > spread) + 0.01 * margin.mean())
