"""Steps of small models over fake CUDA tensors, one case a process: `python cases.py` reads names and prints JSON."""

from device import CUDA, Memory, Watch  # first, as it is to come before torch

# isort: split
import contextlib
import json
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import with_options
from mmrm_fast.data.packing import Packed, PackedBatch, Step, map_tensors, plan_tokens
from mmrm_fast.doctor import checks, kernels, speed
from mmrm_fast.model.decoder import renew_rope
from mmrm_fast.model.placement import place
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train import memory, sharding
from mmrm_fast.train.branch import train_mode
from mmrm_fast.train.memory import sized_branches
from mmrm_fast.train.proxy import parse_proxy
from mmrm_fast.train.sharding import make_mesh
from mmrm_fast.train.step import Steps

TINY = {"hidden": 64, "heads": 4, "kv": 2, "mlp": 96, "vocabulary": 512, "vision": 32, "image": 56}
EIGHT = {"hidden": 3584, "heads": 28, "kv": 4, "mlp": 18944, "vocabulary": 151674, "vision": 1024, "image": 448}
MODES = ("none", "selective", "full")  # of activation checkpointing
WAYS = {  # options and modes: a layer recomputes for two adapters in a way of its own
    "standard": ({}, MODES[:1]),
    "robust": ({"robust": True}, MODES[1:2]),
    "two adapters": ({"robust": True, "llm_lora": True, "proxy_model": "lora"}, MODES),
    "white": ({"robust": True, "proxy_image": "white"}, MODES[2:]),
    "margins file": ({"robust": True, "proxy_model": __file__}, MODES[1:2]),
    "n-grams": ({"robust": True, "proxy_model": "ngrams"}, MODES[2:]),
}


