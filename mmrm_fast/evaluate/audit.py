"""`mmrm-fast audit FILE ...`: what text alone can tell of preferences, as a page, as JSON and printed.

Shapes: P pairs, M measures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.data.pictures import ImageRoots
from mmrm_fast.data.records import Records
from mmrm_fast.data.samples import Preparer
from mmrm_fast.data.types import RecordError
from mmrm_fast.evaluate.audit_page import advice, print_audit, write_audit
from mmrm_fast.evaluate.config import AuditConfig
from mmrm_fast.evaluate.report import text_of
from mmrm_fast.files import write_json
from mmrm_fast.ops.pair_loss import pair_loss
from mmrm_fast.pairs import credit, named_sets
from mmrm_fast.shortcuts import crossfit
from mmrm_fast.shortcuts.chunks import NgramFeatures, StateFeatures, states_of
from mmrm_fast.shortcuts.crossfit import Chunk, Part, Ranks, level_of
from mmrm_fast.shortcuts.cues import Cue, Sample, find_cues
from mmrm_fast.shortcuts.features import GROUPS, MEASURES
from mmrm_fast.shortcuts.fit import Fitted, cross_fit
from mmrm_fast.shortcuts.health import Seen, own_health, shared

SEED = 0  # of folds and samples
SAMPLED = 10_000  # pairs that cues are looked for in
TOKENS = 16_384  # of a forward
LIMIT = 200_000_000  # bytes of features, of all files
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
    opened, looks = open_files(config, files | tests), {}
    for name, records in opened.items():
        looks[name] = found = Look()
        found.part = read(NgramFeatures(records, LIMIT // len(opened)), f"reading {name}", found.see)
        if not found.pairs:
            why = f"; the first problem: {found.errors[0]}" if found.errors else ""
            raise ValueError(f"{(files | tests)[name]}: no pair{why}")
    fits = fitted({name: looks[name].part for name in files})
    results = figures(looks, fits, list(tests))
    if config.model is not None:
        parts = dict(state_parts(config, opened))
        probes = fitted({name: parts[name] for name in files})
        results["probe_matrix"] = matrix(parts, probes)
        for name, fit in probes.items():
            results["files"][name]["proxies"]["probe"] = scored_fit(parts[name], fit)
    results["advice"] = [f"{name}: {line}" for name, lines in advice(results).items() for line in lines]
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.output_dir / "audit.json", results)
    write_audit(config.output_dir / "audit.html", results)
    print_audit(results, config.output_dir)


def read(features: NgramFeatures | StateFeatures, said: str, see: Callable[[Chunk], None]) -> Part:
    """The pairs of a file that are fitted on; `see` is shown all its chunks."""
    progress = partial(tqdm, desc=said, unit=" chunks", delay=1, leave=False)
    records = np.arange(len(features.records))
    return crossfit.sample(features, records, seed=SEED, ranks=Ranks(), progress=progress, see=see)[0]


def fitted(parts: Mapping[str, Part]) -> dict[str, Fitted]:
    """The regressions of each file."""
    files = tqdm(parts.items(), desc="fitting", unit=" files", delay=1, leave=False)
    return {name: cross_fit(part.differences_PF, part.fold_P) for name, part in files}


def state_parts(config: AuditConfig, files: Mapping[str, Records]) -> Iterator[tuple[str, Part]]:
    """By file, its pairs with the states of the language model over text alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = CheckpointFolder(config.model).load(dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    states = states_of(checkpoint.model.drop_vision().to(device).eval(), device)
    preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling)
    for name, records in files.items():
        features = StateFeatures(records, preparer, states, TOKENS)
        yield name, read(features, f"states of {name}", lambda chunk: None)


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


