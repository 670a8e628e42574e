"""The `evaluate` command: a benchmark through the scorer, its table, and how far its numbers can be trusted."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from rich.table import Table
from tqdm import tqdm

from mmrm_fast.config import EvaluateConfig
from mmrm_fast.config_file import options
from mmrm_fast.data.records import RecordError
from mmrm_fast.evaluate import plots
from mmrm_fast.evaluate.benchmarks import Item, MissingImage, Unread, read_items
from mmrm_fast.evaluate.reliability import bootstrap, calibration, credit, rank_correlation, spread, text_controls
from mmrm_fast.files import write_json
from mmrm_fast.pairs import accuracy
from mmrm_fast.score.scorer import Scored, Scorer
from mmrm_fast.tables import percent, print_table, signed

RECORDS_AT_ONCE = 64
BATCH_SIZES = (1, 7, 64)  # records a call, for the spread of the same rewards
EXIT_SOME_UNSCORED = 3
MAX_LISTED = 20

REWARDBENCH_SECTIONS = {  # the leaderboard's sections, whose subsets weigh as many prompts as they have
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip
MATH, MATH_WEIGHT = "math-prm", 984  # counted as often as the code subsets together


@dataclass(frozen=True)
class ScoredPair:
    """One labelled pair of an item: `margin` is the reward of the preferred response minus the other's."""

    id: str
    source: str
    group: str
    subgroup: str | None
    in_training_set: bool
    chosen: int
    rejected: int
    margin: float
    scores: tuple[float, ...]
    truncated: tuple[bool, ...]
    responses: tuple[str, ...] = field(repr=False)


def evaluate(config: EvaluateConfig) -> int:
    """Score a benchmark, write results.json and plots; returns the exit status, 3 when any item was not scored."""
    scorer = Scorer.from_pretrained(config.model, **options(config.batch))
    items = list(read_items(config.bench, config.data, config.images))
    if not items:
        raise ValueError(f"{config.data}: no items")
    pairs, unscored = score_items(scorer, items)
    if not pairs:
        raise ValueError(f"{config.data}: none of {len(items)} items could be scored, the first: {unscored[0].error}")
    readable = [item for item in items if isinstance(item, Item)]
    results = {
        "bench": config.bench,
        "data": str(config.data),
        "model": str(config.model),
        "metrics": metrics(config.bench, pairs, unscored),
        "reliability": reliability(pairs) | {"repeatability": repeatability(scorer, readable)},
        "controls": controls(pairs, ordered=all(item.ordered for item in readable)),
        "unscored": [unscored_row(item) for item in unscored],
        "items": [item_row(pair) for pair in pairs],
    }
    write_results(config.output_dir, results, pairs)
    report(config, results)
    return EXIT_SOME_UNSCORED if unscored else 0


def score_items(scorer: Scorer, items: Iterable[Item | Unread]) -> tuple[list[ScoredPair], list[Unread]]:
    """Every labelled pair with its margin, and every item that could not be scored with the reason."""
    pairs, unscored = [], [item for item in items if isinstance(item, Unread)]
    queue = iter(item for item in items if isinstance(item, Item))
    with tqdm(total=len(items) - len(unscored), unit=" items", desc="scoring", delay=2) as bar:
        while chunk := list(islice(queue, RECORDS_AT_ONCE)):
            for item, result in zip(chunk, scorer.score_groups([item.record for item in chunk]), strict=True):
                if isinstance(result, RecordError):
                    unscored.append(Unread(item.id, item.group, result))
                else:
                    pairs += scored_pairs(item, result)
            bar.update(len(chunk))
    return pairs, unscored


def scored_pairs(item: Item, scored: Scored) -> Iterable[ScoredPair]:
    """The labelled pairs of one scored item."""
    for pair in item.record.pairs:
        yield ScoredPair(
            item.id, item.record.source, item.group, item.subgroup, item.in_training_set, pair.chosen, pair.rejected,
            scored.rewards[pair.chosen] - scored.rewards[pair.rejected], scored.rewards, scored.truncated,
            item.record.responses,
        )  # fmt: skip


def metrics(bench: str, pairs: Sequence[ScoredPair], unscored: Sequence[Unread]) -> dict:
    """The benchmark's figures: per group, `overall` (over items) and `macro` (mean of the groups); a tie is a half."""
    figures = {"all": accuracies(pairs)}
    if bench == "vl-rewardbench":
        figures["without training-set items"] = accuracies([pair for pair in pairs if not pair.in_training_set])
        figures["training-set items"] = accuracies([pair for pair in pairs if pair.in_training_set])
    subgroups = [pair for pair in pairs if pair.subgroup]
    if subgroups:
        figures["subgroups"] = grouped(subgroups, [pair.subgroup for pair in subgroups])
    if bench == "mm-rlhf-rewardbench":
        figures["acc_plus"] = accuracy_plus(pairs, unscored)
    if bench == "rewardbench":
        figures["sections"] = rewardbench_sections(figures["all"]["groups"])
    missing = sum(isinstance(item.error, MissingImage) for item in unscored)
    return figures | {"scored": len({p.source for p in pairs}), "unscored": len(unscored), "missing_images": missing}


