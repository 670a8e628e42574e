"""The `evaluate` command: a benchmark through the scorer, its table, and how far its numbers can be trusted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from mmrm_fast.config_file import options
from mmrm_fast.data.census import Kind, counted, told_files
from mmrm_fast.data.records import RecordError
from mmrm_fast.evaluate import plots
from mmrm_fast.evaluate.benchmarks import Item, MissingImage, Unread, read_items
from mmrm_fast.evaluate.config import EvaluateConfig
from mmrm_fast.evaluate.reliability import bootstrap, calibration, rank_correlation, text_controls
from mmrm_fast.evaluate.rewardbench import Ranked, section_scores, subset_scores
from mmrm_fast.files import write_json
from mmrm_fast.pairs import accuracy, credit
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.tables import percent, print_lines, print_table, signed

RECORDS_AT_ONCE = 64
BATCH_SIZES = (1, 7, 64)  # records a call, for the spread of the same rewards
EXIT_SOME_UNSCORED = 3
MAX_LISTED = 20
TIE_CREDIT = {"half": 0.5, "wrong": 0.0}


@dataclass(frozen=True)
class ScoredPair:
    """One labelled pair of a scored item."""

    item: Item
    scored: Scored
    chosen: int
    rejected: int

    @property
    def margin(self) -> float:
        """Reward of the preferred response minus the other's."""
        return self.scored.rewards[self.chosen] - self.scored.rewards[self.rejected]

    @property
    def source(self) -> str:
        return self.item.record.source

    def text(self, response: int) -> str:
        return self.item.record.responses[response]

    def row(self) -> dict:
        """Its line in results.json; lists are of its two responses, in the order of the record."""
        both = sorted((self.chosen, self.rejected))
        return {
            "id": self.item.id, "source": self.source, "group": self.item.group, "subgroup": self.item.subgroup,
            "in_training_set": self.item.in_training_set, "chosen": self.chosen, "rejected": self.rejected,
            "margin": self.margin, "scores": [self.scored.rewards[response] for response in both],
            "truncated": [self.scored.truncated[response] for response in both],
            "lengths": [len(self.text(response)) for response in both],
        }  # fmt: skip


def evaluate(config: EvaluateConfig) -> int:
    """Score a benchmark, write results.json and plots; returns the exit status, 3 when any item was not scored."""
    scorer = Scorer.from_pretrained(config.model, **options(config.batch))
    reading = {"ignored": config.ignore_fields, "max_pairs": config.max_pairs}
    items = list(read_items(config.bench, config.data, config.image_root, **reading))
    if not items:
        raise ValueError(f"{config.data}: no items")
    census = counted(Kind.of(item.record if isinstance(item, Item) else item.error) for item in items)
    print_lines(told_files(census, Counter(kind.file for kind in census.elements())))
    readable = [item for item in items if isinstance(item, Item)]
    pairs, identical, unscored = score_items(scorer, readable)
    unscored = [*(item for item in items if isinstance(item, Unread)), *unscored]
    if not pairs:
        why = f", the first: {unscored[0].error}" if unscored else ": all pairs have two sides of the same tokens"
        raise ValueError(f"{config.data}: none of {len(items)} items could be scored{why}")
    results = {
        "bench": config.bench,
        "data": str(config.data),
        "model": str(config.model),
        "metrics": metrics(config.bench, pairs, unscored, TIE_CREDIT[config.ties]),
        "reliability": reliability(pairs) | {"repeatability": repeatability(scorer, readable)},
        "controls": controls(pairs, ordered=all(item.ordered for item in readable)),
        "unscored": [unscored_row(item) for item in unscored],
        "pairs_over_max_pairs": sum(item.record.num_undrawn for item in readable),
        "identical_pairs": [pair.row() for pair in identical],
        "items": [pair.row() for pair in pairs],
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.output_dir / "results.json", results)
    calibrations = {config.bench: results["reliability"]["calibration"]}
    plots.save(plots.reliability(calibrations), config.output_dir / "reliability.svg")
    plots.save(plots.margins(margins_of(pairs)), config.output_dir / "margins.svg")
    report(config, results)
    return EXIT_SOME_UNSCORED if unscored else 0


def score_items(scorer: Scorer, items: Sequence[Item]) -> tuple[list[ScoredPair], list[ScoredPair], list[Unread]]:
    """Labelled pairs with their rewards, those that have twice the same tokens, and items that were not scored."""
    pairs, identical, unscored = [], [], []
    results = scorer.score_stream((item.record for item in items), RECORDS_AT_ONCE)
    both = zip(items, results, strict=True)
    for item, result in tqdm(both, total=len(items), unit=" items", desc="scoring", delay=2):
        if isinstance(result, RecordError):
            unscored.append(Unread(item.id, item.group, result))
            continue
        for ends, is_same in zip(item.record.pairs.ends.tolist(), result.identical, strict=True):
            (identical if is_same else pairs).append(ScoredPair(item, result, *ends))
    return pairs, identical, unscored


