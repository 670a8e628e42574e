"""`mmrm-fast train --dry-run`: what a training needs, from configs alone, before a GPU is taken for it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.config import TrainConfig
from mmrm_fast.data.mixture import parse_mixture
from mmrm_fast.data.prompt import Encoded
from mmrm_fast.data.records import RecordError, Records
from mmrm_fast.data.samples import Preparer, Sample
from mmrm_fast.model.lora import MAIN, PROXY
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.tables import print_table
from mmrm_fast.train.footprint import GIB, WORKSPACE, Memory, count, make_models, memory, needed
from mmrm_fast.train.rates import pass_flops
from mmrm_fast.train.records import open_records, training_preparer

SAMPLED = 256  # records whose tokens stand for all


@dataclass(frozen=True)
class Work:
    """What the data ask for, as means of a sample of records."""

    num_records: int
    pairs: float  # a record, and so on
    tokens: float  # after sharing
    tokens_unshared: float
    text_tokens: float
    tiles: float
    cost: float


def dry_run(config: TrainConfig, *, num_gpus: int) -> None:
    """Print what the training needs; raise `ValueError` where it cannot fit."""
    models, work = make_models(config), measure(config)
    memories = {name: branch_memory(config, name, model, work, num_gpus) for name, model in models.items()}
    rows = [*parameter_rows(models), *memory_rows(memories)]
    print_table(f"{config.weights.model.name}, GPUs: {num_gpus}", ["", *models], rows)
    print("\n".join(work_lines(config, models, work)))
    refuse(config, needed(memories.values()) + WORKSPACE)


def branch_memory(config: TrainConfig, name: str, model: RewardModel, work: Work | None, num_gpus: int) -> Memory:
    """A branch's bytes with full micro-batches of what the data are like; without data, of text alone."""
    budget = config.batch.tokens_per_micro_batch
    tokens = tiles = 0
    if work is not None:
        tokens = (work.tokens if name == MAIN else work.text_tokens) * budget / work.cost
        tiles = work.tiles * budget / work.cost
    tiles = min(tiles, 1) if name == PROXY else tiles
    return memory(config, name, model, num_gpus=num_gpus, tokens=int(tokens) or budget, tiles=max(1, int(tiles)))


def parameter_rows(models: dict[str, RewardModel]) -> Iterator[tuple[str, ...]]:
    """Parameters by part, and how many are trained."""
    parts = {
        "vision tower": lambda model: model.model.vision_tower,
        "projector": lambda model: model.model.multi_modal_projector,
        "language model": lambda model: model.model.language_model,
        "all": lambda model: model,
    }
    for name, part in parts.items():
        found = [part(model) for model in models.values()]
        yield f"parameters, {name}", *("-" if module is None else f"{count(module):,}" for module in found)
    yield "of them trained", *(f"{count(model, True):,}" for model in models.values())


def memory_rows(memories: dict[str, Memory]) -> Iterator[tuple[str, ...]]:
    """GiB a GPU."""
    for name in ("weights", "gradients", "optimizer", "gathered", "activations"):
        yield f"{name}, GiB a GPU", *(f"{getattr(memory, name) / GIB:.2f}" for memory in memories.values())


def work_lines(config: TrainConfig, models: dict[str, RewardModel], work: Work | None) -> Iterator[str]:
    """Tokens and operations a step, steps an epoch."""
    if work is None:
        yield "tokens and FLOPs a step and steps an epoch need --data and the checkpoint's tokenizer"
        return
    batch = config.batch
    records = batch.pairs_per_step / work.pairs if batch.pairs_per_step else batch.tokens_per_batch / work.cost
    records = min(max(records, 1), work.num_records)
    flops = record_flops(config, models, work) * records
    steps = -(-work.num_records // max(1, int(records)))
    shared, unshared = f"{work.tokens:,.0f} tokens after sharing", f"{work.tokens_unshared:,.0f} before"
    yield f"data: {work.num_records:,} records of {shared} ({unshared}), {work.tiles:.1f} tiles, {work.pairs:.1f} pairs"
    amounts = [f"{records * number:,.0f} {name}" for name, number in
               (("pairs", work.pairs), ("tokens", work.tokens), ("tiles", work.tiles))]  # fmt: skip
    yield f"a step: {', '.join(amounts)}, {flops:.3g} FLOPs without attention's own"
    yield f"an epoch: about {steps:,} steps, {flops * steps:.3g} FLOPs"


def measure(config: TrainConfig) -> Work | None:
    """The means of up to `SAMPLED` records, spread evenly over the files; None without data or tokenizer."""
    if not config.records.data or not (config.weights.model / "tokenizer_config.json").is_file():
        return None
    checkpoint = CheckpointFolder(config.weights.model).load(max_length=config.batch.max_length, with_weights=False)
    checkpoint = checkpoint.configured(config.batch)
    preparer = training_preparer(config, checkpoint, with_text=config.proxy.robust)
    records = open_records(config.records, *parse_mixture(config.records.data).paths)
    places = np.linspace(0, len(records) - 1, min(SAMPLED, len(records))).astype(int)
    samples = [sample for place in places for sample in usable_samples(records, preparer, int(place))]
    if not samples:
        raise ValueError(f"{', '.join(config.records.data)}: none of {len(places)} records can be used")
    rows = [
        (
            len(sample.group.pairs),
            shared_tokens(sample.main),
            sample.num_tokens_unshared,
            shared_tokens(sample.text) if sample.text else 0,
            sum(sample.tiles_per_image),
            preparer.size(sample).cost,
        )
        for sample in samples
    ]
    return Work(round(len(records) * len(samples) / len(places)), *np.mean(rows, 0))


def usable_samples(records: Records, preparer: Preparer, place: int) -> list[Sample]:
    """A record's samples that have pairs; none where it cannot be used."""
    try:
        samples = [preparer.sample(part) for part in preparer.parts(records.group(place))]
    except RecordError:
        return []
    return [sample for sample in samples if len(sample.group.pairs)]


def shared_tokens(encoded: Encoded) -> int:
    """Tokens of a record with its prefix once."""
    return encoded.prefix_length + sum(len(sequence) - encoded.prefix_length for sequence in encoded.sequences)


def record_flops(config: TrainConfig, models: dict[str, RewardModel], work: Work) -> float:
    """Operations a record in all passes of all models, as `metrics.Rates` counts them."""
    main = models[MAIN]
    text = models.get(PROXY) or (main if config.proxy.robust and config.proxy.proxy_model == "lora" else None)
    patches = 4 * main.model.config.image_seq_length + 1
    flops = work.tokens * pass_flops(main.model.language_model.layers)
    flops += work.tiles * patches * pass_flops(main.model.vision_tower.encoder)
    return flops + (work.text_tokens * pass_flops(text.model.language_model.layers) if text else 0)


def refuse(config: TrainConfig, needed: float) -> None:
    """Raise `ValueError` where a GPU has less memory than is needed."""
    available = config.memory.gpu_memory and config.memory.gpu_memory * GIB
    if available is None and torch.cuda.is_available():
        available = torch.cuda.get_device_properties(0).total_memory
    if available is None:
        print(f"a GPU needs {needed / GIB:.1f} GiB; --gpu-memory says what there is")
    elif needed > available:
        raise ValueError(
            f"a GPU needs {needed / GIB:.1f} GiB and has {available / GIB:.1f}: more GPUs (--num-gpus plans for them), "
            "--activation-checkpointing full, a lower --tokens-per-micro-batch, --llm-lora or --cpu-offload"
        )
    else:
        print(f"fits: a GPU needs {needed / GIB:.1f} of {available / GIB:.1f} GiB")
