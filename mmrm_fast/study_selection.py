"""Best of N in a study on shapes: the true quality of what its models select away from their training.

Sets of candidates have the cues of another environment's i.i.d. test (`ood`), or those of the own environment's test
in which the cue points the wrong way (`reversed`). All models select among the same candidates.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmrm_fast.best_of_n import ORACLE, curve, read_values, selected_quality
from mmrm_fast.candidates import make_candidates
from mmrm_fast.records import RecordFile, iter_groups
from mmrm_fast.scorer import Scorer
from mmrm_fast.shapes import ENVIRONMENTS
from mmrm_fast.study_figures import Cell, compare, pairs_of

SIZES = (1, 2, 4, 8, 16, 32, 64)
NUM_PROMPTS = 100  # of a set
RECORDS_AT_ONCE = 8  # scored in one call
SPLITS = {"ood": "iid", "reversed": "reversed"}  # kinds of sets, and the split whose cues their candidates have


def selection_figures(cells: Sequence[Cell], root: Path) -> dict:
    """What study.json holds of best-of-N: by model and set, and by kind of set curves over N and paired comparisons."""
    names = dict.fromkeys(name for cell in cells for name in sets_of(cell))
    truths = {name: read_values(candidates(root, *name), "truth") for name in names}
    missing = [(cell, name) for cell in cells for name in sets_of(cell) if not scores_file(root, cell, name).exists()]
    with tqdm(total=len(missing), desc="best of N", unit=" sets", disable=not missing) as bar:
        for cell in dict.fromkeys(cell for cell, _ in missing):
            bar.update(score_cell(cell, [name for other, name in missing if other == cell], root))
    selected = {
        (cell, name): selected_quality(read_values(scores_file(root, cell, name), "score"), truths[name], SIZES)
        for cell in cells
        for name in sets_of(cell)
    }
    rows = [
        {**vars(cell), "kind": kind, "cues": cues, **dict(zip(map(str, SIZES), values.mean(0).tolist(), strict=True))}
        for (cell, (kind, cues)), values in selected.items()
    ]
    return {"sizes": SIZES, "models": rows, **{kind: kind_figures(kind, selected, truths) for kind in SPLITS}}


def kind_figures(kind: str, selected: dict, truths: dict) -> dict:
    """Curves by method over the sets of a kind, mean over models, and every comparison at the largest N."""
    methods = list(dict.fromkeys(cell.method for cell, _ in selected))
    curves, last = {}, {}
    for method in methods:
        own = {key: values for key, values in selected.items() if key[0].method == method and key[1][0] == kind}
        prompts: dict[tuple, list[np.ndarray]] = {}
        for (_, name), values in own.items():
            for prompt, qualities in enumerate(values):
                prompts.setdefault((*name, prompt), []).append(qualities)
        seeds = sorted({cell.seed for cell, _ in own})
        by_seed = [np.mean([v.mean(0) for (cell, _), v in own.items() if cell.seed == seed], axis=0) for seed in seeds]
        spreads = np.std(by_seed, axis=0).tolist() if len(seeds) > 1 else [None] * len(SIZES)
        rows = curve(np.array([np.mean(values, axis=0) for values in prompts.values()]), SIZES)
        curves[method] = [row | {"spread": spread} for row, spread in zip(rows, spreads, strict=True)]
        last[method] = {prompt: [float(v[-1]) for v in values] for prompt, values in prompts.items()}
    known = [selected_quality(truth, truth, SIZES) for name, truth in truths.items() if name[0] == kind]
    curves[ORACLE] = curve(np.concatenate(known), SIZES)
    return {"curves": curves, "comparisons": compare(pairs_of(methods), last)}


def sets_of(cell: Cell) -> list[tuple[str, str]]:
    """The (kind, environment) of the sets that a model selects from."""
    others = [("ood", name) for name in ENVIRONMENTS if name != cell.environment]
    return [*others, ("reversed", cell.environment)]


def candidates(root: Path, kind: str, environment: str) -> Path:
    """The file of a set, written where it does not exist."""
    file = root / "candidates" / f"{kind}-{environment}" / "candidates.jsonl"
    if not file.exists():
        make_candidates(file.parent, environment, SPLITS[kind], num_prompts=NUM_PROMPTS, num_responses=max(SIZES))
    return file


def scores_file(root: Path, cell: Cell, name: tuple[str, str]) -> Path:
    """A model's scores of a set, a line a prompt; `mmrm-fast best-of-n` reads it."""
    return cell.folder(root) / f"scores-{'-'.join(name)}.jsonl"


def score_cell(cell: Cell, names: Sequence[tuple[str, str]], root: Path) -> int:
    """Score sets with one model; each file appears complete or not at all. Returns how many."""
    scorer = Scorer.from_pretrained(cell.folder(root) / "final")
    for name in names:
        file = scores_file(root, cell, name)
        aside = file.with_suffix(".part")
        aside.write_text("".join(json.dumps({"score": rewards}) + "\n" for rewards in score_set(scorer, root, name)))
        aside.rename(file)
    return len(names)


def score_set(scorer: Scorer, root: Path, name: tuple[str, str]) -> Iterator[list[float]]:
    """The rewards of every prompt's candidates."""
    groups = iter_groups(RecordFile(candidates(root, *name)))
    while chunk := list(islice(groups, RECORDS_AT_ONCE)):
        for scored in scorer.score_groups(chunk):
            yield list(scored.rewards)
