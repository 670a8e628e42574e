"""Rewards of records with one model on one device, through the same preparation, packing and model as training."""

import io
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from mmrm_fast.checkpoint.folder import Checkpoint, CheckpointFolder
from mmrm_fast.data.images import Compat
from mmrm_fast.data.packing import Packed, pack_items
from mmrm_fast.data.records import Group, Pairs, RecordError, parse_group
from mmrm_fast.data.samples import Preparer, Sample, same_sides
from mmrm_fast.data.schedule import balance, cut
from mmrm_fast.score.scored import Scored, join

TOKENS_PER_MICRO_BATCH = 16_384
BUDGETS_A_RECORD = 4  # micro-batches' work that one record may be: cut, its parts would each compute the prefix again
SPREAD_RECORDS, SPREAD_RESPONSES = 8, ["yes " * count for count in (1, 8, 64)]
READ_SECONDS = 60.0  # that an image's disk may take
FILLED = 0.9  # of a GPU at most, by the weights
GIB = 1 << 30
NUM_PACKERS = 2  # threads that decode and pack ahead of the model


class Scorer:
    """A reward model ready to score.

    scorer = Scorer.from_pretrained("runs/robust/final")
    scorer.score([{"prompt": "What is this?", "img_path": "cat.png", "responses": ["A cat.", "A dog."]}])
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, tokens_per_micro_batch: int = TOKENS_PER_MICRO_BATCH
    ):
        self.checkpoint, self.device = checkpoint, device
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.model = checkpoint.model.to(device).eval()
        self.preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, seconds=READ_SECONDS)
        self.lock = threading.Lock()  # one forward at a time, whoever calls

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        *,
        max_length: int | None = None,
        max_tiles: int | None = None,
        compat: Compat = None,
        tokens_per_micro_batch: int = TOKENS_PER_MICRO_BATCH,
    ) -> "Scorer":
        """Load a reward model's folder.

        Args:
            path: a local folder, such as runs/NAME/final.
            device: `auto` is CUDA where there is a GPU, else the CPU.
            dtype: `auto` is bfloat16 on CUDA and float32 on the CPU; or a torch dtype's name.
            max_length, max_tiles: override what the checkpoint says.
            compat: `reference` prepares texts and pictures as the reference implementation does.
            tokens_per_micro_batch: work of one forward, see `config.BatchConfig`.

        Raises:
            ValueError: the folder is not a reward model.
        """
        chosen = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
        )
        default = torch.bfloat16 if chosen.type == "cuda" else torch.float32
        folder = CheckpointFolder(path)
        folder.require_reward_model()
        checkpoint = folder.load(
            dtype=default if dtype == "auto" else getattr(torch, dtype),
            max_length=max_length,
            max_tiles=max_tiles,
            compat=compat,
            with_weights=False,
        )
        if chosen.type == "cuda":
            require_room(checkpoint.model, torch.cuda.get_device_properties(chosen).total_memory, path)
        folder.fill(checkpoint.model, chosen)
        return cls(checkpoint, chosen, tokens_per_micro_batch=tokens_per_micro_batch)

    def score(self, records: Iterable[Mapping]) -> list[list[float]]:
        """The reward of every response of every record, in order.

        Args:
            records: `{"prompt", "img_path", "responses"}`; `img_path` absent for text alone.

        Raises:
            RecordError: a record cannot be scored; the message names it and the field.
        """
        groups = [parse_group(fields, source=f"records[{i}]", record=i) for i, fields in enumerate(records)]
        results = self.score_groups(groups)
        for result in results:
            if isinstance(result, RecordError):
                raise result
        return [list(result.rewards) for result in results]

    def score_groups(self, groups: Sequence[Group | RecordError]) -> list[Scored | RecordError]:
        """Score groups; each place holds the group's rewards or the error that kept it from being scored.

        While the model runs on one micro-batch, threads decode and pack the next ones.
        """
        results: list[Scored | RecordError] = list(groups)
        samples: dict[int, Sample] = {}
        for place, group in enumerate(groups):
            try:
                if isinstance(group, Group):
                    samples[place] = self.encode(group)
            except RecordError as error:
                results[place] = error
        pieces = {place: self.split(sample) for place, sample in samples.items()}
        outcomes = iter(self.score_samples([piece for own in pieces.values() for piece in own]))
        for place, own in pieces.items():
            identical = same_sides(samples[place].main.sequences, groups[place].pairs.ends)
            results[place] = join(groups[place], [next(outcomes) for _ in own], tuple(identical.tolist()))
        return results

    def score_stream(self, groups: Iterable[Group | RecordError], at_once: int) -> Iterator[Scored | RecordError]:
        """What `score_groups` makes of groups without end, so many in one call."""
        queue = iter(groups)
        while chunk := list(islice(queue, at_once)):
            yield from self.score_groups(chunk)

    def score_samples(self, samples: Sequence[Sample]) -> list[Scored | RecordError]:
        outcomes: list = [None] * len(samples)
        costs = [self.cost(sample) for sample in samples]
        batches = [places for places in balance(costs, self.tokens_per_micro_batch, 1) if places]
        packed = prefetch(lambda places: self.pack([samples[place] for place in places]), batches)
        for places, batch in zip(batches, packed, strict=True):
            for place, outcome in zip(places, self.score_packed(batch), strict=True):
                outcomes[place] = outcome
        return outcomes

    def encode(self, group: Group) -> Sample:
        """A group as token keys, its images sized from their headers. Raises `RecordError`."""
        return self.preparer.sample(group)

    def cost(self, sample: Sample) -> int:
        """Work of a sample, in tokens after sharing."""
        return sample.cost(self.checkpoint.tokens_per_tile)

    def shared_cost(self, sample: Sample) -> int:
        """The part of `cost` that samples with the same prompt and images pay once."""
        return self.cost(take_responses(sample, slice(0)))

    def split(self, sample: Sample, limit: int | None = None) -> list[Sample]:
        """The sample, cut between responses where it is more work than `BUDGETS_A_RECORD` micro-batches, or `limit`."""
        limit, shared = limit or BUDGETS_A_RECORD * self.tokens_per_micro_batch, self.shared_cost(sample)
        if self.cost(sample) <= limit:
            return [sample]
        costs = [self.cost(take_responses(sample, slice(i, i + 1))) - shared for i in range(len(sample.main.sequences))]
        runs = cut(costs, max(limit - shared, 1))
        return [take_responses(sample, slice(run.start, run.stop)) for run in runs]

    def pack(self, samples: Sequence[Sample]) -> Packed:
        return pack_items(self.preparer, samples, lambda sample: (sample, self.preparer.tiles(sample.group)))

    @torch.inference_mode()
    def score_packed(self, packed: Packed) -> list[Scored | RecordError]:
        """One forward: the outcome of each sample that `pack` was given, in order. One thread at a time runs it."""
        with self.lock:
            batch = packed.batch.to(self.device)
            count = sum(batch.num_responses)
            rewards = self.model(batch.main, batch.tiles)[:count].split(list(batch.num_responses))
            values = [tuple(own.tolist()) for own in rewards]
        scored = []
        for sample, own in zip(packed.samples, values, strict=True):
            unshared = sample.num_tokens_unshared
            tokens = unshared - sample.main.prefix_length * (len(own) - 1)
            scored.append(Scored(sample.group, own, sample.main.truncated, (), tokens, unshared))
        for place in sorted(packed.errors):
            scored.insert(place, packed.errors[place])
        return scored


def require_room(model: nn.Module, available: int, path: str | Path) -> None:
    """Raise `ValueError` where a GPU of so many bytes holds no model of this size and a forward of it."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if needed > FILLED * available:
        raise ValueError(
            f"{path}: its weights take {needed / GIB:.1f} GiB, a GPU here has {available / GIB:.1f}: it is scored and "
            "served by one GPU, of which weights may fill nine tenths; use one with more memory"
        )


