"""Rewards of records with one model on one device, through the same dataset, packing and model as training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmrm_fast.dataset import GroupDataset, Sample
from mmrm_fast.images import Compat
from mmrm_fast.loader import balance
from mmrm_fast.packing import MicroBatch, Packer
from mmrm_fast.records import Group, RecordError, parse_group
from mmrm_fast.weights import Checkpoint, load_checkpoint, require_reward_model

TOKENS_PER_MICRO_BATCH = 16_384


@dataclass(frozen=True)
class Scored:
    """One group with the reward of each response; `truncated` marks responses cut to `max_length`."""

    group: Group
    rewards: tuple[float, ...]
    truncated: tuple[bool, ...]


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
        self.encoder = checkpoint.prompt_encoder()

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
            tokens_per_micro_batch: work of one forward, see `config.DataConfig`.

        Raises:
            ValueError: the folder is not a reward model.
        """
        chosen = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
        )
        default = torch.bfloat16 if chosen.type == "cuda" else torch.float32
        require_reward_model(path)
        checkpoint = load_checkpoint(
            path,
            dtype=default if dtype == "auto" else getattr(torch, dtype),
            max_length=max_length,
            max_tiles=max_tiles,
            compat=compat,
        )
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
        """Score groups; each place holds the group's rewards or the error that kept it from being scored."""
        dataset = GroupDataset([], self.encoder, self.checkpoint.tiling)
        results: list = list(groups)
        samples: dict[int, Sample] = {}
        for place, group in enumerate(groups):
            try:
                if isinstance(group, Group):
                    samples[place] = dataset.encode(group)
            except RecordError as error:
                results[place] = error
        for places in self.micro_batches(samples):
            self.score_samples(dataset, {place: samples[place] for place in places}, results)
        return results

    def micro_batches(self, samples: dict[int, Sample]) -> list[list[int]]:
        """Places of the samples that share a forward."""
        places = list(samples)
        costs = [sample.cost(self.checkpoint.tokens_per_tile) for sample in samples.values()]
        bins = balance(costs, self.tokens_per_micro_batch, 1) if places else []
        return [[places[item] for item in items] for items in bins]

    @torch.inference_mode()
    def score_samples(self, dataset: GroupDataset, samples: dict[int, Sample], results: list) -> None:
        """One forward; fills the samples' places in `results`."""
        packed = Packer(dataset)[MicroBatch(tuple(samples.values()))]
        batch = packed.batch.to(self.device)
        count = sum(batch.num_responses)
        rewards = iter(self.model(batch.main, batch.tiles)[:count].split(list(batch.num_responses)))
        for number, (place, sample) in enumerate(samples.items()):
            if number in packed.errors:
                results[place] = packed.errors[number]
            else:
                results[place] = Scored(sample.group, tuple(next(rewards).tolist()), sample.main.truncated)
