"""`mmrm-fast audit FILE ...`: what text alone can tell of preferences, as a page, as JSON and printed.

Shapes: P pairs, M measures, K folds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmrm_fast.data.records import Records
from mmrm_fast.data.types import RecordError
from mmrm_fast.evaluate.audit_config import AuditConfig
from mmrm_fast.evaluate.audit_page import advice, print_audit, write_audit
from mmrm_fast.evaluate.report import text_of
from mmrm_fast.files import write_json
from mmrm_fast.pairs import credit, named_sets, pair_weights
from mmrm_fast.shortcuts import crossfit
from mmrm_fast.shortcuts.calibration import log_loss
from mmrm_fast.shortcuts.crossfit import Chunk, Ranks, level_of
from mmrm_fast.shortcuts.cues import Cue, Rule, Sample, find_cues
from mmrm_fast.shortcuts.features import GROUPS, MEASURES
from mmrm_fast.shortcuts.fit import FOLDS, Fitted
from mmrm_fast.shortcuts.health import Seen, own_health, shared
from mmrm_fast.shortcuts.ngrams import NgramFeatures

SAMPLED = 10_000  # pairs that cues are looked for in
SHOWN_PAIRS = 5
CONFIDENT = float(np.log(19))  # a margin at which text gives a label 95 %
LENGTH = MEASURES.index("characters")
FLIP = 0.1  # advantage that a cue has to have in both of two files to flip between them


def audit(config: AuditConfig) -> None:
    """Write audit.json and audit.html, print what is in them."""
    files = dict(zip(names_of(config.data), config.data, strict=True))
    tests = {own.name: own.path for own in named_sets(config.eval, "iid")}
    if taken := files.keys() & tests.keys():
        raise ValueError(f"--eval {taken.pop()}: the name of a file")
    features = {name: NgramFeatures(open_file(config, path)) for name, path in {**files, **tests}.items()}
    options = {"seed": config.seed, "ranks": Ranks()}
    fitted = {
        name: crossfit.fit(features[name], numbers(features[name]), progress=bar(f"{name}: fitting"), **options).fitted
        for name in files
    }
    looks = {
        name: look(own, fitted, name, config.seed, bar(f"{name}: reading {len(own.records):,} records"))
        for name, own in features.items()
    }
    results = figures(looks, list(files), list(tests))
    results["advice"] = advice(results)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.output_dir / "audit.json", results)
    write_audit(config.output_dir / "audit.html", results)
    print_audit(results, config.output_dir)


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name a file: its stem, the folder before it where that is another's too. Raises `ValueError`."""
    if not paths:
        raise ValueError("give preference files, such as train.jsonl")
    stems = [path.name.split(".")[0] for path in paths]
    if len(set(stems)) < len(stems):
        stems = [f"{path.resolve().parent.name}/{stem}" for path, stem in zip(paths, stems, strict=True)]
    if len(set(stems)) < len(stems):
        raise ValueError(f"{', '.join(map(str, paths))}: a file is given twice, or two have one name")
    return stems


def open_file(config: AuditConfig, path: Path) -> Records:
    """The preferences of a file, of which there must be some."""
    records = Records(path, image_root=config.image_root, ignored=config.ignore_fields, need_pairs=True)
    if not len(records):
        raise ValueError(f"{path}: no records")
    return records


def numbers(features: NgramFeatures) -> np.ndarray:
    """All of a file's records."""
    return np.arange(len(features.records))


def bar(description: str) -> partial:
    """A progress bar over a file's chunks."""
    return partial(tqdm, desc=description, unit=" chunks", delay=1, leave=False)