def accuracies(pairs: Sequence[ScoredPair]) -> dict:
    """Pairs and accuracy with its interval of every group, of all and of the groups' mean."""
    if not pairs:
        return {"pairs": 0}
    groups = grouped(pairs, [pair.group for pair in pairs])
    credits = credit(np.array([pair.margin for pair in pairs]))
    intervals = bootstrap(credits, [pair.source for pair in pairs], [pair.group for pair in pairs])
    for name, figures in groups.items():
        figures["interval"] = intervals[name]
    macro = float(np.mean([figures["accuracy"] for figures in groups.values()]))
    return {
        "pairs": len(pairs),
        "groups": groups,
        "overall": {"accuracy": float(credits.mean()), "interval": intervals["overall"]},
        "macro": {"accuracy": macro, "interval": intervals["macro"]},
    }


def grouped(pairs: Sequence[ScoredPair], names: Sequence[str]) -> dict[str, dict]:
    """Pairs and accuracy by name."""
    margins, names = np.array([pair.margin for pair in pairs]), np.array(names)
    return {
        str(name): {"pairs": int(np.sum(names == name)), "accuracy": accuracy(margins[names == name])}
        for name in np.unique(names)
    }


def accuracy_plus(pairs: Sequence[ScoredPair], unscored: Sequence[Unread]) -> dict:
    """Acc+: share of ids all of whose pairs are right (no ties); ids with an unscored pair are left out."""
    lost = {item.id for item in unscored}
    right: dict[str, bool] = {}
    for pair in pairs:
        right[pair.id] = right.get(pair.id, True) and pair.margin > 0
    kept = [value for identity, value in right.items() if identity not in lost]
    return {"ids": len(kept), "accuracy": float(np.mean(kept)) if kept else float("nan"), "ids_left_out": len(lost)}


def rewardbench_sections(groups: dict[str, dict]) -> dict[str, float]:
    """The leaderboard's sections that have items here, and `score`, their mean."""
    sections = {}
    for section, subsets in REWARDBENCH_SECTIONS.items():
        present = [name for name in subsets if name in groups]
        if present:
            weights = [MATH_WEIGHT if name == MATH else groups[name]["pairs"] for name in present]
            sections[section] = float(np.average([groups[name]["accuracy"] for name in present], weights=weights))
    return sections | ({"score": float(np.mean(list(sections.values())))} if sections else {})


def reliability(pairs: Sequence[ScoredPair]) -> dict:
    """Calibration and the margins' distribution."""
    margins = np.array([pair.margin for pair in pairs])
    counts, edges = np.histogram(margins, bins=40)
    quantiles = np.quantile(margins, [0.05, 0.25, 0.5, 0.75, 0.95])
    return {
        "calibration": calibration(margins),
        "margins": {"counts": counts.tolist(), "edges": edges.tolist(), "quantiles_5_25_50_75_95": quantiles.tolist()},
    }


def repeatability(scorer: Scorer, items: Sequence[Item]) -> dict:
    """Spread of the rewards of the first records over batch sizes: what a reward depends on besides its record."""
    runs = []
    for size in BATCH_SIZES:
        rewards, queue = [], iter([item.record for item in items[: max(BATCH_SIZES)]])
        while chunk := list(islice(queue, size)):
            for result in scorer.score_groups(chunk):
                rewards += result.rewards if isinstance(result, Scored) else ()
        runs.append(np.array(rewards))
    return {"batch_sizes": BATCH_SIZES, "rewards": len(runs[0]), **spread(runs)}


def controls(pairs: Sequence[ScoredPair], *, ordered: bool) -> dict:
    """What length, format and, where the order was published, position alone explain."""
    margins = np.array([pair.margin for pair in pairs])
    chosen, rejected = ([pair.responses[getattr(pair, name)] for pair in pairs] for name in ("chosen", "rejected"))
    figures = text_controls(margins, chosen, rejected)
    once = {pair.source: pair for pair in pairs}.values()
    rewards = np.array([score for pair in once for score in pair.scores])
    lengths = np.array([len(text) for pair in once for text in pair.responses])
    figures["correlation"]["reward with length"] = rank_correlation(rewards, lengths)
    if ordered:
        first = np.array([pair.chosen < pair.rejected for pair in pairs])
        figures["rules"]["first wins"] = float(first.mean())
        figures["position"] = {
            "first is better": accuracy(margins[first]),
            "second is better": accuracy(margins[~first]),
        }
    return figures