def metrics(bench: str, pairs: Sequence[ScoredPair], unscored: Sequence[Unread], tie: float = 0.5) -> dict:
    """The benchmark's figures: per group, `overall` (over items) and `macro` (mean of the groups); a tie is `tie`."""
    figures = {"all": accuracies(pairs, tie)}
    if bench == "vl-rewardbench":
        for title, inside in (("without training-set items", False), ("training-set items", True)):
            figures[title] = accuracies([pair for pair in pairs if pair.item.in_training_set == inside], tie)
    if subgroups := [pair for pair in pairs if pair.item.subgroup]:
        figures["subgroups"] = grouped(subgroups, [pair.item.subgroup for pair in subgroups], tie)
    if bench == "mm-rlhf-rewardbench":
        figures["acc_plus"] = accuracy_plus(pairs, unscored)
    if bench == "rewardbench":
        figures["sections"] = section_scores(figures["all"]["groups"])
    if bench == "rewardbench-2":
        figures["sections"] = subset_scores(ranked(pairs), ties_count=tie > 0)
    missing = sum(isinstance(item.error, MissingImage) for item in unscored)
    return figures | {"scored": len({p.source for p in pairs}), "unscored": len(unscored), "missing_images": missing}


def accuracies(pairs: Sequence[ScoredPair], tie: float) -> dict:
    """Pairs and accuracy with its interval of every group, of all and of the groups' mean."""
    if not pairs:
        return {"pairs": 0}
    names = [pair.item.group for pair in pairs]
    groups, credits = grouped(pairs, names, tie), credit(margins_of(pairs), tie)
    intervals = bootstrap(credits, [pair.source for pair in pairs], names)
    for name, figures in groups.items():
        figures["interval"] = intervals[name]
    macro = float(np.mean([figures["accuracy"] for figures in groups.values()]))
    return {
        "pairs": len(pairs),
        "groups": groups,
        "overall": {"accuracy": float(credits.mean()), "interval": intervals["overall"]},
        "macro": {"accuracy": macro, "interval": intervals["macro"]},
    }


def margins_of(pairs: Sequence[ScoredPair]) -> np.ndarray:
    return np.array([pair.margin for pair in pairs])


def grouped(pairs: Sequence[ScoredPair], names: Sequence[str], tie: float) -> dict[str, dict]:
    """Pairs and accuracy by name."""
    margins, names = margins_of(pairs), np.array(names)
    return {
        str(name): {"pairs": int(np.sum(names == name)), "accuracy": accuracy(margins[names == name], tie)}
        for name in np.unique(names)
    }


def accuracy_plus(pairs: Sequence[ScoredPair], unscored: Sequence[Unread]) -> dict:
    """Acc+: share of ids all of whose pairs are right (no ties); ids with an unscored pair are left out."""
    lost = {item.id for item in unscored}
    right: dict[str, bool] = {}
    for pair in pairs:
        right[pair.item.id] = right.get(pair.item.id, True) and pair.margin > 0
    kept = [value for identity, value in right.items() if identity not in lost]
    return {"ids": len(kept), "accuracy": float(np.mean(kept)) if kept else float("nan"), "ids_left_out": len(lost)}


def ranked(pairs: Sequence[ScoredPair]) -> Iterator[Ranked]:
    """The items of RewardBench 2, each response once."""
    for pair in {pair.source: pair for pair in pairs}.values():
        rewards, ends = np.array(pair.scored.rewards), pair.item.record.pairs.ends
        yield Ranked(pair.item.id, pair.item.group, *(rewards[np.unique(ends[:, side])] for side in (0, 1)))


def reliability(pairs: Sequence[ScoredPair]) -> dict:
    """Calibration and the margins' distribution."""
    margins = margins_of(pairs)
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
        results = scorer.score_stream((item.record for item in items[: max(BATCH_SIZES)]), size)
        runs.append([reward for result in results if isinstance(result, Scored) for reward in result.rewards])
    ranges = np.ptp(runs, axis=0)
    figures = {"largest": float(ranges.max()), "mean": float(ranges.mean())}
    return {"batch_sizes": BATCH_SIZES, "rewards": len(ranges), **figures}