def open_files(config: AuditConfig, files: Mapping[str, Path]) -> dict[str, Records]:
    """The preferences of files by name."""
    roots = ImageRoots.parse(config.image_root)
    options = {"image_root": roots, "ignored": config.ignore_fields, "need_pairs": True}
    opened = {name: Records(path, name=name, **options) for name, path in files.items()}
    roots.refuse_unused(names for records in opened.values() for names in records.names)
    return opened


@dataclass
class Look:
    """What one reading of a file finds; of its pairs a few numbers each stay, of its texts a sample."""

    part: Part | None = None  # the pairs that are fitted on
    chunks: list[Chunk] = field(default_factory=list)  # sampled
    level: int = 0
    sampled: int = 0  # pairs
    num_records: int = 0
    errors: list[RecordError] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    wins_M2: np.ndarray | int = 0  # pairs whose preferred response has more of a measure, and less

    @property
    def pairs(self) -> int:
        """All of them."""
        return sum(len(own.pair_P) for own in self.seen)

    def see(self, chunk: Chunk) -> None:
        """Take account of a chunk."""
        self.num_records += len(chunk.groups)
        self.errors += chunk.errors
        self.seen.append(Seen.of(chunk))
        values_RM = chunk.features_RF[:, : len(MEASURES)].toarray()
        more_PM = values_RM[chunk.ends_P2[:, 0]] - values_RM[chunk.ends_P2[:, 1]]
        self.wins_M2 += np.stack([(more_PM > 0).sum(axis=0), (more_PM < 0).sum(axis=0)], axis=1)
        self.sample(chunk)

    def sample(self, chunk: Chunk) -> None:
        """Keep some of the records, whatever order they come in."""
        self.chunks.append(chunk.only(level_of(chunk.key_N, SEED) >= self.level))
        self.sampled += len(self.chunks[-1].place_P)
        while self.sampled > SAMPLED:
            self.level += 1
            self.chunks = [own.only(level_of(own.key_N, SEED) >= self.level) for own in self.chunks]
            self.sampled = sum(len(own.place_P) for own in self.chunks)


def figures(looks: Mapping[str, Look], fits: Mapping[str, Fitted], tests: Sequence[str]) -> dict:
    """Everything that audit.json holds but the probe's figures and the advice."""
    samples = {name: Sample.of(own.chunks) for name, own in looks.items()}
    seen = {name: Seen.joined(own.seen) for name, own in looks.items()}
    others = [(one, other) for one in looks for other in fits if one != other]
    return {
        "files": {name: file_figures(name, looks[name], fit, samples, seen) for name, fit in fits.items()},
        "tests": {name: {"records": looks[name].num_records, **health(looks[name], seen[name])} for name in tests},
        "matrix": matrix({name: own.part for name, own in looks.items()}, fits),
        "shared": [{"of": one, "in": other, **shared(seen[one], seen[other])} for one, other in others],
    }


def matrix(parts: Mapping[str, Part], fits: Mapping[str, Fitted]) -> dict[str, dict[str, dict[str, float]]]:
    """By file fitted on and file tested on: in its own cross-fitted, elsewhere by the regression of all of it."""
    return {
        name: {
            on: scored(part, fit.margins_P if on == name else part.differences_PF @ fit.weights_FK[:, -1])
            for on, part in parts.items()
        }
        for name, fit in fits.items()
    }


def file_figures(name: str, own: Look, fit: Fitted, samples: Mapping[str, Sample], seen: Mapping[str, Seen]) -> dict:
    """What is found of one file; what margins say is of the pairs that were fitted on."""
    margins, length = fit.margins_P, own.part.differences_PF[:, [LENGTH]].toarray()[:, 0]
    wins, sign = ("shorter", -1) if np.sign(length).sum() < 0 else ("longer", 1)
    return {
        "records": own.num_records,
        "pairs": own.pairs,
        "pairs_fitted_on": len(margins),
        "problems": len(own.errors),
        "first_problem": str(own.errors[0]) if own.errors else None,
        "proxies": {
            f"length alone ({wins} wins)": scored(own.part, sign * length),
            "words and form": scored_fit(own.part, fit),
        },
        "cues": [
            cue.row() | {"elsewhere": {other: told(cue, there) for other, there in samples.items() if other != name}}
            for cue in find_cues(samples[name])
        ],
        "groups": dict(group_rows(own)),
        "surest": surest(samples[name], own, margins),
        "health": health(own, seen[name]) | {"likely wrong": int((margins < -CONFIDENT).sum())},
        "listened_to": {mode: listened_to(margins, mode) for mode in ("paper", "balanced")},
    }


