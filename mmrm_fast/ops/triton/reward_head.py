"""reward_head in Triton: one program a response; the weight's gradient in chunks of responses.

T tokens, R responses, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrm_fast.ops.triton.launch import Launch, Plan, block_size, sum_chunks, warps

CHUNK = 32  # responses of one sum of the weight's gradient
CHUNK_COLUMNS = 128


@triton.jit
def reward_head_fwd_kernel(hidden, last_index, weight, rewards, num_columns, BLOCK: tl.constexpr):
    response = tl.program_id(0).to(tl.int64)
    row = tl.load(last_index + response) * num_columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < num_columns
        x = tl.load(hidden + row + column, mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(rewards + response, tl.sum(total))


@triton.jit
def reward_head_bwd_hidden_kernel(
    grad, last_index, weight, grad_hidden, num_responses, num_columns, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr
):
    response = tl.program_id(0)
    token = tl.load(last_index + response)
    earlier, later = tl.zeros([BLOCK_R], tl.int32), tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, num_responses, BLOCK_R):
        other = start + tl.arange(0, BLOCK_R)
        same = tl.load(last_index + other, mask=other < num_responses, other=-1) == token
        earlier += (same & (other < response)).to(tl.int32)
        later += (same & (other > response)).to(tl.int32)
    if tl.sum(earlier) == 0:  # the first response of a token writes for all of them
        total = tl.load(grad + response).to(tl.float32)
        if tl.sum(later) > 0:
            for other in range(response + 1, num_responses):
                total += tl.where(tl.load(last_index + other) == token, tl.load(grad + other).to(tl.float32), 0.0)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < num_columns
        value = total * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_hidden + token * num_columns + column, value.to(grad_hidden.dtype.element_ty), mask=mask)


@triton.jit
def reward_head_bwd_weight_kernel(
    grad, hidden, last_index, chunks, num_responses, num_columns, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    chunk = tl.program_id(0)
    response = chunk * CHUNK + tl.arange(0, CHUNK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists, in_row = response < num_responses, column < num_columns
    row = tl.load(last_index + response, mask=exists, other=0) * num_columns
    x = tl.load(hidden + row[:, None] + column[None, :], mask=exists[:, None] & in_row[None, :], other=0.0)
    g = tl.load(grad + response, mask=exists, other=0.0).to(tl.float32)
    total = tl.sum(x.to(tl.float32) * g[:, None], axis=0)
    tl.store(chunks + chunk.to(tl.int64) * num_columns + column, total, mask=in_row)


def reward_head_fwd_plan(hidden: Tensor, last_index: Tensor, weight: Tensor) -> Plan:
    num_columns, num_responses = weight.shape[0], last_index.shape[0]
    rewards = weight.new_empty(num_responses)
    block = block_size(num_columns, 2048)
    arguments = {
        "hidden": hidden.contiguous(),
        "last_index": last_index.contiguous(),
        "weight": weight.contiguous(),
        "rewards": rewards,
        "num_columns": num_columns,
        "BLOCK": block,
    }
    return Plan((rewards,), (Launch(reward_head_fwd_kernel, (num_responses,), arguments, warps(block)),))


def reward_head_bwd_plan(grad: Tensor, hidden: Tensor, last_index: Tensor, weight: Tensor) -> Plan:
    num_columns, num_responses = weight.shape[0], last_index.shape[0]
    num_chunks, block = triton.cdiv(num_responses, CHUNK), block_size(num_columns)
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    grad_weight = weight.new_empty(num_columns)
    chunks = weight.new_empty((num_chunks, num_columns), dtype=torch.float32)
    inputs = {"grad": grad.contiguous(), "last_index": last_index.contiguous(), "num_responses": num_responses}
    inputs["num_columns"] = num_columns
    to_hidden = {"weight": weight.contiguous(), "grad_hidden": grad_hidden, "BLOCK_R": block_size(num_responses)}
    to_weight = {"hidden": hidden.contiguous(), "chunks": chunks, "CHUNK": CHUNK}
    columns = block_size(num_columns, CHUNK_COLUMNS)
    launches = (
        Launch(
            reward_head_bwd_hidden_kernel,
            (num_responses, triton.cdiv(num_columns, block)),
            inputs | to_hidden | {"BLOCK": block},
            warps(block),
        ),
        Launch(
            reward_head_bwd_weight_kernel,
            (num_chunks, triton.cdiv(num_columns, columns)),
            inputs | to_weight | {"BLOCK": columns},
        ),
        sum_chunks(chunks, grad_weight),
    )
    return Plan((grad_hidden, grad_weight), launches)


def reward_head_fwd_triton(hidden, last_index, weight):
    """Rewards [R], summed in float32."""
    return reward_head_fwd_plan(hidden, last_index, weight).run()[0]


def reward_head_bwd_triton(grad, hidden, last_index, weight):
    """Gradients of hidden [T, D] and weight [D], summed in float32."""
    return reward_head_bwd_plan(grad, hidden, last_index, weight).run()
