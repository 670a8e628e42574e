"""Rewards of records with one model, on one device or several, through the preparation and packing of training."""

import io
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmrm_fast.checkpoint.folder import Checkpoint, CheckpointFolder
from mmrm_fast.data.images import Compat
from mmrm_fast.data.packing import Packed, pack_items
from mmrm_fast.data.records import Group, Pairs, RecordError, parse_group
from mmrm_fast.data.samples import Preparer, Sample, same_sides
from mmrm_fast.data.schedule import balance, cut
from mmrm_fast.model.placement import fewest_devices
from mmrm_fast.score.scored import Scored, join

TOKENS_PER_MICRO_BATCH = 16_384
BUDGETS_A_RECORD = 4  # micro-batches' work that one record may be: cut, its parts would each compute the prefix again
SPREAD_RECORDS, SPREAD_RESPONSES = 8, ["yes " * count for count in (1, 8, 64)]
READ_SECONDS = 60.0  # that an image's disk may take
NUM_PACKERS = 2  # threads that decode and pack ahead of the model


class Scorer:
    """A reward model ready to score.

    scorer = Scorer.from_pretrained("runs/robust/final")
    scorer.score([{"prompt": "What is this?", "img_path": "cat.png", "responses": ["A cat.", "A dog."]}])
    """

    def __init__(self, checkpoint: Checkpoint, *, tokens_per_micro_batch: int = TOKENS_PER_MICRO_BATCH):
        self.checkpoint, self.tokens_per_micro_batch = checkpoint, tokens_per_micro_batch
        self.model = checkpoint.model.eval()
        self.device = self.model.model.get_input_embeddings().weight.device  # that batches go to
        gpus = {parameter.device for parameter in self.model.parameters() if parameter.is_cuda}
        self.num_ahead = len(gpus)  # forwards that are begun before one is read
        self.preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, seconds=READ_SECONDS)
        self.lock = threading.Lock()  # one forward is begun at a time, whoever calls

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
            device: `auto` is the CPU, or as few of the GPUs that this process sees as hold the model; or names such as
                "cuda:0,cuda:1", over which its layers are placed in that order.
            dtype: `auto` is bfloat16 on CUDA and float32 on the CPU; or a torch dtype's name.
            max_length, max_tiles: override what the checkpoint says.
            compat: `reference` prepares texts and pictures as the reference implementation does.
            tokens_per_micro_batch: work of one forward, see `config.BatchConfig`.

        Raises:
            ValueError: the folder is not a reward model, or fills the GPUs.
        """
        devices = named_devices(device)
        default = torch.bfloat16 if devices[0].type == "cuda" else torch.float32
        folder = CheckpointFolder(path)
        folder.require_reward_model()
        checkpoint = folder.load(
            dtype=default if dtype == "auto" else getattr(torch, dtype),
            max_length=max_length,
            max_tiles=max_tiles,
            compat=compat,
            with_weights=False,
        )
        if devices[0].type == "cuda":
            memories = [torch.cuda.get_device_properties(own).total_memory for own in devices]
            at_least = 1 if device == "auto" else len(devices)
            devices = devices[: fewest_devices(checkpoint.model, memories, path=path, at_least=at_least)]
        folder.fill(checkpoint.model, *devices)
        return cls(checkpoint, tokens_per_micro_batch=tokens_per_micro_batch)

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

        While the model runs on one micro-batch, the next is on its way to it, and threads decode and pack others.
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
        for places, begun in zip(batches, ahead(map(self.begin, packed), self.num_ahead), strict=True):
            for place, outcome in zip(places, begun.outcomes(), strict=True):
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
        return self.packed(samples, lambda sample: (sample, self.preparer.tiles(sample.group)))

    def packed(self, items: Sequence, prepare: Callable) -> Packed:
        """One batch of what `prepare` makes of the items, see `pack_items`; a GPU fetches it while it computes."""
        packed = pack_items(self.preparer, items, prepare)
        return packed.pin_memory() if self.device.type == "cuda" else packed

    def score_packed(self, packed: Packed) -> list[Scored | RecordError]:
        """One forward: the outcome of each sample that `pack` was given, in order."""
        return self.begin(packed).outcomes()

    @torch.inference_mode()
    def begin(self, packed: Packed) -> "Begun":
        """Begin a forward, for which a GPU is not waited. One thread at a time does."""
        with self.lock:
            batch = packed.batch.to(self.device)
            rewards = self.model(batch.main, batch.tiles)
            on_host, event = rewards.to("cpu", non_blocking=True), torch.cuda.Event
            stream = torch.cuda.current_stream(rewards.device) if rewards.is_cuda else None
            return Begun(packed, on_host, stream and stream.record_event(event(blocking=True)))


@dataclass(frozen=True, eq=False)
class Begun:
    """A forward whose rewards are on their way to the host."""

    packed: Packed
    rewards_R: Tensor  # on the host, when `done` has happened
    done: torch.cuda.Event | None

    def outcomes(self) -> list[Scored | RecordError]:
        """The outcome of each sample that was to be packed, in order; waits for the forward."""
        if self.done is not None:
            self.done.synchronize()
        rewards, scored = iter(self.rewards_R.tolist()), []
        for sample, count in zip(self.packed.samples, self.packed.batch.num_responses, strict=True):
            unshared, own = sample.num_tokens_unshared, tuple(islice(rewards, count))
            tokens = unshared - sample.main.prefix_length * (count - 1)
            scored.append(Scored(sample.group, own, sample.main.truncated, (), tokens, unshared))
        for place in sorted(self.packed.errors):
            scored.insert(place, self.packed.errors[place])
        return scored


def named_devices(device: str) -> list[torch.device]:
    """The devices of names with commas between them; of `auto` all GPUs that this process sees, or the CPU."""
    gpus = range(torch.cuda.device_count() if device == "auto" and torch.cuda.is_available() else 0)
    names = [f"cuda:{gpu}" for gpu in gpus] or device.replace("auto", "cpu").split(",")
    return [torch.device(name) for name in names]


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
        for future in ahead((pool.submit(function, item) for item in items), num_threads):
            yield future.result()


def ahead(items: Iterable, count: int) -> Iterator:
    """The items, each as soon as so many after it have been made."""
    made = deque()
    for item in items:
        made.append(item)
        if len(made) > count:
            yield made.popleft()
    yield from made