def surest(sample: Sample, own: Look, margins: np.ndarray) -> dict[str, list[dict]]:
    """The sampled pairs on which text is surest, right and wrong."""
    by_pair = dict(zip(map(tuple, own.part.pairs_P3.tolist()), margins, strict=True))
    margin_P = np.array([by_pair.get(tuple(pair), 0.0) for pair in sample.pairs_P3.tolist()])
    rows = {}
    for kind, turned_P in (("right", margin_P), ("wrong", -margin_P)):
        places = [pair for pair in np.argsort(-turned_P, kind="stable")[:SHOWN_PAIRS].tolist() if turned_P[pair] > 0]
        rows[kind] = [{"margin": float(margin_P[pair]), **shown_pair(sample, pair)} for pair in places]
    return rows


def shown_pair(chunk: Chunk, pair: int) -> dict:
    """The texts of a pair."""
    group, ends = chunk.groups[chunk.place_P[pair]], chunk.pairs_P3[pair, 1:].tolist()
    chosen, rejected = (group.responses[list(group.places).index(place)] for place in ends)
    return {"source": group.source, "prompt": text_of(group), "chosen": chosen, "rejected": rejected}


def health(own: Look, seen: Seen) -> dict[str, int]:
    """Problems of labels that are seen in one file alone."""
    return {"unreadable": len(own.errors), **own_health(seen)}


def scored(part: Part, margins: np.ndarray) -> dict[str, float]:
    """Accuracy with its 95 % interval; the pairs of a record count as one draw."""
    credits = credit(margins)
    _, record_P = np.unique(part.pairs_P3[:, 0], return_inverse=True)
    mean = float(credits.mean())
    error = 1.96 * float(np.sqrt((np.bincount(record_P, credits - mean) ** 2).sum())) / len(credits)
    return {"accuracy": mean, "low": max(0.0, mean - error), "high": min(1.0, mean + error)}


def scored_fit(part: Part, fit: Fitted) -> dict[str, float]:
    """Accuracy and log-loss, cross-validated."""
    return scored(part, fit.margins_P) | {"log_loss": fit.log_loss}


def listened_to(margins: np.ndarray, mode: str) -> float:
    """The share of equally weighted pairs that would say as much to an untrained model: (sum w)^2 / (n sum w^2)."""
    weights = pair_loss(torch.zeros(len(margins)).double(), torch.from_numpy(margins), mode=mode).sfc
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


def told(cue: Cue, sample: Sample) -> dict:
    """How a cue of one file tells another's pairs; it flips where it is as clear the other way round."""
    sign_P = cue.direction * cue.signs(sample)
    coverage, right = float((sign_P != 0).mean()), float((sign_P > 0).mean())
    flips = cue.advantage > FLIP and 2 * right - coverage < -FLIP
    return {"coverage": coverage, "accuracy": right / coverage if coverage else None, "flips": flips}


def group_rows(own: Look) -> Iterator[tuple[str, list[dict]]]:
    """By named group: its measures, how many pairs they tell, and how often the preferred response has more."""
    for group, names in GROUPS.items():
        rows = []
        for name in names:
            more, less = own.wins_M2[MEASURES.index(name)].tolist()
            share = more / (more + less) if more + less else None
            rows.append({"measure": name, "coverage": (more + less) / max(own.pairs, 1), "preferred_has_more": share})
        yield group, rows
