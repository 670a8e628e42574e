"""reward_head: the score of each response's last token, without gathering or scoring any other.

T packed tokens, R responses, D hidden size.
"""

import torch
from torch import Tensor

from mmrm_fast.ops.native import addresses, native
from mmrm_fast.ops.triton import use_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

library = torch.library.Library("mmrm_fast", "FRAGMENT")
library.define("reward_head_fwd(Tensor hidden, Tensor last_index, Tensor weight) -> Tensor")
library.define(
    "reward_head_bwd(Tensor grad, Tensor hidden, Tensor last_index, Tensor weight)"
    " -> (Tensor grad_hidden, Tensor grad_weight)"
)


def reward_head_ref(hidden, last_index, weight):
    """What the op means, in plain torch; any device."""
    return hidden[last_index].to(weight.dtype) @ weight


def reward_head_bwd_ref(grad, hidden, last_index, weight):
    """Gradients of hidden states and weight, in plain torch; any device."""
    by_token = grad.new_zeros(hidden.shape[0]).index_add_(0, last_index, grad)
    rows = (by_token[last_index, None] * weight).to(hidden.dtype)
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    return grad_hidden.index_copy_(0, last_index, rows), grad @ hidden[last_index].to(weight.dtype)


library.impl("reward_head_fwd", reward_head_ref, "CompositeExplicitAutograd")
library.impl("reward_head_bwd", reward_head_bwd_ref, "CompositeExplicitAutograd")


def reward_head_fwd_cpu(hidden, last_index, weight):
    """`reward_head_ref` in C++."""
    rewards = weight.new_empty(last_index.shape[0])
    _run(native().reward_head_fwd_cpu, hidden, last_index, weight, rewards)
    return rewards


def reward_head_bwd_cpu(grad, hidden, last_index, weight):
    """`reward_head_bwd_ref` in C++."""
    grads = _empty_grads(hidden, weight)
    _run(native().reward_head_bwd_cpu, hidden, last_index, weight, grad.contiguous(), *grads)
    return grads


def _run(function, hidden: Tensor, last_index: Tensor, weight: Tensor, *others: Tensor) -> None:
    inputs = [t.contiguous() for t in (hidden, last_index, weight)]
    pointers = addresses(*inputs, *others, device=hidden.device)
    function(str(hidden.dtype), *pointers, *hidden.shape, last_index.shape[0], torch.get_num_threads())


def _empty_grads(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


if native() is not None:
    library.impl("reward_head_fwd", reward_head_fwd_cpu, "CPU")
    library.impl("reward_head_bwd", reward_head_bwd_cpu, "CPU")
use_triton(library, "reward_head", reward_head_fwd=reward_head_ref, reward_head_bwd=reward_head_bwd_ref)


@torch.library.register_fake("mmrm_fast::reward_head_fwd", lib=library)
def _(hidden, last_index, weight):
    return weight.new_empty(last_index.shape[0])


@torch.library.register_fake("mmrm_fast::reward_head_bwd", lib=library)
def _(grad, hidden, last_index, weight):
    return _empty_grads(hidden, weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    grad_hidden, grad_weight = torch.ops.mmrm_fast.reward_head_bwd(grad, *ctx.saved_tensors)
    need_hidden, _, need_weight = ctx.needs_input_grad
    return grad_hidden if need_hidden else None, None, grad_weight if need_weight else None


torch.library.register_autograd("mmrm_fast::reward_head_fwd", _backward, setup_context=_setup_context, lib=library)


def reward_head(hidden_TD: Tensor, last_index_R: Tensor, weight_D: Tensor) -> Tensor:
    """Rewards `hidden[last_index] @ weight`.

    Args:
        hidden_TD: [T, D] float32, bfloat16, float16 or float64, the last hidden states of the packed tokens.
        last_index_R: [R] int64, where each response ends; a token may be the last of several.
        weight_D: [D] float32, float64 for float64 hidden states.

    Returns:
        [R] in the weight's dtype, in which everything is multiplied and summed, gradients too. The gradient of the
        hidden states is in their dtype and zero but for the tokens that are read.

    Raises:
        ValueError: a shape or dtype that differs from the above.
        IndexError: on the CPU, a last index outside the tokens.
    """
    if hidden_TD.ndim != 2 or hidden_TD.dtype not in DTYPES:
        raise ValueError(f"hidden must be [T, D] float, got {list(hidden_TD.shape)} {hidden_TD.dtype}")
    exact = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    width = hidden_TD.shape[1]
    if weight_D.shape != (width,) or weight_D.dtype != exact:
        raise ValueError(f"weight must be [{width}] {exact}, got {list(weight_D.shape)} {weight_D.dtype}")
    if last_index_R.ndim != 1 or last_index_R.dtype != torch.int64:
        raise ValueError(f"last_index must be [R] int64, got {list(last_index_R.shape)} {last_index_R.dtype}")
    return torch.ops.mmrm_fast.reward_head_fwd(hidden_TD, last_index_R, weight_D)
