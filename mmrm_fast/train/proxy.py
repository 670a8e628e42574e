"""The text-only proxy of a training, in its several forms; `parse_proxy` says which, and nothing else asks."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from mmrm_fast.checkpoint.fill import vision_output
from mmrm_fast.checkpoint.folder import Checkpoint, CheckpointFolder, refuse_pictures
from mmrm_fast.config import TrainConfig
from mmrm_fast.data.images import white_tile
from mmrm_fast.data.lines import Rows, open_rows
from mmrm_fast.data.mixture import PreferenceDataset
from mmrm_fast.data.packing import Packed, PackedBatch
from mmrm_fast.model.lora import MAIN, PROXY, TwoAdapterModel, add_lora
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.shortcuts.chunks import NgramFeatures, StateFeatures, states_of
from mmrm_fast.train import sharding
from mmrm_fast.train.branch import AdapterBranch, Branch, add_adapters, freeze
from mmrm_fast.train.loss import margins, preference_loss, with_balance
from mmrm_fast.train.margins import SHORTCUT, TRAIN, ProxyMargins, file_of, write_margins
from mmrm_fast.train.records import Inputs

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

    def branches(self, open_checkpoint: Opener) -> list[Branch]:
        """The rewards that train, the model's first: parts frozen, adapters added, not yet sharded."""
        weights = self.config.weights
        if self.model_folder.is_text:
            self.refuse_same_text()
            refuse_pictures(vision_lora=weights.vision_lora or None, freeze_mlp=weights.freeze_mlp or None)
        checkpoint = open_checkpoint(self.model_folder, False)
        freeze(checkpoint.model, weights)
        add_adapters(checkpoint.model, weights)
        return [Branch(MAIN, checkpoint.model, checkpoint, self.model_folder, weights.lora_alpha / weights.lora_r)]

    def refuse_same_text(self) -> None:
        """Raise `ValueError` for a proxy that would see all that a text model sees."""

    def files(self) -> list[Rows]:
        """Files that it reads beside the records."""
        return []

    def margins(self, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor | None:
        """The proxy's margins [P], its backward pass done, if there is one; `batch` is `packed.batch` on the device."""
        return None

    def test_margins(self, name: str, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor | None:
        """The proxy's margins [P] of a batch of a test set, if it has them."""
        return None

    def prepare(
        self, branches: list[Branch], inputs: Inputs, folder: Path, *, device: torch.device, resumed: bool,
        progress: Callable,
    ) -> None:  # fmt: skip
        """What the first step waits for, on every rank; a run that is resumed has it in its folder.

        Args:
            progress: (description) to a wrapper of an iteration.
        """


class TrainedProxy(Proxy):
    """A proxy that is the second branch."""

    scores_tests = True

    def refuse_same_text(self) -> None:
        raise ValueError(
            f"--robust with the text model {self.model_folder.path}: a proxy that is a model would see all that it "
            "sees; --proxy-model ngrams or margins of a file may know less"
        )

    def margins(self, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor:
        config = self.config.loss
        rewards, balance = branches[1].balanced(batch.text, batch.text_tiles, factor=config.router_aux_loss)
        loss = preference_loss(rewards, None, batch, label_smoothing=config.label_smoothing)
        with_balance(loss, config.router_aux_loss, balance).main.backward()
        return margins(rewards.detach(), batch)

    def test_margins(self, name: str, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor:
        return margins(branches[1](batch.text, batch.text_tiles), batch)

    def see_white(self, checkpoint: Checkpoint) -> bool:
        """Let a frozen vision tower run on the proxy's white tile once for the whole training; whether it can be so."""
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

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        if not config.weights.llm_lora:
            raise ValueError("--proxy-model lora: model and proxy are adapters on frozen weights, add --llm-lora")

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
    def file(self) -> ProxyMargins:
        """What it holds."""
        return ProxyMargins(self.path)

    def files(self) -> list[Rows]:
        return open_rows([self.path], ())

    def margins(self, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor:
        return self.file.of(packed.samples).to(batch.chosen_P.device, non_blocking=True)


class ShortcutProxy(FileProxy):
    """`ngrams`, `probe`, `auto`: margins that the run computes before its first step, without a model of their own.

    `ngrams` goes by what a response's words and form tell, `probe` by the model's states over text alone before it is
    trained, `auto` by the first of them that tells about as much as the second.
    """

    scores_tests = True

    def __init__(self, config: TrainConfig):
        super().__init__(config, Path(SHORTCUT, f"{TRAIN}.jsonl"))
        name = config.proxy.proxy_model
        self.kinds = ("ngrams", "probe") if name == "auto" else (name,)
        self.tests: dict[str, ProxyMargins] = {}

    def files(self) -> list[Rows]:
        return []  # the run's own

    def prepare(
        self, branches: list[Branch], inputs: Inputs, folder: Path, *, device: torch.device, resumed: bool,
        progress: Callable,
    ) -> None:  # fmt: skip
        self.path = folder / self.path
        names = [eval_set.name for eval_set in inputs.eval_sets]
        if not resumed:
            states = partial(self.states, branches[0].root, device)
            make = {"ngrams": lambda dataset: NgramFeatures(dataset.records), "probe": states}
            tests = dict(zip(names, inputs.eval_datasets, strict=True))
            options = {"seed": self.config.run.seed, "progress": progress}
            write_margins(self.path.parent, {kind: make[kind] for kind in self.kinds}, inputs.dataset, tests, **options)
        elif not self.path.is_file():
            raise ValueError(f"{self.path}: the margins that the run began with are not there")
        for name in names:
            path = self.path.with_name(f"{file_of(name)}.jsonl")
            if path.is_file():
                self.tests[name] = ProxyMargins(path)
            elif sharding.rank() == 0:
                print(f"{name}: was no test set when the run began, so the proxy has no margins of it")

    def states(self, root: RewardModel, device: torch.device, dataset: PreferenceDataset) -> StateFeatures:
        """The model's states over the texts of a data set."""
        return StateFeatures(
            dataset.records, dataset.preparer, states_of(root.eval(), device),
            self.config.batch.tokens_per_micro_batch, lambda number: max(sharding.gather_lists([number])),
        )  # fmt: skip

    def test_margins(self, name: str, branches: list[Branch], packed: Packed, batch: PackedBatch) -> Tensor | None:
        return self.tests[name].of(packed.samples) if name in self.tests else None


def parse_proxy(config: TrainConfig) -> Proxy:
    """What `--robust` and `--proxy-model` ask for. Raises `ValueError`."""
    name, kinds = config.proxy.proxy_model, {"full": ModelProxy, "lora": AdapterProxy}
    kinds |= dict.fromkeys(("ngrams", "probe", "auto"), ShortcutProxy)
    if not config.proxy.robust:
        return Proxy(config)
    if name in kinds:
        return kinds[name](config)
    if Path(name).is_dir():
        return ModelProxy(config, name)
    if Path(name).is_file():
        return FileProxy(config, Path(name))
    raise ValueError(f"--proxy-model {name}: not {', '.join(kinds)}, a folder or a file")


def make_branches(proxy: Proxy, device: torch.device) -> list[Branch]:
    """The rewards that train, the model's first: made without memory, sharded, then filled, each rank with its rows."""
    config = proxy.config

    def open_checkpoint(folder: CheckpointFolder, is_text_only: bool) -> Checkpoint:
        checkpoint = folder.load(max_length=config.batch.max_length, with_weights=False)
        if is_text_only:
            checkpoint.model.drop_vision()
        return checkpoint.configured(config.batch)

    with torch.device("meta"):
        branches = proxy.branches(open_checkpoint)
    for root, branch in {branch.root: branch for branch in branches}.items():
        sharding.shard(root, device, config.memory)
        branch.folder.fill(root, "cpu" if sharding.offloads(device, config.memory) else device)
        if root.only_tiles is not None:
            root.only_tiles = sharding.on_first_rank(partial(white_output, branch)).to(device)
    return branches


def white_output(branch: Branch) -> Tensor:
    """What a frozen vision tower makes of the white tile."""
    model = branch.folder.model()
    model.pixel_mean, model.pixel_std = branch.root.pixel_mean, branch.root.pixel_std
    tile = torch.from_numpy(white_tile(branch.checkpoint.tiling.tile_size))
    return vision_output(model, branch.folder.native(model), tile)