@dataclass
class Look:
    """What one reading of a file finds; of its pairs a few numbers each stay, of its texts a sample."""

    chunks: list[Chunk] = field(default_factory=list)  # sampled
    level: int = 0
    sampled: int = 0  # pairs
    num_records: int = 0
    errors: list[RecordError] = field(default_factory=list)
    margins: dict[str, list[np.ndarray]] = field(default_factory=dict)  # by the file that was fitted on
    lengths: list[np.ndarray] = field(default_factory=list)  # signs of the difference in characters
    keys: list[np.ndarray] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    wins_M2: np.ndarray = field(default_factory=lambda: np.zeros((len(MEASURES), 2), np.int64))
    surest: dict[str, list[tuple[float, dict]]] = field(default_factory=lambda: {"right": [], "wrong": []})

    def joined(self, name: str) -> np.ndarray:
        """The margins of all pairs by one file's regressions."""
        return np.concatenate(self.margins[name])

    def sample(self, chunk: Chunk, seed: int) -> None:
        """Keep some of the records, whatever order they come in."""
        self.chunks.append(chunk.only(level_of(chunk.key_N, seed) >= self.level))
        self.sampled += len(self.chunks[-1].place_P)
        while self.sampled > SAMPLED:
            self.level += 1
            self.chunks = [own.only(level_of(own.key_N, seed) >= self.level) for own in self.chunks]
            self.sampled = sum(len(own.place_P) for own in self.chunks)

    def measure(self, chunk: Chunk) -> None:
        """Count which side has more of what is measured."""
        values_RM = chunk.features_RF[:, : len(MEASURES)].toarray()
        signs_PM = np.sign(values_RM[chunk.ends_P2[:, 0]] - values_RM[chunk.ends_P2[:, 1]]).astype(np.int8)
        self.wins_M2 += np.stack([(signs_PM > 0).sum(axis=0), (signs_PM < 0).sum(axis=0)], axis=1)
        self.lengths.append(signs_PM[:, LENGTH])

    def keep_surest(self, chunk: Chunk, margin_P: np.ndarray) -> None:
        """Keep the pairs on which text is surest, right and wrong."""
        for kind, turned_P in (("right", margin_P), ("wrong", -margin_P)):
            for pair in np.argsort(-turned_P, kind="stable")[:SHOWN_PAIRS].tolist():
                if turned_P[pair] > 0:
                    self.surest[kind].append((float(turned_P[pair]), shown_pair(chunk, pair)))
            self.surest[kind] = sorted(self.surest[kind], key=lambda own: -own[0])[:SHOWN_PAIRS]


def shown_pair(chunk: Chunk, pair: int) -> dict:
    """The texts of a pair."""
    group, ends = chunk.groups[chunk.place_P[pair]], chunk.ends_P2[pair]
    texts = [response for own in chunk.groups for response in own.responses]
    return {"source": group.source, "prompt": text_of(group), "chosen": texts[ends[0]], "rejected": texts[ends[1]]}


def look(features: NgramFeatures, fitted: Mapping[str, Fitted], own: str, seed: int, progress: partial) -> Look:
    """Read a file once: margins of every file's regressions (its own cross-fitted), and what else is counted."""
    found = Look(margins={name: [] for name in fitted})
    weights = np.concatenate([fit.weights_FK for fit in fitted.values()], axis=1)
    for window in crossfit.windows(features, numbers(features), Ranks(), progress):
        for chunk in window:
            scores_RK = np.asarray(chunk.features_RF @ weights)
            differences_PK = scores_RK[chunk.ends_P2[:, 0]] - scores_RK[chunk.ends_P2[:, 1]]
            for place, name in enumerate(fitted):
                fold_P = crossfit.fold_of(chunk.key_N, seed)[chunk.place_P] if name == own else FOLDS
                columns = place * (FOLDS + 1) + fold_P
                found.margins[name].append(differences_PK[np.arange(len(differences_PK)), columns])
            found.num_records += len(chunk.groups)
            found.errors += chunk.errors
            found.keys.append(chunk.key_N[chunk.place_P])
            found.seen.append(Seen.of(chunk))
            found.measure(chunk)
            found.sample(chunk, seed)
            if own in fitted:
                found.keep_surest(chunk, found.margins[own][-1])
    return found


