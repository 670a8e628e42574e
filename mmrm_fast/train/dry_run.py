"""`mmrm-fast train --dry-run`: what a training needs, from configs alone, before a GPU is taken for it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np
import torch

from mmrm_fast.checkpoint.fill import VALUES_AT_A_TIME
from mmrm_fast.config import MemoryConfig, TrainConfig
from mmrm_fast.config_file import with_options
from mmrm_fast.data.mixture import parse_mixture
from mmrm_fast.data.pictures import ImageRoots
from mmrm_fast.data.records import RecordError, Records
from mmrm_fast.data.samples import Preparer, Sample
from mmrm_fast.model.experts import active_parameters, num_experts
from mmrm_fast.model.placement import GIB
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.tables import print_table
from mmrm_fast.train import sharding
from mmrm_fast.train.memory import (
    GPU,
    Memory,
    Sized,
    count,
    memory,
    needed,
    sized_branches,
    sized_models,
    stack_bytes,
    stacks,
)
from mmrm_fast.train.paper import paper_rows
from mmrm_fast.train.proxy import Proxy, ShortcutProxy, parse_proxy
from mmrm_fast.train.rates import Rates
from mmrm_fast.train.records import open_records, training_preparer

WORKSPACE = GIB  # the CUDA context, libraries' workspaces, fragments
MODES = ("none", "selective", "full")  # of activation checkpointing, by what they recompute
FILLED = 0.9  # of a GPU at most, by what is computed beforehand
PIECE = 8 * VALUES_AT_A_TIME  # bytes of values on their way to a GPU, as stored and as kept
SAMPLED = 256  # records whose tokens stand for all
PARTS = {"vision tower": "vision_tower", "projector": "multi_modal_projector", "language model": "language_model"}


@dataclass(frozen=True)
class Work:
    """What the data ask for, as means of a sample of records."""

    num_records: int
    tokens_per_tile: int
    pairs: float  # a record, and so on
    tokens: float  # after sharing
    tokens_unshared: float
    text_tokens: float
    tiles: float
    cost: float


def dry_run(config: TrainConfig, *, num_gpus: int) -> None:
    """Print what the training needs; raise `ValueError` where it cannot fit."""
    proxy = parse_proxy(config)
    sized, work = sized_models(proxy), measure(proxy)
    models = [own.whole for own in sized]
    apart = list(dict.fromkeys(models))  # adapters are one model
    if config.memory.dtype == "float32" and any(map(num_experts, models)):
        raise ValueError("--dry-run --dtype float32: a mixture of experts can be counted in bfloat16 alone")
    needs, available = needs_by_choice(config, sized, work, num_gpus), gpu_memory(config)
    chosen = first_that_fits(needs, available)
    memories = needs[chosen]
    heads = ("", "main", "proxy")[: 1 + len(apart)]
    title = f"{config.weights.model.name}, GPUs: {num_gpus}"
    print_table(title, heads, [*parameter_rows(apart), *memory_rows(memories)])
    print("\n".join(work_lines(config, models, work)))
    if isinstance(proxy, ShortcutProxy):
        print("\n".join(spared_lines(proxy, models, num_gpus, work)))
    print(loading_line(config, memories, apart, num_gpus))
    print("\n".join(chosen_lines(config.memory, needs, chosen)))
    if not any(map(num_experts, models)):
        print_paper(sized[0], num_gpus, config.batch.tokens_per_micro_batch)
    refuse(needed(memories) + WORKSPACE, available, remedies(config, chosen, memories))


def print_paper(models: Sized, num_gpus: int, tokens: int) -> None:
    """How long a micro-batch of the main model may take on H100s."""
    decoders = {len(root.model.language_model.layers): root.model.language_model for root in models}
    heads = ("ms of a micro-batch", "all", "products", "attention", "elements", "GPU to GPU", "tokens/s", "MFU")
    print_table(
        f"computed, nothing was timed: {tokens:,} tokens, {num_gpus} H100",
        heads,
        paper_rows(decoders, num_gpus, tokens),
    )


def remedies(config: TrainConfig, chosen: MemoryConfig, memories: list[Memory]) -> str:
    """What would take less of a GPU."""
    ways = {
        "more GPUs (--num-gpus says how many)": True,
        "--activation-checkpointing full": chosen.activation_checkpointing != "full",
        "a --proxy-model without a second model (ngrams, probe, lora)": len(memories) > 1,
        "a lower --tokens-per-micro-batch": True,
        "--llm-lora": not config.weights.llm_lora,
        "--cpu-offload": not config.memory.cpu_offload,
    }
    return ", ".join(way for way, helps in ways.items() if helps)


def fitted(config: TrainConfig, *, num_gpus: int) -> TrainConfig:
    """The config with what it leaves open of memory, by what fits a GPU, which is printed; as it is without one."""
    available = gpu_memory(config)
    if available is None or len(choices(config.memory, num_gpus)) == 1:
        return config
    proxy = parse_proxy(config)
    sized = sized_models(proxy)
    if config.memory.dtype == "float32" and any(num_experts(own.whole) for own in sized):
        is_open = config.memory.activation_checkpointing == "auto"
        return with_options(config, activation_checkpointing="full") if is_open else config  # it cannot be counted
    needs = needs_by_choice(config, sized, measure(proxy), num_gpus)
    chosen = first_that_fits(needs, available)
    print("\n".join(chosen_lines(config.memory, needs, chosen)))
    return replace(config, memory=chosen)


def choices(config: MemoryConfig, num_gpus: int) -> list[MemoryConfig]:
    """What the options that a config leaves open can be, in the order of how fast a step is."""
    nodes = [sharding.num_nodes(num_gpus), 1] if config.replicas is None else [config.replicas]
    modes = MODES if config.activation_checkpointing == "auto" else (config.activation_checkpointing,)
    holds = [config.hold_gradients]
    if config.hold_gradients is None:
        holds = [True, False] if num_gpus > 1 and not config.cpu_offload else [False]
    open_options = product(dict.fromkeys(nodes), modes, holds)
    names = ("replicas", "activation_checkpointing", "hold_gradients")
    return [replace(config, **dict(zip(names, values, strict=True))) for values in open_options]


Needs = dict[MemoryConfig, list[Memory]]


def needs_by_choice(config: TrainConfig, models: list[Sized], work: Work | None, num_gpus: int) -> Needs:
    """What each model takes, by what the config leaves open."""
    found: Needs = {choice: [] for choice in choices(config.memory, num_gpus)}
    for number, sized in enumerate(dict.fromkeys(models)):
        parts = list(stacks(sized, *full_micro_batch(config, number, work)))
        for choice, memories in found.items():
            saved = sum(stack_bytes(choice.activation_checkpointing, *part) for part in parts)
            memories.append(memory(choice, sized.whole, saved, num_gpus=num_gpus))
    return found


def first_that_fits(needs: Needs, available: float | None) -> MemoryConfig:
    """The first choice that leaves some of a GPU free; the last where none does."""
    room = math.inf if available is None else FILLED * available
    return next((one for one, memories in needs.items() if needed(memories) + WORKSPACE <= room), list(needs)[-1])


def chosen_lines(config: MemoryConfig, needs: Needs, chosen: MemoryConfig) -> Iterator[str]:
    """What was chosen of what a config leaves open, and what each would need."""
    if config.activation_checkpointing == "auto":
        others = (replace(chosen, activation_checkpointing=mode, hold_gradients=False) for mode in MODES)
        figures = ((own.activation_checkpointing, needs.get(own)) for own in others)
        told = ", ".join(f"{mode} {(needed(own) + WORKSPACE) / GIB:.1f}" for mode, own in figures if own)
        yield f"--activation-checkpointing auto is {chosen.activation_checkpointing}; GiB a GPU: {told}"
    if config.replicas is None:
        yield f"--replicas {chosen.replicas}, of the nodes that torchrun names and 1 the first that fits"
    if config.hold_gradients is None:
        when = "once a step" if chosen.hold_gradients else "in each micro-batch"
        yield f"gradients are added up over GPUs {when} (--hold-gradients)"


def loading_line(config: TrainConfig, memories: list[Memory], models: list[RewardModel], num_gpus: int) -> str:
    """What holds a model while it is loaded: each rank fills its own rows, in pieces, as they are stored."""
    offloaded = sharding.offloads(GPU, config.memory)
    held = [memory(replace(config.memory, cpu_offload=False), model, 0, num_gpus=num_gpus) for model in models]
    on_host = PIECE + offloaded * sum(own.weights + own.gradients + own.optimizer for own in held)
    on_gpu = sum(own.weights for own in memories)
    return f"loading: {on_host / GIB:.2f} GiB of host memory a rank, {on_gpu / GIB:.2f} GiB of a GPU"


def spared_lines(proxy: ShortcutProxy, models: list[RewardModel], num_gpus: int, work: Work | None) -> Iterator[str]:
    """What a run spares that would train the paper's full proxy instead, and what its own takes before it begins."""
    config = proxy.config
    full = [branch.root for branch in sized_branches(parse_proxy(with_options(config, proxy_model="full")))]
    spared = memory(config.memory, full[1], 0, num_gpus=num_gpus)
    parts = ", ".join(f"{name} {getattr(spared, name) / GIB:.2f}" for name in ("weights", "gradients", "optimizer"))
    line = f"a full proxy would take {spared.total / GIB:.2f} GiB a GPU more before activations ({parts})"
    if work is None:
        yield line
        return
    rates = Rates(full, work.tokens_per_tile, torch.device("cpu"))
    step = rates.flops(work.tokens, 0, work.tiles)
    yield f"{line} and {rates.flops(0, work.text_tokens, 0) / step:.0%} more FLOPs a step"
    if "probe" in proxy.kinds:
        once = 2 * count(models[0].model.language_model.layers) * work.text_tokens
        total = f"{once * work.num_records:.3g} FLOPs, {once / step:.1%} of an epoch's"
        yield f"the probe's forward over all texts: {total}; twice where they are many"


