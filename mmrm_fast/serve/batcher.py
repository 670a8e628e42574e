"""Dynamic batching: samples of different requests wait a few milliseconds for each other and share forwards."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
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
        return self.sample.group.prompt, self.sample.group.images


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
        """The outcome of each sample, in order; a cancelled call leaves the queue."""
        self.running = self.running or asyncio.create_task(self.run())
        loop = asyncio.get_running_loop()
        entries = []
        for sample in samples:
            shared = self.scorer.shared_cost(sample)
            entries.append(Waiting(sample, loop.create_future(), shared, self.scorer.cost(sample) - shared))
        self.queue.extend(entries)
        self.arrived.set()
        return list(await asyncio.gather(*(entry.outcome for entry in entries)))

    async def run(self) -> None:
        """Batch without end: pack one batch while the one before it is in the model."""
        loop = asyncio.get_running_loop()
        forward: asyncio.Future | None = None
        while True:
            await self.arrived.wait()
            if self.waiting_cost() < self.scorer.tokens_per_micro_batch:
                await asyncio.sleep(self.max_delay)
            if not (batch := self.take()):
                continue
            packing = loop.run_in_executor(self.threads, self.scorer.pack, [merge(entries) for entries in batch])
            if forward is not None:
                await forward
            forward = asyncio.ensure_future(self.finish(batch, packing))

    async def finish(self, batch: list[list[Waiting]], packing: asyncio.Future) -> None:
        """Run a packed batch through the model and hand out what came of it."""
        entries = [entry for merged in batch for entry in merged]
        try:
            packed = await packing
            loop = asyncio.get_running_loop()
            outcomes = await loop.run_in_executor(self.threads, self.scorer.score_packed, packed)
        except Exception as error:
            for entry in entries:
                if not entry.outcome.done():
                    entry.outcome.set_exception(error)
            return
        self.on_batch(packed.batch)
        for merged, outcome in zip(batch, outcomes, strict=True):
            for entry, own in zip(merged, unmerge(merged, outcome), strict=True):
                if not entry.outcome.done():
                    entry.outcome.set_result(own)

    def waiting_cost(self) -> int:
        """An upper bound of the work in the queue."""
        return sum(entry.shared_cost + entry.own_cost for entry in self.queue)

    def take(self) -> list[list[Waiting]]:
        """The oldest entries that fit one batch, and whoever shares their prompt and images while there is room."""
        budget, total = self.scorer.tokens_per_micro_batch, 0
        taken: dict[tuple, list[Waiting]] = {}
        left: deque[Waiting] = deque()
        full = False
        for entry in self.queue:
            if entry.outcome.done():  # cancelled while it waited
                continue
            cost = entry.own_cost + (0 if entry.key in taken else entry.shared_cost)
            full = full or (entry.key not in taken and bool(taken) and total + cost > budget)
            if taken and (total + cost > budget or (full and entry.key not in taken)):
                left.append(entry)
            else:
                taken.setdefault(entry.key, []).append(entry)
                total += cost
        self.queue = left
        if not left:
            self.arrived.clear()
        return list(taken.values())


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
