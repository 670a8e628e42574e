"""What a replica does: the records of requests to rewards, within limits, batched with those of other requests."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mmrm_fast.data.images import ImageError, image_size
from mmrm_fast.data.packing import PackedBatch
from mmrm_fast.data.records import Group, RecordError, parse_group
from mmrm_fast.data.samples import Sample
from mmrm_fast.data.types import RewardError
from mmrm_fast.score.scored import join
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.serve.batcher import Batcher
from mmrm_fast.serve.guard import Limits, Refused, Share

FEW_RESPONSES = 16
CHARACTERS_PER_TOKEN = 8  # more text than this a token is not even tokenised


class Answer(NamedTuple):
    """What came of a request's records, response by response."""

    rewards: list[float]
    truncated: list[bool]
    num_tokens: int  # of all sequences, as if nothing were shared
    work: Counter  # of the replica since its last answer, by the names of `metrics.WORK`


class RewardService:
    """One replica: scores the records of requests."""

    def __init__(self, scorer: Scorer, *, limits: Limits, image_root: Path | None = None):
        self.scorer, self.limits = scorer, limits
        self.image_root = image_root and image_root.resolve()
        self.pixels = Share(limits.replica_pixels)
        self.preparers = ThreadPoolExecutor(2), ThreadPoolExecutor(2)  # of small requests, which wait for no large one
        self.work, self.has_told = Counter(), False  # of a reward that is no number
        self.batcher = Batcher(scorer, on_batch=self.count_batch)

    def count_batch(self, batch: PackedBatch) -> None:
        """Count one forward."""
        self.work.update(batches=1, tokens=len(batch.main.source_T), tokens_unshared=batch.main.num_tokens_unshared)

    async def score(self, records: Sequence[dict], client: str = "") -> Answer | Refused:
        """Score records as parsed JSON, or say why not; where the call is cancelled, their work is dropped."""
        try:
            return await self.scored(records, client)
        except Refused as refused:
            return refused
        except RewardError as error:
            if not self.has_told:  # a broken model would fill the log
                logging.getLogger(__name__).error("%s; more of these are not logged", error)
            self.has_told = True
            return Refused(500, str(error), error.field)
        except RecordError as error:
            return Refused(422, self.without_root(str(error)), error.field or None)
        except Exception:
            logging.getLogger(__name__).exception("the model failed")
            return Refused(500, "the server failed; its log says why")

    def without_root(self, reason: str) -> str:
        """A reason with paths as the request had them."""
        return reason.replace(f"{self.image_root}/", "") if self.image_root else reason

    async def scored(self, records: Sequence[dict], client: str) -> Answer:
        """The answer. Raises `RecordError`, `Refused`, and what the model raised."""
        pool = self.preparers[sum(len(record["responses"]) for record in records) > FEW_RESPONSES]
        pieces, pixels = await asyncio.get_running_loop().run_in_executor(pool, self.prepare, records)
        if not self.pixels.take(client, sum(pixels)):
            raise Refused(429, "too many pixels are waiting already; try again later")
        try:
            tiles = [await self.batcher.decoded(parts[0], own) for parts, own in zip(pieces, pixels, strict=True)]
            each = [(piece, *own) for parts, *own in zip(pieces, pixels, tiles, strict=True) for piece in parts]
            outcomes = iter(await self.batcher.score(*zip(*each, strict=True)) if each else ())
        finally:
            self.pixels.give(client, sum(pixels))
        joined = [join(parts[0].group, [next(outcomes) for _ in parts]) for parts in pieces]
        for outcome in joined:
            if isinstance(outcome, RecordError):
                raise outcome
        rewards = [reward for scored in joined for reward in scored.rewards]
        work, self.work = self.work + Counter(responses=len(rewards)), Counter()
        return Answer(
            rewards,
            [cut for scored in joined for cut in scored.truncated],
            sum(part.num_tokens_unshared for parts in pieces for part in parts),
            work,
        )

    def prepare(self, records: Sequence[dict]) -> tuple[list[list[Sample]], list[int]]:
        """Records to samples in pieces, and each one's pixels; all is checked that can be without decoding pictures."""
        groups = [
            parse_group(fields, source=f"record {i}", record=i, image_root=self.image_root, confined=True)
            for i, fields in enumerate(records)
        ]
        limits, tile = self.limits, self.scorer.checkpoint.tokens_per_tile
        require(sum(len(group.responses) for group in groups), limits.responses, "responses")
        require(sum(map(len_text, groups)), limits.tokens * CHARACTERS_PER_TOKEN, "characters of text")
        require(sum(len(group.images) for group in groups), limits.tokens // max(tile, 1), "images")
        pixels = [count_pixels(group, limits.pixels) for group in groups]
        require(sum(pixels), limits.request_pixels, "pixels of all images")
        samples = [self.scorer.encode(group) for group in groups]
        require(sum(map(self.scorer.cost, samples)), limits.tokens, "tokens of work")
        return [self.batcher.pieces(sample) for sample in samples], pixels


def require(number: int, limit: int, what: str) -> None:
    """Raise `Refused` where there are too many."""
    if number > limit:
        raise Refused(422, f"{number} {what} are over the limit of {limit}")


def len_text(group: Group) -> int:
    """Characters of a group; a turn is more than its text."""
    turns = [group.prompt] if isinstance(group.prompt, str) else [turn.content + turn.extra for turn in group.prompt]
    return sum(
        len(text) + CHARACTERS_PER_TOKEN for text in (*turns, *group.responses, *group.tools, *(group.extras or ()))
    )


def count_pixels(group: Group, limit: int) -> int:
    """Pixels of a group's images by their headers. Raises `RecordError` for one of too many, or that is none."""
    total = 0
    for image in group.images:
        try:
            width, height = image_size(image)
        except ImageError as error:
            raise RecordError(group.source, "image", str(error)) from None
        if width * height > limit:
            raise RecordError(group.source, "image", f"{width} x {height} pixels are over the limit of {limit}")
        total += width * height
    return total
