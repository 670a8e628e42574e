"""The `best-of-n` command: the true quality of the response that a reward model would select out of N, as N grows.

With M scored responses to a prompt, sorted by score, the i-th is the best of a random N of them with probability
C(i - 1, N - 1) / C(M, N); the expected quality of the selected one is exact over all subsets, without sampling. Tied
scores share their mean quality, since any of them may be selected. The distance from the policy that drew the
responses is KL = log N - (N - 1) / N (Stiennon et al., arXiv 2009.01325; Gao et al., arXiv 2210.10760).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.special import gammaln

from mmrm_fast.evaluate import plots
from mmrm_fast.evaluate.config import BestOfNConfig
from mmrm_fast.evaluate.plots import ORACLE
from mmrm_fast.evaluate.reliability import mean_interval
from mmrm_fast.files import json_lines, write_json
from mmrm_fast.tables import print_table


def best_of_n(config: BestOfNConfig) -> None:
    """Write best-of-n.json, .svg and .png, print the table."""
    sizes, truth = parse_sizes(config.n), read_values(config.truth, "truth")
    models = {name: read_values(path, "score") for name, path in named_files(config.scores).items()}
    check(truth, config.truth, models, max(sizes))
    qualities = {name: selected_quality(scores, truth, sizes) for name, scores in models.items()}
    curves = {name: curve(values, sizes) for name, values in qualities.items()}
    curves[ORACLE] = curve(selected_quality(truth, truth, sizes), sizes)
    results = {
        "prompts": len(truth),
        "responses": sorted({len(values) for values in truth.values()}),
        "curves": curves,
        "differences": differences(qualities, sizes),
    }
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "best-of-n.json", results)
    figure = plots.best_of_n(curves)
    for suffix in ("svg", "png"):
        plots.save(figure, folder / f"best-of-n.{suffix}")
    rows = [(name, *(f"{row['quality']:.3f}" for row in own)) for name, own in curves.items()]
    print_table("Expected truth of the selected response, by N", ["model", *map(str, sizes)], rows)
    for row in results["differences"]:
        print("{first} minus {second} at N = {n}: {difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**row))
    print(f"all figures: {folder / 'best-of-n.json'}; plot: best-of-n.svg, best-of-n.png")


def expected_best(scores: np.ndarray, quality: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Expected quality of the highest-scored of a random N of the M responses to a prompt, for every N in `sizes`."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    shared = (np.bincount(place, quality) / counts)[place]  # [M], tied responses alike
    in_order = shared[np.argsort(place, kind="stable")]
    values = []
    for size in sizes:
        below = np.arange(size - 1, len(scores))  # responses below each that may be the best of so many
        weights = np.exp(log_choose(below, size - 1) - log_choose(len(scores), size))
        values.append(float(weights @ in_order[size - 1 :]))
    return np.array(values)


def log_choose(total: np.ndarray | int, size: int) -> np.ndarray:
    """log C(total, size)."""
    return gammaln(total + 1) - gammaln(size + 1) - gammaln(np.subtract(total, size) + 1)


def selected_quality(scores: Mapping, truth: Mapping, sizes: Sequence[int]) -> np.ndarray:
    """Expected quality [prompts, sizes]."""
    return np.stack([expected_best(scores[record], truth[record], sizes) for record in truth])


def curve(values: np.ndarray, sizes: Sequence[int]) -> list[dict]:
    """Mean over prompts with its 95 % bootstrap interval, a row an N."""
    columns = np.array([values.mean(0), *mean_interval(values)]).T.tolist()
    return [
        {"n": n, "kl": math.log(n) - (n - 1) / n, "quality": mean, "low": low, "high": high}
        for n, (mean, low, high) in zip(sizes, columns, strict=True)
    ]


def differences(qualities: Mapping[str, np.ndarray], sizes: Sequence[int]) -> list[dict]:
    """Every model minus the first at the largest N, paired by prompt."""
    (first, base), *others = qualities.items()
    rows = []
    for name, values in others:
        difference = (values - base)[:, -1]
        low, high = mean_interval(difference).tolist()
        figures = {"difference": float(difference.mean()), "low": low, "high": high}
        rows.append({"first": name, "second": first, "n": sizes[-1], **figures})
    return rows


def parse_sizes(text: str) -> list[int]:
    """`1,2,4,8` as numbers; `...` doubles up to the number behind it. Raises `ValueError`."""
    sizes: list[int] = []
    parts = [part.strip() for part in text.split(",")]
    for place, part in enumerate(parts):
        if part == "..." and sizes and place + 1 < len(parts) and parts[place + 1].isdigit():
            while sizes[-1] * 2 < int(parts[place + 1]):
                sizes.append(sizes[-1] * 2)
        elif part.isdigit() and int(part) > (sizes[-1] if sizes else 0):
            sizes.append(int(part))
        else:
            raise ValueError(f"--n {text}: expected rising numbers from 1, such as 1,2,4,...,64")
    return sizes


def named_files(specs: Sequence[str]) -> dict[str, Path]:
    """FILE or NAME=FILE; a file without a name has that of its stem, or of its folder where stems are equal."""
    if not specs:
        raise ValueError("--scores: give the file of at least one model")
    whole = [Path(spec).is_file() or "=" not in spec for spec in specs]
    parts = [("", "", spec) if alone else spec.partition("=") for spec, alone in zip(specs, whole, strict=True)]
    files = [(name, Path(path)) for name, _, path in parts]
    stems = [path.stem for _, path in files]
    names = [name or (path.stem if stems.count(path.stem) == 1 else path.parent.name) for name, path in files]
    if len(set(names)) < len(names):
        raise ValueError(f"--scores: models need different names, got {', '.join(names)}; give NAME=FILE")
    return dict(zip(names, (path for _, path in files), strict=True))


def read_values(path: Path, field: str) -> dict[int, np.ndarray]:
    """The `field` of every response by record, from rows of `mmrm-fast score` or from records with a list of it."""
    values: dict[int, dict[int, float]] = defaultdict(dict)
    for position, (source, row) in enumerate(json_lines(path)):
        if isinstance(row.get(field), list):
            record, numbers = position, list(enumerate(row[field]))
        else:
            record, numbers = row.get("record"), [(row.get("response_index"), row.get(field))]
        for index, number in numbers:
            if not isinstance(record, int) or not isinstance(index, int):
                raise ValueError(f"{source}: needs `record` and `response_index`, as `mmrm-fast score` writes them")
            if not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"{source}: {field}: expected a finite number, got {number!r}")
            if values[record].setdefault(index, number) != number:
                raise ValueError(f"{source}: record {record} has another {field} for response {index}")
    for record, numbers in values.items():
        if sorted(numbers) != list(range(len(numbers))):
            raise ValueError(f"{path}: record {record} lacks some of its responses, it has {len(numbers)}")
    return {
        record: np.array([value for _, value in sorted(own.items())], float) for record, own in sorted(values.items())
    }


def check(truth: Mapping, source: Path, models: Mapping[str, Mapping], largest: int) -> None:
    """Every model scored every response of every record, and there are enough of them. Raises `ValueError`."""
    if not truth:
        raise ValueError(f"{source}: no records")
    for record, values in truth.items():
        if len(values) < largest:
            raise ValueError(f"{source}: record {record} has {len(values)} responses, N goes up to {largest}")
        for name, scores in models.items():
            found = len(scores.get(record, ()))
            if found != len(values):
                raise ValueError(f"{name}: record {record} has {found} scores for {len(values)} responses")
