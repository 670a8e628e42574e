"""Every backend of an op on a device, values and gradients, against its plain reference in float64 on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from mmrm_fast.data.packing import TokenPlan, plan_tokens
from mmrm_fast.doctor.checks import Check, Found, judged, left_out
from mmrm_fast.ops import trie_attention as attention
from mmrm_fast.ops import trie_attention_cuda as on_cuda
from mmrm_fast.ops.native import cuda_native, native
from mmrm_fast.ops.pack_image_tokens import pack_image_tokens_bwd_ref, pack_image_tokens_ref, source_index
from mmrm_fast.ops.pair_loss import pair_loss_ref
from mmrm_fast.ops.plan_trie import plan_trie, plan_trie_ref
from mmrm_fast.ops.resize_bicubic import resize_bicubic, resize_bicubic_ref
from mmrm_fast.ops.triton import run_triton

SCHEMAS = (
    ("pair_loss", "pair_loss_fwd", pair_loss_ref),  # its forward has the gradients
    ("pack_image_tokens", "pack_image_tokens_fwd", pack_image_tokens_ref),
    ("pack_image_tokens", "pack_image_tokens_bwd", pack_image_tokens_bwd_ref),
)
ALLOWED = {torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}  # errors, in units of the precision
HEADS, KV_HEADS, HEAD_SIZES = 6, 2, (64, 96, 128)
NODES, WINDOW = (1, 2, 3, 65), 17
CYCLES = 20_000_000  # of a GPU, some 10 ms

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Case = tuple[list, tuple[Tensor, ...]]  # inputs on the CPU, rounded to some dtype; what comes of them in float64


def kernel_checks(device: torch.device) -> Iterator[Check]:
    """Checks of the host ops, of every op's backends, and of attention."""
    yield Check("plan_trie, resize_bicubic", host_ops)
    for op, schema, reference in SCHEMAS:
        for backend, function in backends(op, schema, reference, device).items():
            yield from everywhere(f"{schema}, {backend}", function, partial(op_cases, schema, reference), device)
    for dtype in [*ALLOWED][: 2 if device.type == "cpu" else 3]:
        for kernel, function in attention_kernels(device, dtype).items():
            for size in HEAD_SIZES:
                name = f"attention, {kernel}, {str(dtype).removeprefix('torch.')}, heads of {size}"
                yield from everywhere(name, function, partial(attention_cases, dtype, size), device)


def everywhere(name: str, function: Function, cases: Callable, device: torch.device) -> Iterator[Check]:
    """A check of a function on a device, on a GPU also on two of its streams, and on another GPU than the current."""
    places = {"": here}
    if device.type == "cuda":
        places |= {", on two streams": on_two_streams, ", on a GPU that is not current": elsewhere}
    for place, run in places.items():
        yield Check(name + place, partial(compared, function, cases, partial(run, device)))


def compared(function: Function, cases: Callable[[], Sequence[Case]], run: Callable) -> Found:
    """The largest error over the largest value, as a share of what is allowed, over the cases and their outputs."""
    errors = []
    for inputs, exact in cases():
        for outputs in run(function, inputs):
            for own, expected in zip(several(outputs), exact, strict=True):
                error = (own.cpu().double() - expected).abs().max() / expected.abs().max()
                errors.append(float(error / (ALLOWED[own.dtype] * torch.finfo(own.dtype).eps)))
    return judged(float(np.max(errors)), 1.0) if errors else left_out("there is one GPU")


