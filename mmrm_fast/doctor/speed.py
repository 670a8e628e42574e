"""How fast this machine is, measured beside what it should be, and the utilisation of a training that follows."""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Config

from mmrm_fast.checkpoint.fill import local_rows
from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.config import MemoryConfig
from mmrm_fast.data.images import Tiling
from mmrm_fast.data.packing import TokenPlan, pack_items, plan_tokens
from mmrm_fast.data.records import Group
from mmrm_fast.data.samples import Preparer
from mmrm_fast.data.workers import in_order
from mmrm_fast.doctor.checks import Check, Found, judged, left_out
from mmrm_fast.doctor.rewards import preparer_of, records, shipped
from mmrm_fast.model.decoder import renew_rope
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.train import sharding
from mmrm_fast.train.memory import run_pass, text_pass
from mmrm_fast.train.rates import pass_flops, peak_flops

EIGHT_B = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
LAYERS = 28  # of 8B
TRAFFIC = 4  # times a layer's bf16 weights: gathered forward and backward, fp32 gradients reduced
AS_COUNTED = 0.15  # that a layer's memory may differ from the dry run's by
TIMES = 10  # a measurement is the mean of so many


class Speed:
    """Measurements on a device, and what was measured so far: decoder layers of 8B on a GPU, on a CPU small ones."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu, self.peak = device, device.type == "cuda", peak_flops(device)
        self.dtype = sharding.compute_dtype(MemoryConfig(), device)
        self.widths, self.num_records, self.num_loaded = (EIGHT_B, 8, 256) if self.on_gpu else (SMALL, 1, 4)
        self.num_tokens = 1024 * self.num_records  # of a micro-batch
        self.layer_seconds = self.layer_flops = self.traffic_seconds = 0.0
        self.tokens_loaded = self.loaded_a_second = 0.0  # tokens of a record, and records

    def checks(self) -> Iterator[Check]:
        """Each measurement, which all ranks do at a time, and at last what follows from them."""
        yield Check("matrix product", self.product)
        yield Check("copy", self.copy)
        yield Check("decoder layer, forward and backward", self.layer)
        yield Check("memory of a decoder layer against the dry run's", self.memory)
        yield Check("all-gather of a decoder layer; what its time hides", self.gather)
        yield Check("loader; what a GPU takes", self.loader)
        yield Check("MFU of decoder layers that these predict", self.predicted)

    def seconds(self, function: Callable[[], object]) -> float:
        """The mean time of a call, after some that set up what is set up once."""
        for _ in range(2):
            function()
        self.wait()
        started = time.perf_counter()
        for _ in range(TIMES):
            function()
        self.wait()
        return (time.perf_counter() - started) / TIMES

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def product(self) -> Found:
        """Operations a second of a product with a decoder layer's largest weight."""
        width, mlp = self.widths["hidden_size"], self.widths["intermediate_size"]
        shapes = (self.num_tokens, width), (width, mlp)
        x, weight = (torch.randn(*shape, device=self.device, dtype=self.dtype) for shape in shapes)
        rate = 2 * self.num_tokens * width * mlp / self.seconds(lambda: x @ weight)
        return Found(rate / 1e12, self.peak and self.peak / 1e12, "TFLOP/s")

    def copy(self) -> Found:
        """Bytes a second that a copy reads and writes."""
        source, computed = torch.zeros(self.widths["hidden_size"] << 18, dtype=torch.uint8, device=self.device), None
        target = torch.empty_like(source)
        if self.on_gpu:
            about = torch.cuda.get_device_properties(self.device)
            kilohertz, bits = (getattr(about, f"memory_{name}", 0) for name in ("clock_rate", "bus_width"))
            computed = 2e3 * kilohertz * bits / 8 / 1e12 or None  # two transfers a cycle
        return Found(2 * len(source) / self.seconds(lambda: target.copy_(source)) / 1e12, computed, "TB/s")

    def layer(self) -> Found:
        """Time of a layer over a micro-batch, and that of its products at the GPU's peak."""
        layer, forward = self.layer_forward()
        self.layer_flops = self.num_tokens * pass_flops(layer)
        self.layer_seconds = self.seconds(lambda: forward().sum().backward())
        return Found(1e3 * self.layer_seconds, self.peak and 1e3 * self.layer_flops / self.peak, "ms")

    def memory(self) -> Found:
        """Bytes that a layer's forward pass leaves for the backward pass, against those that the dry run counts."""
        layer, forward = self.layer_forward()
        one, two = (text_pass(self.model(count), self.num_tokens).saved for count in (1, 2))
        if self.on_gpu:
            forward()  # for the workspaces of libraries
            gc.collect()  # layers of before, which are in circles
            before = torch.cuda.memory_allocated(self.device)
            out = forward()
            held = torch.cuda.memory_allocated(self.device) - before
            del out
        else:
            held = run_pass(forward, layer).saved
        return judged(abs(held / (two - one) - 1), AS_COUNTED)

    def gather(self) -> Found:
        """Bytes a second that a rank receives of a layer's weights, and those that the layer's time would hide."""
        if sharding.num_ranks() == 1:
            return left_out("there is one rank")
        model = drawn(sharding.shard(self.model(2), self.device, MemoryConfig()), self.device)
        with torch.no_grad():
            model(self.plan())  # which sets up its groups
        block = model.model.language_model.layers[0]
        num_bytes = sum(p.numel() for p in block.parameters()) * self.dtype.itemsize * (1 - 1 / sharding.num_ranks())
        seconds = self.seconds(lambda: (block.unshard(), block.reshard()))
        self.traffic_seconds = TRAFFIC * seconds
        hiding = TRAFFIC * num_bytes / self.layer_seconds / 1e9 if self.layer_seconds else None
        return Found(num_bytes / seconds / 1e9, hiding, "GB/s")

    def loader(self) -> Found:
        """Records a second, a picture of several tiles each, from as many processes as in training; and those taken."""
        checkpoint = replace(shipped(torch.float32), tiling=Tiling(), tokens_per_tile=256, max_length=8192)
        groups, started = [own for own in records(6, side=640) if own.images], time.perf_counter()
        prepare = partial(num_tokens_of, preparer_of(checkpoint), groups)
        counts = [*in_order(prepare, [range(self.num_loaded)], num_workers=4 * self.on_gpu)]
        self.loaded_a_second = len(counts) / (time.perf_counter() - started)
        self.tokens_loaded = float(np.mean(counts))
        return Found(self.loaded_a_second, self.taken(self.layer_seconds), "records/s")

    def taken(self, layer_seconds: float) -> float | None:
        """Records a second that a GPU takes whose layers last so long."""
        if not layer_seconds or not self.tokens_loaded:
            return None
        return self.num_tokens / self.tokens_loaded / (LAYERS * layer_seconds)

    def predicted(self) -> Found:
        """Utilisation where layers are computed while the next is gathered, and no faster than records are loaded."""
        seconds = max(self.layer_seconds, self.traffic_seconds)
        if not self.peak or not (taken := self.taken(seconds)):
            return left_out("no peak of this device is known, or a measurement failed")
        return Found(self.layer_flops / seconds / self.peak * min(1.0, self.loaded_a_second / taken), None)

    def model(self, num_layers: int) -> RewardModel:
        """A language model of these widths on the meta device."""
        config = Qwen2Config(vocab_size=1024, num_hidden_layers=num_layers, **self.widths)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
            return CheckpointFolder(folder).model(self.dtype)

    def plan(self) -> TokenPlan:
        """A micro-batch of records of 768 shared tokens and two responses of 128."""
        rng, sequences = np.random.default_rng(0), []
        for _ in range(self.num_records):
            prefix, *responses = np.split(rng.integers(1, 1024, 1024), [768, 896])
            sequences += [np.concatenate([prefix, own]) for own in responses]
        return plan_tokens(sequences).to(self.device)

    def layer_forward(self) -> tuple[nn.Module, Callable[[], Tensor]]:
        """A decoder layer, and its forward pass over a micro-batch."""
        decoder, plan = drawn(self.model(2), self.device).model.language_model, self.plan()
        hidden = torch.randn(1, self.num_tokens, self.widths["hidden_size"], device=self.device, dtype=self.dtype)
        rotary = decoder.rotary_emb(hidden, plan.rope_positions())
        options = {"position_embeddings": rotary, "attention_mask": None, **plan.attention_plan()}
        first = decoder.layers[0]  # the last one reads few tokens
        return first, partial(first, hidden.requires_grad_(), **options)


@torch.no_grad()
def drawn(model: RewardModel, device: torch.device) -> RewardModel:
    """A model of the meta device on another, with random weights."""
    model.to_empty(device=device)
    renew_rope(model.model.language_model, device)
    for parameter in model.parameters():
        local_rows(parameter)[0].normal_(std=0.02)
    return model


def num_tokens_of(preparer: Preparer, groups: list[Group], number: int) -> int:
    """Prepare and pack one of the groups; its tokens, after sharing."""
    return len(pack_items(preparer, [groups[number % len(groups)]], preparer.whole).batch.main.source_T)
