"""Records that kill the process that scores them: found by halves, and left out by name."""

from collections import Counter
from collections.abc import Callable, Sequence

from mmrm_fast.score.pool import TRIES

Ask = Callable[..., object]  # (method, *arguments): what a scoring process answers; None where it died over it


def score_alone(ask: Ask, chunk: int, records: Sequence[int]) -> Counter:
    """The counts of a chunk over which a process has died, scored without the records that kill theirs.

    Args:
        ask: one question at a time, to a process that has no other.
        records: the positions of the chunk's records.

    Raises:
        OSError: processes die over what no record is to blame for.
    """
    poison: list[int] = []
    for _ in range(len(records) + TRIES):
        tally = ask("score", chunk, tuple(poison))
        if tally is not None:
            return tally
        found = find_poison(ask, [record for record in records if record not in poison])
        if found is not None:
            poison.append(found)
            if ask("probe", ()) is None:
                raise OSError("scoring processes die over a plain text too")
    raise OSError(f"scoring processes die over records {records[0]} to {records[-1]} together, over none of them alone")


def find_poison(ask: Ask, records: Sequence[int]) -> int | None:
    """The record over which a process dies twice where it stands alone; None where that is not so of the one found."""
    while len(records) > 1:
        half = records[: len(records) // 2]
        records = half if ask("probe", half) is None else records[len(half) :]
    died = all(ask("probe", records) is None for _ in range(2))
    return records[0] if died and records else None