def several(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def each(change: Callable[[Tensor], Tensor], inputs: list) -> list:
    """The inputs, with all tensors among them changed."""
    return [change(x) if isinstance(x, Tensor) else x for x in inputs]


def here(device: torch.device, function: Function, inputs: list) -> list:
    """What a function gives on a device."""
    return [function(*each(lambda x: x.to(device), inputs))]


def elsewhere(device: torch.device, function: Function, inputs: list) -> list:
    """What a function gives on the next GPU, which is not the current one; nothing where there is none."""
    count = torch.cuda.device_count()
    return here(torch.device("cuda", (device.index + 1) % count), function, inputs) if count > 1 else []


def on_two_streams(device: torch.device, function: Function, inputs: list) -> list:
    """What a function gives on each of two streams, of inputs that come late there: before, they are zeros."""
    main, given = torch.cuda.current_stream(device), each(lambda x: x.to(device), inputs)
    streams, outputs = [torch.cuda.Stream(device) for _ in range(2)], []
    late = [each(torch.zeros_like, given) for _ in streams]
    for stream, own in zip(streams, late, strict=True):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            for x, value in zip(own, given, strict=True):
                if isinstance(x, Tensor):
                    x.copy_(value)
            outputs.append(function(*own))
    for stream in streams:
        main.wait_stream(stream)
    return outputs


def host_ops() -> Found:
    """Fields of a plan and values of tiles that differ from the references'."""
    keys, edges = np.concatenate(forest(65)), np.cumsum([0, *map(len, forest(65))])
    fields = [vars(plan).values() for plan in (plan_trie(keys, edges), plan_trie_ref(keys, edges, 32))]
    image = np.random.default_rng(0).integers(0, 256, (97, 131, 3), np.uint8)
    tiles = resize_bicubic(image, columns=2, rows=1, tile_size=56, thumbnail=True)
    differ = sum(not np.array_equal(*both) for both in zip(*fields, strict=True))
    return judged(differ + int((tiles != resize_bicubic_ref(image, 2, 1, 56, True)).sum()), 0)


def backends(op: str, schema: str, reference: Function, device: torch.device) -> dict[str, Function]:
    """What computes a schema on a device: the dispatcher's choice, and each that can be chosen."""
    on_gpu = device.type == "cuda"
    found = {"as dispatched": getattr(torch.ops.mmrm_fast, schema), "reference": reference}
    if (cuda_native() if on_gpu else native()) is not None:
        found["CUDA C++" if on_gpu else "C++"] = getattr(import_module(f"mmrm_fast.ops.{op}"), f"{schema}_native")
    if on_gpu and find_spec("triton") is not None:
        found["Triton"] = partial(run_triton, op, schema, reference)
    return found


def case(reference: Function, dtype: torch.dtype, *inputs: object) -> Case:
    """A case of inputs of which those in float64 are rounded."""
    rounded = each(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
    return rounded, several(reference(*each(lambda x: x.double() if x.is_floating_point() else x, rounded)))


@cache
def op_cases(schema: str, reference: Function) -> list[Case]:
    """Pairs in three chunks; rows that several tokens read and that none does."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if schema == "pair_loss_fwd":
        margins = 3 * draw(4, 1500)
        return [case(reference, torch.float32, *margins, mode, 0.1) for mode in ("paper", "balanced")]
    source = torch.arange(300) * 7 % 90 - 64
    index = vars(source_index(source)).values()
    forward, backward = (draw(50, 96), draw(70, 96), source, *index), (draw(300, 96), *index, 50, 70, True)
    return [case(reference, dtype, *(forward if schema.endswith("fwd") else backward)) for dtype in ALLOWED]


def attention_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, Function]:
    """What computes attention on a device."""
    found = {"node by node": partial(attended, on_cuda.trie_attention_fwd_nodes, on_cuda.trie_attention_bwd_nodes)}
    if device.type == "cpu":
        own = partial(attended, attention.trie_attention_fwd_cpu, attention.trie_attention_bwd_cpu)
        return found | {"C++" if attention.has_native(dtype, HEAD_SIZES[0]) else "SDPA": own}
    if on_cuda.takes_flash(dtype, HEAD_SIZES[0], device):
        found["FlashAttention"] = partial(attended, on_cuda.trie_attention_fwd_cuda, on_cuda.trie_attention_bwd_cuda)
    return found


def attended(forward: Function, backward: Function, *inputs: object) -> tuple[Tensor, ...]:
    """Attention's output and the gradients of queries, keys and values; `inputs` are q, k, v, grad and the plan's."""
    (*qkv, grad), plan = inputs[:4], on_cuda.Plan(*inputs[4:])
    out, lse = forward(*qkv, plan)
    return out, *backward(grad, *qkv, out, lse, plan)


def attended_ref(*inputs: object) -> tuple[Tensor, ...]:
    """The same of the plain reference, by autograd."""
    leaves, plan = [x.clone().requires_grad_() for x in inputs[:3]], on_cuda.Plan(*inputs[4:])
    out = attention.trie_attention_ref(*leaves, *plan[:3], plan.scale, plan.causal, plan.window)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs[3])


@cache
def attention_cases(dtype: torch.dtype, head_size: int) -> list[Case]:
    """Tries of 1 to 65 nodes: of all their tokens, of the last ones alone, and with a window; heads share keys."""
    draw, found = torch.Generator().manual_seed(0), []
    for count in NODES:
        plan = plan_tokens(forest(count))
        calls = [whole(plan), last_alone(plan), whole(plan)._replace(window=WINDOW)][: 3 if count == 3 else 2]
        for about in calls:
            num_queries, num_tokens = int(about.cu_seqlens_q[-1]), len(plan.source_T)
            shapes = [(num_queries, HEADS), *[(num_tokens, KV_HEADS)] * 2, (num_queries, HEADS)]
            given = [torch.randn(*own, head_size, generator=draw, dtype=torch.float64) for own in shapes]
            found.append(case(attended_ref, dtype, *given, *about._replace(scale=head_size**-0.5)))
    return found


def forest(count: int) -> list[np.ndarray]:
    """A root and its branches of different lengths, so many nodes; of two the one goes on where the other ends."""
    branches = [1000 * number + np.arange(1 + 5 * number % 13) for number in range(1, count)]
    return [np.concatenate([np.arange(40), own]) for own in (np.arange(0), *branches)]


def whole(plan: TokenPlan) -> on_cuda.Plan:
    """What attention is told of all tokens, but for its scale."""
    edges = (plan.cu_seqlens_q, plan.kv_index, plan.cu_seqlens_k, plan.calls, list(plan.call_sizes))
    return on_cuda.Plan(*edges, plan.max_seqlen_q, plan.max_seqlen_k, 1.0)


def last_alone(plan: TokenPlan) -> on_cuda.Plan:
    """What the last layer's attention is told: single queries, each over its own path."""
    edges = torch.arange(len(plan.read_index) + 1, dtype=torch.int32)
    keys = (plan.read_kv_index, plan.read_cu_seqlens_k, plan.read_calls, list(plan.read_call_sizes))
    return on_cuda.Plan(edges, *keys, 1, plan.max_seqlen_k, 1.0)
