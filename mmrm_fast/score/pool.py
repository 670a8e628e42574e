"""Scoring processes on Ray: chunks handed out, processes that die replaced, records that kill theirs left out."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import ray

CHUNKS_AHEAD = 2  # of an actor: one is read and tokenised while the model runs on the other
TRIES = 5
PATIENCE_SECONDS = 1  # before the cluster is looked at


def first_done(waited_for: Iterable[ray.ObjectRef]) -> ray.ObjectRef:
    """The one that is done first. Raises `OSError` where nobody is left to do it."""
    waited_for = list(waited_for)
    while True:
        done, _ = ray.wait(waited_for, num_returns=1, timeout=PATIENCE_SECONDS)
        if done:
            return done[0]
        if not any(node["Alive"] for node in ray.nodes()):
            raise OSError("no node of the Ray cluster is alive")


class Pool:
    """Actors that score chunks; `starts` make one each, again where it has died."""

    def __init__(self, starts: Sequence[Callable]):
        self.starts, self.actors = starts, [start() for start in starts]

    def together(self, waiting: deque[int], suspects: deque[int]) -> Iterator[Counter]:
        """The counts of waiting chunks as they are done.

        A chunk over which an actor died becomes a suspect; so many of them in a row end it before all are done.
        """
        slots = [*range(len(self.actors))] * CHUNKS_AHEAD
        at_work = {self.ready(slot): (slot, self.actors[slot], None) for slot in slots}  # none waits for a slow one
        deaths = 0
        while (waiting and deaths < TRIES) or any(chunk is not None for *_, chunk in at_work.values()):
            done = first_done(at_work)
            slot, actor, chunk = at_work.pop(done)
            try:
                tally = ray.get(done)
            except ray.exceptions.RayActorError:
                deaths += 1
                if chunk is not None:
                    suspects.append(chunk)
                elif deaths == TRIES:
                    raise
                self.replace(slot, actor)
                at_work[self.ready(slot)] = (slot, self.actors[slot], None)
                continue
            deaths = deaths if chunk is None else 0
            if waiting and deaths < TRIES:
                following = waiting.popleft()
                at_work[actor.score.remote(following)] = (slot, actor, following)
            if chunk is not None:
                yield tally

    def ask(self, method: str, *arguments: object) -> object:
        """What the first actor that is ready answers, which has nothing else to do; None where it died over it."""
        at_work = {self.ready(slot): slot for slot in range(len(self.actors))}
        first = first_done(at_work)
        actor = self.actors[at_work[first]]
        ray.get(first)
        try:
            return ray.get(getattr(actor, method).remote(*arguments))
        except ray.exceptions.RayActorError:
            self.replace(at_work[first], actor)
            return None

    def ready(self, slot: int) -> ray.ObjectRef:
        """None when an actor has its model."""
        return self.actors[slot].load.remote()

    def replace(self, slot: int, dead: object) -> None:
        """Start an actor in the place of a dead one, unless that was done."""
        if self.actors[slot] is dead:
            self.actors[slot] = self.starts[slot]()


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
    for _ in range(TRIES):
        if (tally := ask("score", chunk, tuple(poison))) is not None:
            return tally
        if dies_twice(ask, ()):
            raise OSError("scoring processes die over a plain text too")
        poison = find_poison(ask, records)
    raise OSError(f"scoring processes die over records {records[0]} to {records[-1]} together, over none of them alone")


def find_poison(ask: Ask, records: Sequence[int]) -> list[int]:
    """The records over which a process dies twice where they stand alone, found by halves."""
    if len(records) == 1:
        return list(records) if dies_twice(ask, records) else []
    if ask("probe", records) is not None:
        return []
    middle = len(records) // 2
    return find_poison(ask, records[:middle]) + find_poison(ask, records[middle:])


def dies_twice(ask: Ask, records: Sequence[int]) -> bool:
    """Whether a process dies over records, or a plain text where they are none, and another does too."""
    return all(ask("probe", records) is None for _ in range(2))