def folder_of(sizes: dict, layers: int, tower: int | None = None) -> Path:
    """A folder with nothing but a config.json; the vision tower has as many layers where nothing else is said."""
    width, image = sizes["vision"], sizes["image"]
    vision = InternVLVisionConfig(
        hidden_size=width, num_hidden_layers=tower or layers, num_attention_heads=max(2, width // 64), image_size=image,
        intermediate_size=4 * width, patch_size=14, attention_bias=True,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=layers,
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv"], intermediate_size=sizes["mlp"],
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=sizes["vocabulary"] - 1)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@contextlib.contextmanager
def ranks(world: int):
    """The first of so many ranks, whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    yield
    dist.destroy_process_group()


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def on_gpu(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A model of the meta device with fake parameters and buffers on the GPU."""
    for module in model.modules():
        for name, own in [*module._parameters.items(), *module._buffers.items()]:
            if own is not None and own.device.type == "meta":
                with mode:
                    tensor = torch.empty(own.shape, dtype=own.dtype, device=CUDA)
                is_parameter = name in module._parameters
                setattr(module, name, nn.Parameter(tensor, own.requires_grad) if is_parameter else tensor)
    model.to = lambda device: None
    return model


def batch_of(
    mode: FakeTensorMode, image: int, *, records: int = 2, tiles: int = 1, prompt: int = 40, length: int = 9,
    image_tokens: int = 4, with_text: bool = False, white: bool = False,
) -> Packed:  # fmt: skip
    """A micro-batch of records of two responses, as `packing.pack` makes it; without records, of one token."""
    rng, sequences, texts = np.random.default_rng(0), [], []
    for record in range(records):
        places = -1 - np.arange(image_tokens * tiles) - image_tokens * tiles * record
        question = rng.integers(1, 500, prompt)
        for _ in range(2):
            answer = rng.integers(1, 500, length)
            sequences.append(np.concatenate([question[:5], places, question[5:], answer]))
            texts.append(np.concatenate([question, answer]))
    num_tiles = max(1, records * tiles)
    pairs = torch.arange(2 * records).view(-1, 2)
    batch = PackedBatch(
        main=plan_tokens(sequences),
        text=plan_tokens(texts) if with_text else None,
        tiles=torch.zeros(num_tiles, image, image, 3, dtype=torch.uint8),
        text_tiles=torch.zeros(1, image, image, 3, dtype=torch.uint8) if white else None,
        chosen_P=pairs[:, 0].contiguous(),
        rejected_P=pairs[:, 1].contiguous(),
        margin_P=None,
        num_responses=(2,) * records,
    )
    return Packed(map_tensors(batch, mode.from_tensor), (), {})


def steps_of(folder: Path, mode: FakeTensorMode, **options) -> Steps:
    """The branches of a training, made as it makes them, sharded, and their optimizer."""
    config = with_options(TrainConfig(), model=folder, lr=1e-5, tokens_per_batch=4096, dtype="bfloat16", **options)
    proxy = parse_proxy(config)
    branches, mesh = sized_branches(proxy), make_mesh(CUDA, config.memory.replicas or 1)
    sharding.make_mesh = lambda *about: mesh  # its own tensors are read
    for root in dict.fromkeys(branch.root for branch in branches):
        on_gpu(root, mode)
        with mode:
            sharding.shard(root, CUDA, config.memory)
        train_mode(root)
    if options.get("robust") and len(branches) == 1:
        proxy.file = SimpleNamespace(of=lambda samples: torch.zeros(2))
    with mode:
        return Steps(branches, proxy, config, CUDA)


def waits() -> dict:
    """Waits of a micro-batch and of `apply`, by way to train and checkpointing."""
    found, folder = {}, folder_of(TINY, 2, tower=1)
    with ranks(8):
        for way, (options, modes) in WAYS.items():
            for checkpointing in modes:
                mode = fake_mode()
                steps = steps_of(folder, mode, activation_checkpointing=checkpointing, **options)
                packed = batch_of(mode, 56, with_text=len(steps.branches) > 1, white=way == "white")
                with mode, Watch() as added:
                    steps.add(packed, 0)
                with mode, Watch() as applied:
                    steps.apply(0.5)
                counts = {"branches": len(steps.branches), "add": added.counts(), "apply": applied.counts()}
                found[f"{way}, {checkpointing}"] = counts
    return found


def collectives() -> dict:
    """The collectives of a micro-batch with pictures, of text alone and of nothing, on 8 and 64 ranks.

    Gradients are held on 8 ranks without replicas, for the last micro-batch of a step but in "held".
    """
    found, folder = {}, folder_of(TINY, 2, tower=1)
    batches = {"pictures": {}, "text": {"tiles": 0}, "nothing": {"records": 0}, "held": {}}
    for world, replicas, hold in ((8, 1, True), (8, 2, False), (64, 1, False)):
        with ranks(world):
            mode, options = fake_mode(), {"robust": True, "activation_checkpointing": "full"}
            steps = steps_of(folder, mode, replicas=replicas, hold_gradients=hold, **options)
            for name in ("pictures", *[*batches][: 3 + hold]):  # the first one sets up what is set up once
                step = None if name == "held" else Step(2, 2, 1.0, None)
                packed = replace(batch_of(mode, 56, with_text=True, **batches[name]), step=step)
                with mode, Watch() as watch:
                    steps.add(packed, 0)
                assert not watch.waits, (name, watch.counts())
                found[f"{name}, {world} ranks, {replicas} replicas"] = watch.collectives
    return found


def peaks() -> dict:
    """Bytes of a step's peak over 8 GPUs at the widths of 8B, as allocated and as the dry run has it."""
    found, folder, tokens = {}, folder_of(EIGHT, 3), {"records": 3, "tiles": 7, "prompt": 150, "length": 250}
    for checkpointing, robust in (("full", False), ("none", False), ("full", True)):
        options = {"activation_checkpointing": checkpointing, "robust": robust}
        with ranks(8):
            mode = fake_mode()
            steps = steps_of(folder, mode, **options)
            packed = batch_of(mode, 448, image_tokens=256, with_text=robust, **tokens)
            with mode, Memory([list(branch.root.parameters()) for branch in steps.branches]) as allocated:
                allocated.note(list(steps.tensors().values()))
                steps.add(packed, 0)
                steps.add(packed, 0)
        sizes = [(len(packed.batch.main.source_T), len(packed.batch.tiles))]
        sizes += [(len(packed.batch.text.source_T), 1)] if robust else []
        memories = [
            memory.memory(steps.config.memory, own.whole, memory.activations(checkpointing, own, *size), num_gpus=8)
            for own, size in zip(memory.sized_models(steps.proxy), sizes, strict=True)
        ]
        found[f"{checkpointing}, robust {robust}"] = {"allocated": allocated.peak, "dry run": memory.needed(memories)}
    return found


def scoring() -> dict:
    """The waits of one forward of a `Scorer`, and what goes between devices where its layers are on one, two, three."""
    found = {}
    for count in (1, 2, 3):
        mode, config = fake_mode(), with_options(TrainConfig(), model=folder_of(TINY, 4))
        model = sized_branches(parse_proxy(config))[0].root.eval()
        with mode:
            if count > 1:
                place(model, [torch.device("cuda", number) for number in range(count)])
            renew_rope(on_gpu(model, mode).model.language_model, CUDA)
        scorer = Scorer.__new__(Scorer)
        scorer.__dict__ |= {"model": model, "device": CUDA, "lock": contextlib.nullcontext()}
        main = SimpleNamespace(prefix_length=1, truncated=(False, False))
        sample = SimpleNamespace(group=None, main=main, num_tokens_unshared=2)
        packed = replace(batch_of(mode, 56), samples=(sample, sample))
        with mode, Watch() as watch:
            begun = scorer.begin(packed)
            begins, copies = watch.counts(), Counter(map(" to ".join, watch.copies))
            begun.outcomes()
        found[count] = {"begin": begins, "outcomes": watch.counts(), "copies": copies}
    return found


def really(function):
    """A function of meta tensors, outside of the fake mode."""

    def call(*arguments):
        with unset_fake_temporarily():
            return function(*arguments)

    return call


def doctor() -> dict:
    """What `doctor --gpu` finds with fake tensors: its calls, not its figures, as each number that is read is 1."""
    cuda, checks.watched = torch.cuda, lambda *about: contextlib.nullcontext()
    cuda._sleep = cuda.synchronize = lambda *about: None
    cuda.device_count, cuda.get_device_name = lambda: 2, lambda device: "NVIDIA H100"
    cuda.get_device_properties = lambda device: SimpleNamespace(memory_clock_rate=2_619_000, memory_bus_width=5120)
    speed.TIMES, kernels.HEAD_SIZES, kernels.NODES = 1, (64,), (1, 3)
    kernels.on_cuda.takes_flash = lambda *about: True
    for _, schema, reference in kernels.SCHEMAS:
        kernels.op_cases(schema, reference)  # real ones, made before
    for dtype in kernels.ALLOWED:
        kernels.attention_cases(dtype, 64)
    mode, measured, shard = fake_mode(), speed.Speed(CUDA), sharding.shard
    measured.model, speed.text_pass = really(measured.model), really(speed.text_pass)
    speed.plan_tokens = really(speed.plan_tokens)
    speed.drawn = lambda model, device: on_gpu(model, mode)  # which leaves alone what is there
    sharding.shard = lambda model, *about: shard(on_gpu(model, mode), *about)
    with ranks(8):
        mesh = make_mesh(CUDA, 1)
        sharding.make_mesh = lambda *about: mesh
        cases = [own for own in kernels.kernel_checks(CUDA) if "as dispatched" in own.name or "Flash" in own.name]
        cases += [own for own in measured.checks() if "loader" not in own.name]
        with mode, Watch(), Memory() as allocated:
            cuda.memory_allocated = lambda device: allocated.total()
            return {own.name: checks.outcome(own, 0)._asdict() for own in cases}


def with_host_edges(steps: Steps) -> None:
    steps.accumulator.edges = torch.linspace(0, 1, len(steps.accumulator.edges))


def with_host_plan(steps: Steps) -> None:
    main = steps.branches[0].root
    forward = main.forward
    main.forward = lambda plan, *rest, **more: forward(replace(plan, kv_index=plan.kv_index.cpu()), *rest, **more)


def with_read(steps: Steps) -> None:
    steps.proxy.margins = lambda branches, packed, batch: torch.full((2,), 0.0, device=CUDA) * batch.tiles.sum().item()


def with_mask(steps: Steps) -> None:
    steps.proxy.margins = lambda branches, packed, batch: (batch.chosen_P[batch.chosen_P > 0].sum() * 0.0).expand(2)


FAULTS = {"host edges": with_host_edges, "host plan": with_host_plan, "read": with_read, "boolean mask": with_mask}


def faults() -> dict:
    """What is seen of each planted fault."""
    found, folder = {}, folder_of(TINY, 2, tower=1)
    for name, plant in FAULTS.items():
        with ranks(8):
            mode = fake_mode()
            steps = steps_of(folder, mode)
            plant(steps)
            packed = batch_of(mode, 56)
            try:
                with mode, Watch() as watch:
                    steps.add(packed, 0)
                found[name] = watch.counts()
            except Exception as error:  # of torch, on two devices
                found[name] = {str(error): 1}
    return found


def serve() -> None:
    """For every case that is asked for, a fork of this process, which has no threads yet, prints what it found."""
    for line in sys.stdin:
        if not os.fork():
            signal.alarm(600)  # no case waits for ever
            with contextlib.redirect_stdout(sys.stderr):
                found = globals()[line.strip()]()
            print(json.dumps(found), flush=True)
            os._exit(0)
        if os.wait()[1]:
            print("null", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    serve()
