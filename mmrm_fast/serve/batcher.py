"""Dynamic batching: samples of different requests wait a few milliseconds for each other and share forwards."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from mmrm_fast.data.packing import Packed, PackedBatch
from mmrm_fast.data.prompt import Encoded
from mmrm_fast.data.records import Group, RecordError
from mmrm_fast.data.samples import Sample
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.scorer import Scorer

MAX_DELAY = 0.003  # seconds that a batch under the budget waits for company
AHEAD = 3  # batches decoded, packed or in the model at a time: one that decodes for long does not stop the rest
# Decoding a photo gives 31 (PNG) to 123 (BMP) Mpx/s a core, 67 as JPEG, measured; a GPU is taken for 20,000 tokens/s.
PIXELS_PER_TOKEN = 2_000
PIECES = 8  # of a batch's budget: a small request is less than one, a larger one takes a place a piece
LARGE_PIXELS = 16_000_000  # of a sample that are decoded before it queues, so that no place waits for them
NICENESS = 5  # of the threads that do so, beside those of the model


@dataclass(frozen=True, eq=False)
class Waiting:
    """A sample in the queue and where its outcome is awaited."""

    sample: Sample
    outcome: asyncio.Future
    shared_cost: int  # paid once by all that ask about the same prompt and images
    own_cost: int
    request_cost: int = 0  # of all entries of its request
    tiles: list[np.ndarray] | None = None  # where its pictures are decoded already

    @property
    def key(self) -> tuple:
        group = self.sample.group
        return group.prompt, group.tools, group.images

    @property
    def cost(self) -> int:
        """Its work, were it alone."""
        return self.shared_cost + self.own_cost


Batch = list[list[Waiting]]  # the entries of one merged sample together


class Batcher:
    """Batches what is waiting up to the scorer's token budget, by turns the oldest and the least work first.

    So a line overtakes what large requests have waiting, and no stream of lines holds up a large one: whatever waits
    for w of older work is begun after 2w, or, if it is large and small requests keep coming, after the batches that its
    pieces and the older ones are, twice. (Start-time fair queueing, Goyal, Vin and Cheng 1996, with a flow a request
    would hold it up for ever, since virtual time stands still while each new request starts at it.)

    While the model runs one batch, threads decode and pack others. Samples with the same prompt and images are merged,
    so that prefix and images are read, decoded and computed once; the budget counts them so, and pixels to decode.

    Args:
        scorer: its `tokens_per_micro_batch` is the budget of one batch.
        on_batch: is shown every packed batch that has been scored.
    """

    def __init__(self, scorer: Scorer, *, on_batch: Callable[[PackedBatch], None] = lambda batch: None):
        self.scorer, self.on_batch = scorer, on_batch
        self.queue: list[Waiting] = []
        self.is_oldest_s_turn = True
        self.arrived, self.places = asyncio.Event(), asyncio.Semaphore(AHEAD)
        self.packers, self.model = ThreadPoolExecutor(AHEAD - 1), ThreadPoolExecutor(1 + scorer.num_ahead)
        self.decoders = ThreadPoolExecutor(1, initializer=give_way)
        self.running: set[asyncio.Task] = set()  # the loop and its batches

    def pieces(self, sample: Sample) -> list[Sample]:
        """The sample, cut between responses, so that small requests wait for none of it for long.

        Pieces that share a batch are merged again; at most, each computes as much for its responses as for what they
        share.
        """
        shared = self.scorer.shared_cost(sample)
        return self.scorer.split(sample, shared + max(shared, self.scorer.tokens_per_micro_batch // PIECES))

    async def decoded(self, sample: Sample, pixels: int) -> list[np.ndarray] | None:
        """The tiles of a sample of many pixels, None of another; a cancelled call decodes its picture and no more.

        Raises:
            RecordError: a picture that cannot be decoded.
        """
        if pixels < LARGE_PIXELS:
            return None
        loop, tiles = asyncio.get_running_loop(), []
        for group in by_image(sample.group):
            tiles += await loop.run_in_executor(self.decoders, self.scorer.preparer.tiles, group)
        return tiles

    async def score(
        self, samples: Sequence[Sample], pixels: Sequence[int] = (), tiles: Sequence[list[np.ndarray] | None] = ()
    ) -> list[Scored | RecordError]:
        """The outcome of each sample of a request, in order; a cancelled call leaves the queue.

        Args:
            samples: of the request.
            pixels: of each sample's pictures, before they are tiles; none where not given.
            tiles: of each sample whose pictures are `decoded`.

        Raises:
            What the model raised.
        """
        if not self.running:
            self.start(self.run())
        loop, costs, count = asyncio.get_running_loop(), [], len(samples)
        pixels, tiles = pixels or [0] * count, tiles or [None] * count
        for sample, to_decode, known in zip(samples, pixels, tiles, strict=True):
            shared = self.scorer.shared_cost(sample)
            to_decode = to_decode // PIXELS_PER_TOKEN if known is None else 0
            costs.append((shared + to_decode, self.scorer.cost(sample) - shared))
        whole = sum(map(sum, costs))
        entries = [
            Waiting(sample, loop.create_future(), *cost, whole, own)
            for sample, cost, own in zip(samples, costs, tiles, strict=True)
        ]
        self.queue += entries
        self.arrived.set()
        outcomes = await asyncio.gather(*(entry.outcome for entry in entries), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, RecordError):
                raise outcome
        return outcomes

    def start(self, work: Coroutine) -> asyncio.Task:
        """Run it beside all else, and keep it from being collected."""
        task = asyncio.ensure_future(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    async def run(self) -> None:
        """Batch without end, each batch taken as late as there is a place for it."""
        while True:
            await self.arrived.wait()
            if sum(entry.cost for entry in self.queue) < self.scorer.tokens_per_micro_batch:
                await asyncio.sleep(MAX_DELAY)
            await self.places.acquire()
            if batch := self.take():
                self.start(self.score_batch(batch)).add_done_callback(lambda _: self.places.release())
            else:
                self.places.release()

    async def score_batch(self, batch: Batch) -> None:
        """Decode, pack and run a batch, and hand out what came of it; nothing that nobody waits for any more."""
        loop = asyncio.get_running_loop()
        try:
            packed = await loop.run_in_executor(self.packers, self.pack, batch)
            outcomes = await loop.run_in_executor(self.model, self.forward, batch, packed)
        except Exception as error:
            return await self.score_halves(batch, error)
        if not outcomes:
            return
        self.on_batch(packed.batch)
        for merged, outcome in zip(batch, outcomes, strict=True):
            for entry, own in zip(merged, unmerge(merged, outcome), strict=True):
                if not entry.outcome.done():
                    entry.outcome.set_result(own)

    async def score_halves(self, batch: Batch, error: Exception) -> None:
        """A batch that failed as a whole, half by half, so that only the entry at fault gets the error."""
        entries = [entry for merged in batch for entry in merged if not entry.outcome.done()]
        if len(entries) == 1:
            entries[0].outcome.set_exception(error)
            return
        middle = len(entries) // 2
        for half in filter(None, (entries[:middle], entries[middle:])):
            await self.score_batch(by_key(half))

    def pack(self, batch: Batch) -> Packed:
        return self.scorer.packed(batch, lambda entries: (merge(entries), self.tiles(entries)))

    def forward(self, batch: Batch, packed: Packed) -> list[Scored | RecordError]:
        """The outcomes of a packed batch; none where nobody waits for it."""
        return self.scorer.score_packed(packed) if any(map(is_awaited, batch)) else []

    def tiles(self, entries: Sequence[Waiting]) -> list[np.ndarray]:
        """The tiles of merged entries' pictures; `RecordError` as soon as all who asked are gone."""
        known = next((entry.tiles for entry in entries if entry.tiles is not None), None)
        if known is not None:
            return known
        group, tiles = entries[0].sample.group, []
        for own in by_image(group):
            if not is_awaited(entries):
                raise RecordError(group.source, "", "nobody waits for it")
            tiles += self.scorer.preparer.tiles(own)
        return tiles

    def take(self) -> Batch:
        """The first entries that fit one batch, and whoever shares their prompt and images while there is room.

        While small requests wait, a large one gives way: it has a piece in every other batch.
        """
        order = self.queue if self.is_oldest_s_turn else sorted(self.queue, key=lambda entry: entry.request_cost)
        budget, total, full = self.scorer.tokens_per_micro_batch, 0, False
        small = budget // PIECES
        gives_way = any(entry.request_cost <= small and not entry.outcome.done() for entry in order)
        room = small if self.is_oldest_s_turn else 0  # for what gives way
        self.is_oldest_s_turn = not self.is_oldest_s_turn
        keys, taken, left = set(), [], set()
        for entry in order:
            if entry.outcome.done():  # cancelled while it waited
                continue
            known = entry.key in keys
            cost = entry.own_cost + (0 if known else entry.shared_cost)
            fits = not taken or total + cost <= budget
            if gives_way and entry.request_cost > small:
                may = room == small or (known and entry.own_cost <= room)
                room -= entry.own_cost if may else 0
            else:
                may, full = True, full or not (known or fits)
            if may and fits and (known or not full):
                keys.add(entry.key)
                taken.append(entry)
                total += cost
            else:
                left.add(entry)
        self.queue = [entry for entry in self.queue if entry in left]
        if not left:
            self.arrived.clear()
        return by_key(taken)


def give_way() -> None:
    """Let the other threads of this process go first, where threads have a niceness of their own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def by_image(group: Group) -> Iterator[Group]:
    """The group without images, then with each of them alone."""
    for images in ((), *((image,) for image in group.images)):
        yield replace(group, images=images)


def is_awaited(entries: Iterable[Waiting]) -> bool:
    """Whether anyone still waits for one of them."""
    return not all(entry.outcome.done() for entry in entries)


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
