"""An audit as a page and as printed tables, and what follows from it."""

from collections.abc import Iterator
from pathlib import Path

from mmrm_fast.evaluate.page import write_page
from mmrm_fast.tables import percent, print_table

NOTHING, STRONG, TRANSFERS = 0.55, 0.65, 0.05  # accuracies of text alone, and points lost elsewhere
NAMES, PRINTED = 5, 3
SHARED = ("pairs", "image and prompt", "image")
LISTENED = 0.3  # share of the pairs under which robust weights listen to few


def advice(results: dict) -> dict[str, list[str]]:
    """What to do, by the file that it is of: a sentence a finding."""
    found = {name: list(file_advice(name, own, results)) for name, own in results["files"].items()}
    for row in results["shared"]:
        if row["of"] in results["tests"] and (number := row["image and prompt"]):
            line = f"{number:,} records are in {row['in']} with their image and prompt."
            found.setdefault(row["of"], []).append(line)
    return found


def file_advice(name: str, own: dict, results: dict) -> Iterator[str]:
    """What to do about one file."""
    yield shortcut_advice(name, own, results["matrix"][name])
    mode, share = min(own["listened_to"].items(), key=lambda item: item[1])
    if share < LISTENED:
        yield f"with --sfc-mode {mode} the weights would listen to {percent(share)} % of the pairs."
    for what, explained in EXPLAINED.items():
        if number := own["health"][what]:
            yield f"{number:,} of {own['pairs']:,} pairs: {explained}."


def shortcut_advice(name: str, own: dict, row: dict) -> str:
    """What text alone can tell, and whether robust training should help."""
    here, others = row[name]["accuracy"], [cell["accuracy"] for on, cell in row.items() if on != name]
    best = max(own["cues"], key=told_rightly, default=None)
    if best and told_rightly(best) > here + TRANSFERS:
        return (
            f"{best['cue']} alone is right on {percent(told_rightly(best))} %, which --proxy-model ngrams does not see "
            f"({percent(here)} %): a proxy that reads (probe, lora, full) is needed."
        )
    if here < NOTHING:
        return f"text alone tells next to nothing ({percent(here)} %); --robust would change little."
    if here >= STRONG and others and min(others) < here - TRANSFERS:
        return (
            f"text alone is right on {percent(here)} % here and on {percent(min(others))} % elsewhere: a shortcut that"
            " does not carry over. --robust should help where the model can see the truth and wrong labels follow the"
            " shortcut; --proxy-model ngrams costs nothing."
        )
    return (
        f"text alone is right on {percent(here)} %{' here and no less elsewhere' if others else ''}; test on data that"
        " was collected another way before trusting an accuracy near it, and compare with --robust."
    )


def told_rightly(cue: dict) -> float:
    """Accuracy of a cue on all pairs, a half where it does not tell."""
    return 0.5 + cue["coverage"] * (cue["accuracy"] - 0.5)


EXPLAINED = {
    "identical sides": "both responses are the same text",
    "contradictory": "the same two responses stand with either one preferred",
    "likely wrong": "text alone gives the label under 5 %: look at them first",
    "unreadable": "could not be read",
}


def print_audit(results: dict, folder: Path) -> None:
    """Print the tables and where everything is."""
    print_table("Text-only accuracy (%), cross-validated", *proxy_table(results))
    names = [*results["files"], *results["tests"]]
    for proxy, shares in matrices(results):
        rows = [[name, *map(percent, row)] for name, row in zip(results["files"], shares, strict=True)]
        print_table(f"{proxy}, fitted on (rows), tested on (columns)", ["", *names], rows)
    for name, own in results["files"].items():
        print_table(f"{name}: strongest cues", *cue_table(own["cues"][:PRINTED]), num_text=2)
    print("\n".join(results["advice"]))
    print(f"everything: {folder / 'audit.html'}, {folder / 'audit.json'}")


def matrices(results: dict) -> Iterator[tuple[str, list[list[float]]]]:
    """By proxy, the accuracy of each file's regressions (rows) on every file (columns), where there are several."""
    names = [*results["files"], *results["tests"]]
    for proxy, key in (("words and form", "matrix"), ("probe", "probe_matrix")):
        if key in results and len(names) > 1:
            yield proxy, [[row[on]["accuracy"] for on in names] for row in results[key].values()]


def proxy_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Accuracy and interval of every proxy on every file."""
    return ["file and proxy", "pairs", "accuracy", "95 % from", "to"], [
        [f"{name}: {proxy}", f"{own['pairs']:,}", *(percent(figures[key]) for key in ("accuracy", "low", "high"))]
        for name, own in results["files"].items()
        for proxy, figures in own["proxies"].items()
    ]


def cue_table(cues: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Cues, what the preferred response does, how much they tell and how well, and where they turn round."""
    rows = []
    for cue in cues:
        names = ", ".join([cue["cue"], *cue["also"][: NAMES - 1]]) + (" …" if len(cue["also"]) >= NAMES else "")
        flips = ", ".join(name for name, there in cue["elsewhere"].items() if there["flips"])
        rows.append([names, cue["preferred"], percent(cue["coverage"]), percent(cue["accuracy"]), flips])
    return ["cue", "preferred", "coverage", "accuracy", "flips in"], rows


def write_audit(path: Path, results: dict) -> None:
    """Write audit.html from what audit.json holds."""
    write_page(
        path,
        "audit.html",
        title="What text alone can tell",
        results=results,
        advice=advice(results),
        proxies=proxy_table(results),
        names=[*results["files"], *results["tests"]],
        matrices=list(matrices(results)),
        cues={name: cue_table(own["cues"]) for name, own in results["files"].items()},
        groups={name: group_rows(own["groups"]) for name, own in results["files"].items()},
        health=health_table(results),
        shared=[
            [f"{row['of']} in {row['in']}", *(f"{row[key]:,}" for key in SHARED)]
            for row in results["shared"]
            if any(row[key] for key in SHARED)
        ],
        shared_heads=["", *SHARED],
    )


def health_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Problems by file and test set."""
    columns = ("unreadable", "identical sides", "duplicates", "contradictory", "likely wrong")
    found = {name: own["health"] for name, own in results["files"].items()} | results["tests"]
    return ["", *columns], [
        [name, *("-" if column not in own else f"{own[column]:,}" for column in columns)] for name, own in found.items()
    ]


def group_rows(groups: dict) -> list[list[str]]:
    """How many pairs each named measure tells, and how often the preferred response has more of it."""
    return [
        [f"{group}: {row['measure']}", percent(row["coverage"]), percent(row["preferred_has_more"])]
        for group, rows in groups.items()
        for row in rows
    ]
