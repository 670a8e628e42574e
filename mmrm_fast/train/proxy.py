"""The text-only proxy of a training, in its several forms; `parse_proxy` says which, and nothing else asks."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mmrm_fast.checkpoint.folder import Checkpoint, CheckpointFolder
from mmrm_fast.config import TrainConfig
from mmrm_fast.data.images import white_tile
from mmrm_fast.data.lines import Rows, open_rows
from mmrm_fast.data.packing import Packed, PackedBatch
from mmrm_fast.data.samples import Sample
from mmrm_fast.files import json_lines
from mmrm_fast.model.lora import MAIN, PROXY, TwoAdapterModel, add_lora
from mmrm_fast.train import sharding
from mmrm_fast.train.branch import AdapterBranch, Branch, add_adapters, freeze
from mmrm_fast.train.loss import margins, preference_loss

Opener = Callable[[CheckpointFolder, bool], Checkpoint]  # (folder, whether its language model alone is wanted)


class Proxy:
    """No proxy: a standard training. The kinds below say what differs; nothing is read to make one."""

    scores_tests = False  # whether it gives rewards to the test sets

    def __init__(self, config: TrainConfig):
        self.config = config

    @cached_property
    def model_folder(self) -> CheckpointFolder:
        """Where the model is."""
        return CheckpointFolder(self.config.weights.model)

    def problems(self) -> Iterator[str]:
        """Options that contradict the kind."""
        yield from ()

    def branches(self, open_checkpoint: Opener) -> list[Branch]:
        """The rewards that train, the model's first: parts frozen, adapters added, not yet sharded."""
        weights, checkpoint = self.config.weights, open_checkpoint(self.model_folder, False)
        freeze(checkpoint.model, weights)
        add_adapters(checkpoint.model, weights)
        return [Branch(MAIN, checkpoint.model, checkpoint, self.model_folder, weights.lora_alpha / weights.lora_r)]

    def files(self) -> list[Rows]:
        """Files that it reads beside the records."""
        return []

    def margins(self, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor | None:
        """The proxy's margins [P], its backward pass done, if there is one; `batch` is `packed.batch` on the device."""
        return None


class TrainedProxy(Proxy):
    """A proxy that is the second branch."""

    scores_tests = True

    def margins(self, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor:
        rewards = branches[1](batch.text, batch.text_tiles)
        preference_loss(rewards, None, batch, label_smoothing=self.config.loss.label_smoothing).main.backward()
        return margins(rewards.detach(), batch)

    def see_white(self, checkpoint: Checkpoint) -> bool:
        """Run a frozen vision tower on the proxy's white tile, once for the whole training; whether it can be so."""
        weights = self.config.weights
        if self.config.proxy.proxy_image == "none" or not weights.freeze_backbone or weights.vision_lora:
            return False
        tile = torch.from_numpy(white_tile(checkpoint.tiling.tile_size))
        checkpoint.model.keep_only(tile.to(checkpoint.model.score.weight.device))
        return True


class ModelProxy(TrainedProxy):
    """`full`, or a folder: a model of its own, a copy of the main one's or a smaller one with the same tokenizer."""

    def __init__(self, config: TrainConfig, path: str | Path | None = None):
        super().__init__(config)
        self.path = path

    @cached_property
    def folder(self) -> CheckpointFolder:
        """Where the proxy is."""
        return self.model_folder if self.path is None else CheckpointFolder(self.path)

    def branches(self, open_checkpoint: Opener) -> list[Branch]:
        vocabularies = [own.tokenizer.get_vocab() for own in (self.model_folder, self.folder) if own.has_tokenizer]
        if vocabularies[1:] and vocabularies[0] != vocabularies[1]:
            raise ValueError(f"--proxy-model {self.path}: its tokenizer is not that of {self.model_folder.path}")
        (main,) = super().branches(open_checkpoint)
        weights, checkpoint = self.config.weights, open_checkpoint(self.folder, self.config.proxy.proxy_image == "none")
        freeze(checkpoint.model, replace(weights, freeze_llm=False))
        if self.see_white(checkpoint):
            checkpoint.model.model.vision_tower = None
        add_adapters(checkpoint.model, weights)
        return [main, replace(main, name=PROXY, root=checkpoint.model, checkpoint=checkpoint, folder=self.folder)]


class AdapterProxy(TrainedProxy):
    """`lora`: a second adapter on the model's own frozen weights."""

    def problems(self) -> Iterator[str]:
        if not self.config.weights.llm_lora:
            yield "--proxy-model lora: model and proxy are adapters on frozen weights, add --llm-lora"

    def branches(self, open_checkpoint: Opener) -> list[Branch]:
        (main,) = super().branches(open_checkpoint)
        self.see_white(main.checkpoint)
        add_lora(main.root.model.language_model, self.config.weights, PROXY)
        root = TwoAdapterModel(main.root)
        return [AdapterBranch(name, root, main.checkpoint, main.folder, main.lora_scale) for name in (MAIN, PROXY)]


class FileProxy(Proxy):
    """A file of margins that were computed before."""

    def __init__(self, config: TrainConfig, path: Path):
        super().__init__(config)
        self.path = path

    @cached_property
    def file(self) -> "ProxyMargins":
        """What it holds."""
        return ProxyMargins(self.path)

    def problems(self) -> Iterator[str]:
        start, records = f"--proxy-model {self.path}: margins are by", self.config.records
        if records.pairs != "all":
            yield f"{start} pair of a whole record, not with --pairs {records.pairs}"
        if len(records.data) > 1:
            yield f"{start} record of one file, --data has {len(records.data)}"

    def files(self) -> list[Rows]:
        return open_rows([self.path], ())

    def margins(self, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor:
        return self.file.of(packed.samples).to(batch.chosen_P.device)


def parse_proxy(config: TrainConfig) -> Proxy:
    """What `--robust` and `--proxy-model` ask for. Raises `ValueError`."""
    name, kinds = config.proxy.proxy_model, {"full": ModelProxy, "lora": AdapterProxy}
    if not config.proxy.robust:
        return Proxy(config)
    if name in kinds:
        return kinds[name](config)
    if Path(name).is_dir():
        return ModelProxy(config, name)
    if Path(name).is_file():
        return FileProxy(config, Path(name))
    raise ValueError(f"--proxy-model {name}: not `full`, `lora`, a folder or a file")


def make_branches(proxy: Proxy, device: torch.device) -> list[Branch]:
    """The rewards that train, the model's first, loaded and sharded."""
    config = proxy.config
    own_shards = reads_own_shards(config)

    def open_checkpoint(folder: CheckpointFolder, is_text_only: bool) -> Checkpoint:
        checkpoint = folder.load(max_length=config.batch.max_length, with_weights=False)
        if is_text_only:
            checkpoint.model.drop_vision()
        if not own_shards:
            folder.fill(checkpoint.model)
        return checkpoint.configured(config.batch)

    branches = proxy.branches(open_checkpoint)
    for root in dict.fromkeys(branch.root for branch in branches):
        sharding.shard(root, device, config.memory)
    for branch in branches if own_shards else ():
        branch.folder.fill(branch.root, "cpu" if sharding.offloads(device, config.memory) else device)
    return branches


def reads_own_shards(config: TrainConfig) -> bool:
    """Whether a rank reads its own shards alone, after sharding.

    Adapters rename the weights that they wrap and a white tile passes through the whole vision tower: with them every
    rank loads all weights first.
    """
    has_adapters = config.weights.llm_lora or config.weights.vision_lora
    return sharding.num_ranks() > 1 and not has_adapters and config.proxy.proxy_image == "none"


class ProxyMargins:
    """Text-only margins r(chosen) - r(rejected) from a JSONL file, one row a pair: what a proxy would compute.

    Rows hold `record` (position in the training file), `chosen` and `rejected` (positions in the record) and
    `proxy_margin`: `eval-NAME.jsonl` of a robust run that had the training file as a test set.
    """

    def __init__(self, path: Path):
        self.path = path
        self.margins: dict[tuple[int, int, int], float] = {}
        for source, row in json_lines(path):
            try:
                self.margins[row["record"], row["chosen"], row["rejected"]] = float(row["proxy_margin"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{source}: not a row of record, chosen, rejected, proxy_margin: {error}") from None

    def of(self, samples: Iterable[Sample]) -> Tensor:
        """The margins [P] of a batch's pairs, float32."""
        keys = [key for sample in samples for key in pair_keys(sample)]
        missing = [key for key in keys if key not in self.margins]
        if missing:
            raise ValueError(f"{self.path}: no margin for record {missing[0][0]}, responses {missing[0][1:]}")
        return torch.tensor([self.margins[key] for key in keys], dtype=torch.float32)


def pair_keys(sample: Sample) -> Iterator[tuple[int, int, int]]:
    """(record, chosen, rejected) of a sample's pairs, by the responses' places in the record."""
    places = sample.group.places
    for pair in sample.group.pairs:
        yield sample.group.record, places[pair.chosen], places[pair.rejected]
