"""The two rewards of a training: the model's, and that of the text-only proxy in its several forms."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrm_fast.checkpoint.folder import Checkpoint, CheckpointFolder
from mmrm_fast.config import ProxyConfig, TrainConfig, WeightsConfig
from mmrm_fast.data.packing import TokenPlan, white_tile
from mmrm_fast.data.samples import Sample
from mmrm_fast.files import json_lines
from mmrm_fast.model.lora import MAIN, PROXY, TwoAdapterModel, add_lora, merged
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.train import sharding


@dataclass(frozen=True)
class Branch:
    """One reward that is trained: `main` or `proxy`, as a function of its tokens (and tiles)."""

    name: str
    root: RewardModel  # both branches' where they are adapters of one model
    checkpoint: Checkpoint  # whose folder format its weights are saved in
    lora_scale: float

    def __call__(self, plan: TokenPlan, tiles_ISSC: Tensor | None = None) -> Tensor:
        """Rewards [R]."""
        shared = {"branch": self.name} if isinstance(self.root, TwoAdapterModel) else {}
        return self.root(plan, tiles_ISSC, **shared)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train for this reward, by name."""
        named = self.root.named_parameters()
        return {name: p for name, p in named if p.requires_grad and self.owns(name)}

    def owns(self, name: str) -> bool:
        """Whether a parameter of the root is this branch's."""
        if not isinstance(self.root, TwoAdapterModel):
            return True
        is_proxy = name.startswith("proxy_score.") or f".{PROXY}." in name
        return is_proxy == (self.name == PROXY)

    def state(self) -> dict[str, Tensor]:
        """The weights of a plain model, adapters merged, whole on the first rank. Called on every rank."""
        state = sharding.full_state(self.root)
        is_shared = isinstance(self.root, TwoAdapterModel)
        plain = merged(state, self.name if is_shared else MAIN, self.lora_scale)
        proxy_score = plain.pop("proxy_score.weight", None)
        if self.name == MAIN or not is_shared or not plain:
            return plain
        text_only = {name: value for name, value in plain.items() if name.startswith("model.language_model.")}
        return {**text_only, "score.weight": proxy_score}


def make_branches(config: TrainConfig, device: torch.device) -> list[Branch]:
    """Load, freeze, adapt and shard the models: the main branch and, unless its margins come from a file, the proxy."""
    main = load(config, config.weights.model)
    freeze(main.model, config.weights)
    checkpoints = {MAIN: main}
    if config.proxy.robust and config.proxy.proxy_model != "lora" and not proxy_file(config.proxy):
        checkpoints[PROXY] = load_proxy(config, main)
    for checkpoint in checkpoints.values():
        adapt(checkpoint.model, config.weights)
    roots = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
    if config.proxy.robust and config.proxy.proxy_model == "lora":
        see_white(main, config)
        add_lora(main.model.model.language_model, config.weights, PROXY)
        roots = dict.fromkeys((MAIN, PROXY), TwoAdapterModel(main.model))
        checkpoints[PROXY] = main
    for root in dict.fromkeys(roots.values()):
        sharding.shard(root, device, config.memory)
    if reads_own_shards(config):
        for checkpoint, folder in zip(checkpoints.values(), (config.weights.model, proxy_folder(config)), strict=False):
            own = "cpu" if sharding.offloads(device, config.memory) else device
            CheckpointFolder(folder).fill(checkpoint.model, own)
    scale = config.weights.lora_alpha / config.weights.lora_r
    return [Branch(name, root, checkpoints[name], scale) for name, root in roots.items()]


def load(config: TrainConfig, folder: str | Path, *, text_only: bool = False) -> Checkpoint:
    """Load a checkpoint, or its language model, with this run's limits and options for pictures."""
    opened = CheckpointFolder(folder)
    checkpoint = opened.load(max_length=config.batch.max_length, with_weights=False)
    if text_only:
        checkpoint.model.drop_vision()
    if not reads_own_shards(config):
        opened.fill(checkpoint.model)
    return checkpoint.configured(config.batch)


def reads_own_shards(config: TrainConfig) -> bool:
    """Whether a rank reads its own shards alone, after sharding.

    Adapters rename the weights that they wrap and a white tile passes through the whole vision tower: with them every
    rank loads all weights first.
    """
    has_adapters = config.weights.llm_lora or config.weights.vision_lora
    return sharding.num_ranks() > 1 and not has_adapters and config.proxy.proxy_image == "none"


def proxy_folder(config: TrainConfig) -> str | Path:
    """Where the proxy's weights come from."""
    return config.weights.model if config.proxy.proxy_model == "full" else config.proxy.proxy_model


def load_proxy(config: TrainConfig, main: Checkpoint) -> Checkpoint:
    """The proxy's own model: a copy of the main one's, or a smaller one with the same tokenizer."""
    proxy = load(config, proxy_folder(config), text_only=config.proxy.proxy_image == "none")
    if proxy.tokenizer.get_vocab() != main.tokenizer.get_vocab():
        raise ValueError(f"--proxy-model {proxy_folder(config)}: its tokenizer is not that of {config.weights.model}")
    freeze(proxy.model, replace(config.weights, freeze_llm=False))
    see_white(proxy, config)
    if proxy.model.only_tiles is not None:
        proxy.model.model.vision_tower = None
    return proxy


def see_white(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Run a frozen vision tower on the proxy's white tile, once for the whole training."""
    if config.proxy.proxy_image == "white" and config.weights.freeze_backbone and not config.weights.vision_lora:
        checkpoint.model.keep_only(torch.from_numpy(white_tile(checkpoint.tiling.tile_size)))


def adapt(model: RewardModel, weights: WeightsConfig) -> None:
    """Add the adapters that the config asks for."""
    if weights.llm_lora:
        add_lora(model.model.language_model, weights, MAIN)
    if weights.vision_lora and model.model.vision_tower is not None:
        add_lora(model.model.vision_tower, weights, MAIN)


def freeze(model: RewardModel, weights: WeightsConfig) -> None:
    """Take parts out of the training."""
    parts = ("language_model", "vision_tower", "multi_modal_projector")
    for name, frozen in zip(parts, (weights.freeze_llm, weights.freeze_backbone, weights.freeze_mlp), strict=True):
        part = getattr(model.model, name)
        if part is not None:
            part.requires_grad_(not frozen)


def train_mode(model: RewardModel) -> None:
    """Train what is trained; frozen parts stay in evaluation mode, without noise."""
    model.train()
    for part in (model.model.language_model, model.model.vision_tower, model.model.multi_modal_projector):
        if part is not None and not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()


def proxy_file(config: ProxyConfig) -> Path | None:
    """The file of precomputed margins, where `proxy_model` is one."""
    if not config.robust or config.proxy_model in ("full", "lora"):
        return None
    path = Path(config.proxy_model)
    return None if path.is_dir() else path


class ProxyMargins:
    """Text-only margins r(chosen) - r(rejected) from a JSONL file, one row a pair: what a proxy would compute.

    Rows hold `record` (position in the training file), `chosen` and `rejected` (among the responses that are in any
    pair) and `proxy_margin`: `eval-NAME.jsonl` of a robust run that had the training file as a test set.
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
    """(record, chosen, rejected) of a sample's pairs as evaluation numbers them, which leaves no response out."""
    places = sample.places or range(len(sample.group.responses))
    for pair in sample.group.pairs:
        yield sample.group.record, places[pair.chosen], places[pair.rejected]
