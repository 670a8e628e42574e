"""Best of N in a study on shapes: the true quality of what its models select away from their training.

Sets of candidates have the cues of another environment's i.i.d. test (`ood`), or those of the own environment's test
in which the cue points the wrong way (`reversed`). All models select among the same candidates.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmrm_fast.data.records import Records, iter_groups
from mmrm_fast.data.shapes import ENVIRONMENTS
from mmrm_fast.evaluate.best_of_n import curve, read_values, selected_quality
from mmrm_fast.evaluate.plots import ORACLE
from mmrm_fast.files import write_json_lines
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.study.candidates import make_candidates
from mmrm_fast.study.figures import Cell, compare, pairs_of

SIZES = (1, 2, 4, 8, 16, 32, 64)
NUM_PROMPTS = 100  # of a set
RECORDS_AT_ONCE = 8  # scored in one call
Task = tuple[Cell, tuple[str, str]]  # a model and the kind and environment of a set
Selected = Mapping[Task, np.ndarray]  # [prompts, sizes] expected quality
SPLITS = {"ood": "iid", "reversed": "reversed"}  # kinds of sets, and the split whose cues their candidates have


def selection_figures(cells: Sequence[Cell], root: Path) -> dict:
    """What study.json holds of best-of-N: by model and set, and by kind of set curves over N and paired comparisons."""
    sets = {cell: [("ood", name) for name in ENVIRONMENTS if name != cell.environment] for cell in cells}
    tasks = [(cell, name) for cell, own in sets.items() for name in (*own, ("reversed", cell.environment))]
    truths = {name: read_values(candidates(root, *name), "truth") for name in dict.fromkeys(name for _, name in tasks)}
    score_missing([task for task in tasks if not scores_file(root, *task).exists()], root)
    selected = {
        (cell, name): selected_quality(read_values(scores_file(root, cell, name), "score"), truths[name], SIZES)
        for cell, name in tasks
    }
    rows = [
        {**vars(cell), "kind": kind, "cues": cues, **dict(zip(map(str, SIZES), values.mean(0).tolist(), strict=True))}
        for (cell, (kind, cues)), values in selected.items()
    ]
    return {"sizes": SIZES, "models": rows, **{kind: kind_figures(kind, selected, truths) for kind in SPLITS}}


def kind_figures(kind: str, selected: Selected, truths: Mapping) -> dict:
    """Curves by method over the sets of a kind, mean over models, and every comparison at the largest N."""
    methods, curves, last = list(dict.fromkeys(cell.method for cell, _ in selected)), {}, {}
    for method in methods:
        own = {task: v for task, v in selected.items() if (task[0].method, task[1][0]) == (method, kind)}
        sets = {name: [v for (_, other), v in own.items() if other == name] for _, name in own}
        quality = np.concatenate([np.mean(models, axis=0) for models in sets.values()])  # [prompts of all sets, sizes]
        spreads = seed_spread(own)
        curves[method] = [row | {"spread": own} for row, own in zip(curve(quality, SIZES), spreads, strict=True)]
        last[method] = dict(enumerate(quality[:, -1:]))
    known = [selected_quality(truth, truth, SIZES) for name, truth in truths.items() if name[0] == kind]
    curves[ORACLE] = curve(np.concatenate(known), SIZES)
    return {"curves": curves, "comparisons": compare(pairs_of(methods), last)}


def seed_spread(own: Selected) -> list[float | None]:
    """The deviation of the seeds' means for each size, None for one seed."""
    seeds = {cell.seed for cell, _ in own}
    means = [np.mean([v.mean(0) for (cell, _), v in own.items() if cell.seed == seed], axis=0) for seed in seeds]
    return np.std(means, axis=0).tolist() if len(seeds) > 1 else [None] * len(SIZES)


def candidates(root: Path, kind: str, environment: str) -> Path:
    """The file of a set, written where it does not exist."""
    file = root / "candidates" / f"{kind}-{environment}" / "candidates.jsonl"
    if not file.exists():
        make_candidates(file.parent, environment, SPLITS[kind], num_prompts=NUM_PROMPTS, num_responses=max(SIZES))
    return file


def scores_file(root: Path, cell: Cell, name: tuple[str, str]) -> Path:
    """A model's scores of a set, a line a prompt; `mmrm-fast best-of-n` reads it."""
    return cell.folder(root) / f"scores-{'-'.join(name)}.jsonl"


def score_missing(tasks: Sequence[Task], root: Path) -> None:
    """Score sets, each model loaded once; a file appears complete or not at all."""
    with tqdm(total=len(tasks), desc="best of N", unit=" sets", disable=not tasks) as bar:
        for cell, own in groupby(tasks, key=lambda task: task[0]):
            scorer = Scorer.from_pretrained(cell.folder(root) / "final")
            for _, name in own:
                groups = iter_groups(Records(candidates(root, *name)))
                rows = ({"score": scored.rewards} for scored in scorer.score_stream(groups, RECORDS_AT_ONCE))
                write_json_lines(scores_file(root, cell, name), rows)
                bar.update()