def item_row(pair: ScoredPair) -> dict:
    """A pair's line in results.json."""
    row = asdict(pair)
    row["lengths"] = [len(text) for text in row.pop("responses")]
    return row


def unscored_row(item: Unread) -> dict:
    """An unscored item's line in results.json."""
    error = item.error
    return {
        "id": item.id, "group": item.group, "source": error.source, "field": error.field, "reason": error.reason,
        "missing_image": isinstance(error, MissingImage),
    }  # fmt: skip


def write_results(folder: Path, results: dict, pairs: Sequence[ScoredPair]) -> None:
    """results.json, reliability.svg and margins.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    calibrations = {results["bench"]: results["reliability"]["calibration"]}
    plots.save(plots.reliability(calibrations), folder / "reliability.svg")
    plots.save(plots.margins(np.array([pair.margin for pair in pairs])), folder / "margins.svg")


def report(config: EvaluateConfig, results: dict) -> None:
    """Print the tables, what was not scored and where everything is."""
    print_table(accuracy_table(config.bench, results))
    figures, calibrated = results["metrics"], results["reliability"]["calibration"]
    repeated, controlled = results["reliability"]["repeatability"], results["controls"]
    names = ("ece", "brier", "log_loss", "temperature")
    print("calibration: " + ", ".join(f"{name.replace('_', '-')} {calibrated[name]:.3f}" for name in names))
    print(
        "rules without a model: " + ", ".join(f"{name} {percent(value)}" for name, value in controlled["rules"].items())
    )
    buckets = (f"{name} {percent(b['accuracy'])} ({b['pairs']})" for name, b in controlled["buckets"].items())
    print("accuracy by length of the preferred response against the other (pairs): " + ", ".join(buckets))
    print(f"rank correlation of reward with length: {signed(controlled['correlation']['reward with length'])}")
    print(
        f"repeatability: {repeated['rewards']} rewards differ by at most {repeated['largest']:.1e}"
        f" over batches of {', '.join(map(str, BATCH_SIZES))} records"
    )
    if results["unscored"]:
        print(f"{figures['unscored']} items were not scored, {figures['missing_images']} for a missing image:")
        for row in results["unscored"][:MAX_LISTED]:
            print(f"  {row['id']}: {RecordError(row['source'], row['field'], row['reason'])}")
        if len(results["unscored"]) > MAX_LISTED:
            print("  ... all of them under `unscored` in results.json")
    print(f"all figures and items: {config.output_dir / 'results.json'}; plots: reliability.svg, margins.svg")


def accuracy_table(bench: str, results: dict) -> Table:
    """Groups, overall and macro accuracy with their intervals; the splits of the benchmark below."""
    figures = results["metrics"]
    table = Table(title=f"{bench}: accuracy (%), a tie counts half")
    for column in ("group", "pairs", "unscored", "accuracy", "95 % interval"):
        table.add_column(column, justify="left" if column == "group" else "right")
    lost = [row["group"] for row in results["unscored"]]
    names = sorted({*figures["all"]["groups"], *lost})
    for name in names if names != ["all"] else ():
        row = figures["all"]["groups"].get(name, {"pairs": 0})
        table.add_row(name, str(row["pairs"]), str(lost.count(name)), *accuracy_cells(row))
    table.add_section()
    for title, part in figures.items():
        if title in ("all", "without training-set items", "training-set items") and part["pairs"]:
            suffix = "" if title == "all" else f", {title}"
            unscored = str(len(lost)) if title == "all" else ""
            table.add_row("overall" + suffix, str(part["pairs"]), unscored, *accuracy_cells(part["overall"]))
            table.add_row("macro" + suffix, "", "", *accuracy_cells(part["macro"]))
    for name, row in figures.get("subgroups", {}).items():
        table.add_row(name, str(row["pairs"]), "", percent(row["accuracy"]), "")
    for name, value in figures.get("sections", {}).items():
        table.add_row(name, "", "", percent(value), "")
    if "acc_plus" in figures:
        plus = figures["acc_plus"]
        table.add_row("Acc+ (all pairs of an id)", f"{plus['ids']} ids", "", percent(plus["accuracy"]), "")
    return table


def accuracy_cells(figures: dict) -> tuple[str, str]:
    """Accuracy and interval as the table shows them."""
    low, high = figures.get("interval", (None, None))
    return percent(figures.get("accuracy")), "" if low is None else f"{percent(low)} to {percent(high)}"