def figures(looks: Mapping[str, Look], files: Sequence[str], tests: Sequence[str]) -> dict:
    """Everything that audit.json holds but the advice."""
    samples = {name: Sample(own.chunks) for name, own in looks.items()}
    seen = {name: Seen.joined(own.seen) for name, own in looks.items()}
    return {
        "files": {name: file_figures(name, looks[name], samples, files, seen) for name in files},
        "tests": {name: {"records": looks[name].num_records, **health(looks[name], seen[name])} for name in tests},
        "matrix": {name: {on: scored(own, own.joined(name)) for on, own in looks.items()} for name in files},
        "shared": [
            {"of": one, "in": other, **shared(seen[one], seen[other])}
            for one in (*files, *tests)
            for other in files
            if one != other
        ],
    }


def file_figures(
    name: str, own: Look, samples: Mapping[str, Sample], files: Sequence[str], seen: Mapping[str, Seen]
) -> dict:
    """What is found of one file."""
    margins, length = own.joined(name), np.concatenate(own.lengths)
    shorter = length.sum(dtype=np.int64) < 0
    cues = find_cues(samples[name])
    return {
        "records": own.num_records,
        "pairs": len(margins),
        "problems": len(own.errors),
        "first_problem": str(own.errors[0]) if own.errors else None,
        "proxies": {
            f"length alone ({'shorter' if shorter else 'longer'} wins)": scored(own, -length if shorter else length),
            "words and form": scored(own, margins) | {"log_loss": log_loss(margins)},
        },
        "cues": [cue.row() | {"elsewhere": elsewhere(cue, samples, files, name)} for cue in cues],
        "groups": dict(group_rows(own)),
        "surest": {kind: [{"margin": margin, **pair} for margin, pair in own.surest[kind]] for kind in own.surest},
        "health": health(own, seen[name]) | {"likely wrong": int((margins < -CONFIDENT).sum())},
        "listened_to": {mode: effective(pair_weights(np.zeros(1), margins, mode)) for mode in ("paper", "balanced")},
    }


def health(own: Look, seen: Seen) -> dict[str, int]:
    """Problems of labels that are seen in one file alone."""
    return {"unreadable": len(own.errors), **own_health(seen)}


def scored(own: Look, margins: np.ndarray) -> dict[str, float]:
    """Accuracy with its 95 % interval; records of one image and prompt count as one draw."""
    credits = credit(margins)
    _, cluster_P = np.unique(np.concatenate(own.keys), return_inverse=True)
    mean = float(credits.mean())
    error = 1.96 * float(np.sqrt((np.bincount(cluster_P, credits - mean) ** 2).sum())) / len(credits)
    return {"accuracy": mean, "low": max(0.0, mean - error), "high": min(1.0, mean + error)}


def effective(weights: np.ndarray) -> float:
    """The share of equally weighted pairs that would say as much: (sum w)^2 / (n sum w^2)."""
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


def elsewhere(cue: Cue, samples: Mapping[str, Sample], files: Sequence[str], own: str) -> dict[str, dict]:
    """How the same rule, turned as here, does in the other files, and whether it flips."""
    return {name: told(cue.rule, cue.direction, samples[name], cue.advantage) for name in files if name != own}


def told(rule: Rule, direction: int, sample: Sample, here: float) -> dict:
    """Coverage and accuracy of a rule on a sample; it flips where it is as clear the other way round."""
    sign_P = direction * rule.signs(sample)
    coverage, right = float((sign_P != 0).mean()), float((sign_P > 0).mean())
    accuracy = right / coverage if coverage else None
    return {"coverage": coverage, "accuracy": accuracy, "flips": here > FLIP and 2 * right - coverage < -FLIP}


def group_rows(own: Look) -> Iterator[tuple[str, list[dict]]]:
    """By named group: its measures, how many pairs they tell, and how often the preferred response has more."""
    pairs = sum(map(len, own.lengths))
    for group, names in GROUPS.items():
        rows = []
        for name in names:
            more, less = own.wins_M2[MEASURES.index(name)].tolist()
            share = more / (more + less) if more + less else None
            rows.append({"measure": name, "coverage": (more + less) / pairs, "preferred_has_more": share})
        yield group, rows