def controls(pairs: Sequence[ScoredPair], *, ordered: bool) -> dict:
    """What length, format and, where the order was published, position alone explain."""
    margins = margins_of(pairs)
    chosen, rejected = ([pair.text(getattr(pair, end)) for pair in pairs] for end in ("chosen", "rejected"))
    figures = text_controls(margins, chosen, rejected)
    once = {pair.source: pair for pair in pairs}.values()
    rewards = np.array([score for pair in once for score in pair.scored.rewards])
    lengths = np.array([len(text) for pair in once for text in pair.item.record.responses])
    figures["correlation"]["reward with length"] = rank_correlation(rewards, lengths)
    if ordered:
        first = np.array([pair.chosen < pair.rejected for pair in pairs])
        figures["rules"]["first wins"] = float(first.mean())
        better = {"first is better": accuracy(margins[first]), "second is better": accuracy(margins[~first])}
        figures["position"] = better
    return figures


def unscored_row(item: Unread) -> dict:
    """An unscored item's line in results.json."""
    error = item.error
    return {
        "id": item.id, "group": item.group, "source": error.source, "field": error.field, "reason": error.reason,
        "missing_image": isinstance(error, MissingImage),
    }  # fmt: skip


def report(config: EvaluateConfig, results: dict) -> None:
    """Print the tables, what was not scored and where everything is."""
    heads = ("group", "pairs", "unscored", "accuracy", "95 % interval")
    print_table(
        f"{config.bench}: accuracy (%), a tie counts {TIE_CREDIT[config.ties]:g}", heads, accuracy_rows(results)
    )
    figures, calibrated = results["metrics"], results["reliability"]["calibration"]
    repeated, controlled = results["reliability"]["repeatability"], results["controls"]
    names = ("ece", "brier", "log_loss", "temperature")
    print("calibration: " + ", ".join(f"{name.replace('_', '-')} {calibrated[name]:.3f}" for name in names))
    rules = (f"{name} {percent(value)}" for name, value in controlled["rules"].items())
    print("rules without a model: " + ", ".join(rules))
    buckets = (f"{name} {percent(b['accuracy'])} ({b['pairs']})" for name, b in controlled["buckets"].items())
    print("accuracy by length of the preferred response against the other (pairs): " + ", ".join(buckets))
    print(f"rank correlation of reward with length: {signed(controlled['correlation']['reward with length'])}")
    print(
        f"repeatability: {repeated['rewards']} rewards differ by at most {repeated['largest']:.1e}"
        f" over batches of {', '.join(map(str, BATCH_SIZES))} records"
    )
    if identical := results["identical_pairs"]:
        named = ", ".join(row["id"] for row in identical[:MAX_LISTED])
        print_lines([f"{len(identical)} pairs whose two sides are the same are in no figure: {named}"])
    if results["pairs_over_max_pairs"]:
        print(f"{results['pairs_over_max_pairs']} pairs over --max-pairs {config.max_pairs} of a record were not drawn")
    if results["unscored"]:
        print(f"{figures['unscored']} items were not scored, {figures['missing_images']} for a missing image:")
        for row in results["unscored"][:MAX_LISTED]:
            print(f"  {row['id']}: {RecordError(row['source'], row['field'], row['reason'])}")
        if len(results["unscored"]) > MAX_LISTED:
            print("  ... all of them under `unscored` in results.json")
    print(f"all figures and items: {config.output_dir / 'results.json'}; plots: reliability.svg, margins.svg")


def accuracy_rows(results: dict) -> Iterator[tuple[str, ...]]:
    """Groups, overall and macro accuracy with their intervals; the splits of the benchmark below."""
    figures = results["metrics"]
    lost = [row["group"] for row in results["unscored"]]
    names = sorted({*figures["all"]["groups"], *lost})
    for name in names if names != ["all"] else ():
        row = figures["all"]["groups"].get(name, {"pairs": 0})
        yield name, str(row["pairs"]), str(lost.count(name)), *accuracy_cells(row)
    yield ()
    for title, part in figures.items():
        if title in ("all", "without training-set items", "training-set items") and part["pairs"]:
            suffix, unscored = ("", str(len(lost))) if title == "all" else (f", {title}", "")
            yield "overall" + suffix, str(part["pairs"]), unscored, *accuracy_cells(part["overall"])
            yield "macro" + suffix, "", "", *accuracy_cells(part["macro"])
    for name, row in figures.get("subgroups", {}).items():
        yield name, str(row["pairs"]), "", *accuracy_cells(row)
    for name, value in figures.get("sections", {}).items():
        yield name, "", "", percent(value), ""
    if plus := figures.get("acc_plus"):
        yield "Acc+ (all pairs of an id)", f"{plus['ids']} ids", "", percent(plus["accuracy"]), ""


def accuracy_cells(figures: dict) -> tuple[str, str]:
    """Accuracy and interval as the table shows them."""
    low, high = figures.get("interval", (None, None))
    return percent(figures.get("accuracy")), "" if low is None else f"{percent(low)} to {percent(high)}"