def full_micro_batch(config: TrainConfig, number: int, work: Work | None) -> tuple[int, int]:
    """Tokens and tiles of a branch's full micro-batches of what the data are like; without data, of text alone."""
    budget, tiles = config.batch.tokens_per_micro_batch, 1
    if work is None:
        return budget, tiles
    tokens = (work.text_tokens if number else work.tokens) * budget / work.cost
    return int(tokens) or budget, 1 if number else max(1, int(work.tiles * budget / work.cost))


def parameter_rows(models: list[RewardModel]) -> Iterator[tuple[str, ...]]:
    """Parameters by part, and how many are trained."""
    for name, attribute in PARTS.items():
        parts = [getattr(model.model, attribute) for model in models]
        yield f"parameters, {name}", *("-" if part is None else f"{count(part):,}" for part in parts)
    yield "parameters, all", *(f"{count(model):,}" for model in models)
    yield "of them trained", *(f"{count(model, True):,}" for model in models)
    if any(map(num_experts, models)):
        yield "of all, active for a token", *(f"{active_parameters(model):,}" for model in models)


def memory_rows(memories: list[Memory]) -> Iterator[tuple[str, ...]]:
    """GiB a GPU."""
    for field in fields(Memory):
        yield f"{field.name}, GiB a GPU", *(f"{getattr(memory, field.name) / GIB:.2f}" for memory in memories)


