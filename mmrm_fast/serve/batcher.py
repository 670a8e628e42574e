"""Dynamic batching: samples of different requests wait a few milliseconds for each other and share forwards."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from mmrm_fast.data.packing import PackedBatch
from mmrm_fast.data.prompt import Encoded
from mmrm_fast.data.records import RecordError
from mmrm_fast.data.samples import Sample
from mmrm_fast.score.scorer import Scored, Scorer


@dataclass(frozen=True)
class Waiting:
    """A sample in the queue and where its outcome is awaited."""

    sample: Sample
    outcome: asyncio.Future
    shared_cost: int  # paid once by all that ask about the same prompt and images
    own_cost: int

    @property
    def key(self) -> tuple:
        group = self.sample.group
        return group.prompt, group.tools, group.images


Batch = list[list[Waiting]]  # the entries of one merged sample together


class Batcher:
    """Batches what is waiting, oldest first, up to the scorer's token budget.

    While the model runs one batch, a thread decodes and packs the next. Samples with the same prompt and images are
    merged, so that prefix and images are read, decoded and computed once; the budget counts them so.

    Args:
        scorer: its `tokens_per_micro_batch` is the budget of one batch.
        max_delay: seconds that a batch under the budget waits for company.
        on_batch: is shown every packed batch that has been scored.
    """

    def __init__(
        self, scorer: Scorer, *, max_delay: float = 0.003, on_batch: Callable[[PackedBatch], None] = lambda batch: None
    ):
        self.scorer, self.max_delay, self.on_batch = scorer, max_delay, on_batch
        self.queue: deque[Waiting] = deque()
        self.arrived = asyncio.Event()
        self.threads = ThreadPoolExecutor(2)
        self.running: asyncio.Task | None = None

    async def score(self, samples: Sequence[Sample]) -> list[Scored | RecordError]:
        """The outcome of each sample, in order; a cancelled call leaves the queue. Raises what the model raised."""
        self.running = self.running or asyncio.create_task(self.run())
        loop = asyncio.get_running_loop()
        entries = []
        for sample in samples:
            shared = self.scorer.shared_cost(sample)
            entries.append(Waiting(sample, loop.create_future(), shared, self.scorer.cost(sample) - shared))
        self.queue.extend(entries)
        self.arrived.set()
        outcomes = await asyncio.gather(*(entry.outcome for entry in entries), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, RecordError):
                raise outcome
        return outcomes

    async def run(self) -> None:
        """Batch without end: pack one batch while the one before it is in the model."""
        forward: asyncio.Future | None = None
        while True:
            await self.arrived.wait()
            if self.waiting_cost() < self.scorer.tokens_per_micro_batch:
                await asyncio.sleep(self.max_delay)
            if not (batch := self.take()):
                continue
            packing = self.pack(batch)
            if forward is not None:
                await forward
            forward = asyncio.ensure_future(self.finish(batch, packing))

    def pack(self, batch: Batch) -> asyncio.Future:
        """Begin to decode and pack a batch."""
        samples = [merge(entries) for entries in batch]
        return asyncio.get_running_loop().run_in_executor(self.threads, self.scorer.pack, samples)

    async def finish(self, batch: Batch, packing: asyncio.Future) -> None:
        """Run a packed batch through the model and hand out what came of it."""
        try:
            packed = await packing
            loop = asyncio.get_running_loop()
            outcomes = await loop.run_in_executor(self.threads, self.scorer.score_packed, packed)
        except Exception as error:
            return await self.finish_halves(batch, error)
        self.on_batch(packed.batch)
        for merged, outcome in zip(batch, outcomes, strict=True):
            for entry, own in zip(merged, unmerge(merged, outcome), strict=True):
                if not entry.outcome.done():
                    entry.outcome.set_result(own)

    async def finish_halves(self, batch: Batch, error: Exception) -> None:
        """A batch that failed as a whole, half by half, so that only the entry at fault gets the error."""
        entries = [entry for merged in batch for entry in merged if not entry.outcome.done()]
        if len(entries) == 1:
            entries[0].outcome.set_exception(error)
            return
        middle = len(entries) // 2
        for half in filter(None, (entries[:middle], entries[middle:])):
            again = by_key(half)
            await self.finish(again, self.pack(again))

    def waiting_cost(self) -> int:
        """An upper bound of the work in the queue."""
        return sum(entry.shared_cost + entry.own_cost for entry in self.queue)

    def take(self) -> Batch:
        """The oldest entries that fit one batch, and whoever shares their prompt and images while there is room."""
        budget, total, full = self.scorer.tokens_per_micro_batch, 0, False
        keys, taken, left = set(), [], deque()
        for entry in self.queue:
            if entry.outcome.done():  # cancelled while it waited
                continue
            known = entry.key in keys
            cost = entry.own_cost + (0 if known else entry.shared_cost)
            fits = not taken or total + cost <= budget
            full = full or not (known or fits)
            if fits and (known or not full):
                keys.add(entry.key)
                taken.append(entry)
                total += cost
            else:
                left.append(entry)
        self.queue = left
        if not left:
            self.arrived.clear()
        return by_key(taken)


def by_key(entries: Iterable[Waiting]) -> Batch:
    """Entries that share prompt and images together, in the order of the first of each."""
    batch: dict[tuple, list[Waiting]] = {}
    for entry in entries:
        batch.setdefault(entry.key, []).append(entry)
    return list(batch.values())


def merge(entries: Sequence[Waiting]) -> Sample:
    """One sample with all responses of samples that have the same prompt and images."""
    samples = [entry.sample for entry in entries]
    first = samples[0]
    responses = tuple(response for sample in samples for response in sample.group.responses)
    main = Encoded(
        tuple(sequence for sample in samples for sequence in sample.main.sequences),
        first.main.prefix_length,
        tuple(cut for sample in samples for cut in sample.main.truncated),
    )
    return Sample(replace(first.group, responses=responses), first.tiles_per_image, main)


def unmerge(entries: Sequence[Waiting], outcome: Scored | RecordError) -> list[Scored | RecordError]:
    """The merged sample's outcome as one of each entry."""
    if isinstance(outcome, RecordError):
        return [RecordError(entry.sample.group.source, outcome.field, outcome.reason) for entry in entries]
    outcomes, first = [], 0
    for entry in entries:
        own = slice(first, first := first + len(entry.sample.group.responses))
        outcomes.append(Scored(entry.sample.group, outcome.rewards[own], outcome.truncated[own]))
    return outcomes