def batch_spread(scorer: Scorer) -> float:
    """The most that a reward changed with what shared its batch, over responses to texts and to a picture.

    It is rounding alone, below 1e-5 in fp32; what it is in bf16 depends on the machine's kernels.
    """
    file = io.BytesIO()
    Image.effect_noise((448, 448), 64).convert("RGB").save(file, "PNG")
    fields = [
        {"prompt": f"Question {i}?", "images": [file.getvalue()] * (i % 2), "responses": SPREAD_RESPONSES}
        for i in range(SPREAD_RECORDS)
    ]
    groups = [parse_group(own, source=f"probe {i}", record=i) for i, own in enumerate(fields)]
    changes = []
    for group, together in zip(groups, scorer.score_groups(groups), strict=True):
        alone = [scorer.score_groups([replace(group, responses=(text,))])[0] for text in group.responses]
        if isinstance(together, Scored):  # a maximum length may be too short for the picture
            changes += [abs(own.rewards[0] - reward) for own, reward in zip(alone, together.rewards, strict=True)]
    return max(changes, default=math.nan)


def take_responses(sample: Sample, chosen: slice) -> Sample:
    """The sample with some of its responses; no pairs."""
    main = replace(sample.main, sequences=sample.main.sequences[chosen], truncated=sample.main.truncated[chosen])
    group = replace(sample.group, responses=sample.group.responses[chosen], pairs=Pairs.of(), truth=None)
    return Sample(group, sample.tiles_per_image, main)


def prefetch(function: Callable, items: Iterable, num_threads: int = NUM_PACKERS) -> Iterator:
    """`map(function, items)` computed up to `num_threads` items ahead of what is asked for."""
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