def work_lines(config: TrainConfig, models: list[RewardModel], work: Work | None) -> Iterator[str]:
    """Tokens and operations a step, steps an epoch."""
    if work is None:
        yield "tokens and FLOPs a step and steps an epoch need --data and the checkpoint's tokenizer"
        return
    batch = config.batch
    records = batch.pairs_per_step / work.pairs if batch.pairs_per_step else batch.tokens_per_batch / work.cost
    records = min(max(records, 1), work.num_records)
    rates = Rates(models, work.tokens_per_tile, torch.device("cpu"))
    flops = rates.flops(work.tokens, work.text_tokens, work.tiles) * records
    steps = -(-work.num_records // max(1, int(records)))
    shared, unshared = f"{work.tokens:,.0f} tokens after sharing", f"{work.tokens_unshared:,.0f} before"
    yield f"data: {work.num_records:,} records of {shared} ({unshared}), {work.tiles:.1f} tiles, {work.pairs:.1f} pairs"
    amounts = [f"{records * getattr(work, name):,.0f} {name}" for name in ("pairs", "tokens", "tiles")]
    yield f"a step: {', '.join(amounts)}, {flops:.3g} FLOPs without attention's own"
    yield f"an epoch: about {steps:,} steps, {flops * steps:.3g} FLOPs"


def measure(proxy: Proxy) -> Work | None:
    """The means of up to `SAMPLED` records, spread evenly over the files; None without data or tokenizer."""
    config, folder = proxy.config, proxy.model_folder
    if not config.records.data or not folder.has_tokenizer:
        return None
    checkpoint = folder.load(max_length=config.batch.max_length, with_weights=False).configured(config.batch)
    preparer = training_preparer(config, checkpoint, with_text=config.proxy.robust)
    records = open_records(
        config.records, "train", ImageRoots.parse(config.records.image_root), *parse_mixture(config.records.data).paths
    )
    places = np.linspace(0, len(records) - 1, min(SAMPLED, len(records))).astype(int)
    samples = [sample for place in places for sample in usable_samples(records, preparer, int(place))]
    if not samples:
        raise ValueError(f"{', '.join(config.records.data)}: none of {len(places)} records can be used")
    rows = [
        (
            len(sample.group.pairs),
            sample.main.num_tokens,
            sample.num_tokens_unshared,
            sample.text.num_tokens if sample.text else 0,
            sum(sample.tiles_per_image),
            preparer.size(sample).cost,
        )
        for sample in samples
    ]
    return Work(round(len(records) * len(samples) / len(places)), checkpoint.tokens_per_tile, *np.mean(rows, 0))


def usable_samples(records: Records, preparer: Preparer, place: int) -> list[Sample]:
    """A record's samples that have pairs; none where it cannot be used."""
    try:
        samples = [preparer.sample(part) for part in preparer.parts(records.group(place))]
    except RecordError:
        return []
    return [sample for sample in samples if len(sample.group.pairs)]


def gpu_memory(config: TrainConfig) -> float | None:
    """Bytes of a GPU: what the config says, or the first one here has; None where neither does."""
    if config.memory.gpu_memory:
        return config.memory.gpu_memory * GIB
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def refuse(needed: float, available: float | None, remedies: str) -> None:
    """Raise `ValueError` where a GPU has less memory than is needed."""
    if available is None:
        print(f"a GPU needs {needed / GIB:.1f} GiB; --gpu-memory says what there is")
    elif needed > available:
        raise ValueError(f"a GPU needs {needed / GIB:.1f} GiB and has {available / GIB:.1f}; what helps: {remedies}")
    else:
        print(f"fits: a GPU needs {needed / GIB:.1f} of {available / GIB:.1f} GiB")
