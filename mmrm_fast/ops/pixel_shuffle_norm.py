"""pixel_shuffle_norm: drop the CLS token, fold 2 x 2 patches into one row and LayerNorm it, in one pass.

I tiles, G patches a tile side, C channels, N = I * (G / 2)^2 rows of 4C.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmrm_fast.ops.native import addresses, native
from mmrm_fast.ops.triton import use_triton

library = torch.library.Library("mmrm_fast", "FRAGMENT")
library.define(
    "pixel_shuffle_norm_fwd(Tensor hidden, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor mean,"
    " Tensor rstd)"
)
library.define(
    "pixel_shuffle_norm_bwd(Tensor grad, Tensor hidden, Tensor weight, Tensor mean, Tensor rstd, bool need_hidden)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


def pixel_shuffle_norm_ref(hidden, weight, bias, eps):
    """What the op means, in plain torch; any device."""
    rows = _shuffle(hidden).to(_exact(hidden))
    mean = rows.mean(1)
    centered = rows - mean[:, None]
    rstd = (centered.square().mean(1) + eps).rsqrt()
    out = centered * rstd[:, None] * weight.to(rows.dtype) + bias.to(rows.dtype)
    return out.to(hidden.dtype), mean, rstd


def pixel_shuffle_norm_bwd_ref(grad, hidden, weight, mean, rstd, need_hidden):
    """Gradients of `out`, in plain torch; any device."""
    grad, mean, rstd = grad.to(mean.dtype), mean[:, None], rstd[:, None]
    normal = (_shuffle(hidden).to(mean.dtype) - mean) * rstd
    grad_weight, grad_bias = (total.sum(0).to(weight.dtype) for total in (grad * normal, grad))
    if not need_hidden:
        return hidden.new_empty(0), grad_weight, grad_bias
    slope = grad * weight.to(mean.dtype)
    centered = slope - slope.mean(1, keepdim=True) - normal * (slope * normal).mean(1, keepdim=True)
    return _unshuffle(rstd * centered, hidden), grad_weight, grad_bias


def _shuffle(hidden: Tensor) -> Tensor:
    """[I, 1 + G*G, C] -> [N, 4C], channels of a row in (y, x, channel) order."""
    num_tiles, num_tokens, channels = hidden.shape
    half = math.isqrt(num_tokens - 1) // 2
    blocks = hidden[:, 1:].reshape(num_tiles, half, 2, half, 2 * channels).transpose(2, 3)
    return blocks.reshape(num_tiles * half * half, 4 * channels)


def _unshuffle(rows: Tensor, hidden: Tensor) -> Tensor:
    """The transpose of `_shuffle`: zero for CLS."""
    num_tiles, num_tokens, channels = hidden.shape
    half = math.isqrt(num_tokens - 1) // 2
    blocks = rows.to(hidden.dtype).reshape(num_tiles, half, half, 2, 2 * channels).transpose(2, 3)
    return pad(blocks.reshape(num_tiles, num_tokens - 1, channels), (0, 0, 1, 0))


def _exact(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


library.impl("pixel_shuffle_norm_fwd", pixel_shuffle_norm_ref, "CompositeExplicitAutograd")
library.impl("pixel_shuffle_norm_bwd", pixel_shuffle_norm_bwd_ref, "CompositeExplicitAutograd")


def pixel_shuffle_norm_fwd_cpu(hidden, weight, bias, eps):
    """`pixel_shuffle_norm_ref` in C++."""
    outputs = _empty_outputs(hidden)
    inputs = [t.contiguous() for t in (hidden, weight.to(_exact(hidden)), bias.to(_exact(hidden)))]
    native().pixel_shuffle_norm_fwd_cpu(
        str(hidden.dtype), *addresses(*inputs, device=hidden.device), eps,
        *addresses(*outputs, device=hidden.device), *_sizes(hidden), torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def pixel_shuffle_norm_bwd_cpu(grad, hidden, weight, mean, rstd, need_hidden):
    """`pixel_shuffle_norm_bwd_ref` in C++."""
    grad_hidden = _empty_grad(hidden, need_hidden)
    sums = mean.new_empty(2, weight.shape[0])
    inputs = [t.contiguous() for t in (grad, hidden, weight.to(mean.dtype), mean, rstd)]
    outputs = (grad_hidden if need_hidden else None, *sums)
    native().pixel_shuffle_norm_bwd_cpu(
        str(hidden.dtype), *addresses(*inputs, *outputs, device=hidden.device), *_sizes(hidden),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_hidden, *(total.to(weight.dtype, copy=True) for total in sums)


def _sizes(hidden: Tensor) -> tuple[int, int, int]:
    """I, G, C."""
    num_tiles, num_tokens, channels = hidden.shape
    return num_tiles, math.isqrt(num_tokens - 1), channels


def _empty_outputs(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_tiles, num_tokens, channels = hidden.shape
    num_rows, exact = num_tiles * ((num_tokens - 1) // 4), _exact(hidden)
    return hidden.new_empty(num_rows, 4 * channels), *(hidden.new_empty(num_rows, dtype=exact) for _ in range(2))


def _empty_grad(hidden: Tensor, need_hidden: bool) -> Tensor:
    return hidden.new_empty(hidden.shape if need_hidden else 0)


if native() is not None:
    library.impl("pixel_shuffle_norm_fwd", pixel_shuffle_norm_fwd_cpu, "CPU")
    library.impl("pixel_shuffle_norm_bwd", pixel_shuffle_norm_bwd_cpu, "CPU")
use_triton(
    library,
    "pixel_shuffle_norm",
    pixel_shuffle_norm_fwd=pixel_shuffle_norm_ref,
    pixel_shuffle_norm_bwd=pixel_shuffle_norm_bwd_ref,
)


@torch.library.register_fake("mmrm_fast::pixel_shuffle_norm_fwd", lib=library)
def _(hidden, weight, bias, eps):
    return _empty_outputs(hidden)


@torch.library.register_fake("mmrm_fast::pixel_shuffle_norm_bwd", lib=library)
def _(grad, hidden, weight, mean, rstd, need_hidden):
    return _empty_grad(hidden, need_hidden), *(weight.new_empty(weight.shape) for _ in range(2))


def _setup_context(ctx, inputs, output):
    hidden, weight, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(hidden, weight, mean, rstd)


def _backward(ctx, grad, *_):
    need_hidden = ctx.needs_input_grad[0]
    grad_hidden, *others = torch.ops.mmrm_fast.pixel_shuffle_norm_bwd(grad, *ctx.saved_tensors, need_hidden)
    return grad_hidden if need_hidden else None, *others, None


torch.library.register_autograd(
    "mmrm_fast::pixel_shuffle_norm_fwd", _backward, setup_context=_setup_context, lib=library
)


def pixel_shuffle_norm(hidden_ITC: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Vision tower's output to the projector's normalised input.

    Patches (2Y, 2X), (2Y, 2X+1), (2Y+1, 2X), (2Y+1, 2X+1) make row (Y, X), their channels one after another, as
    transformers' `InternVLModel.pixel_shuffle` does at scale 0.5; then `(x - mean) / sqrt(variance + eps) * weight +
    bias` over the row.

    Args:
        hidden_ITC: [I, 1 + G * G, C], CLS first, G even; float32, bfloat16, float16 or float64.
        weight, bias: [4C] of the LayerNorm, in hidden's dtype or another float dtype.
        eps: of the LayerNorm.

    Returns:
        [N, 4C] in hidden's dtype. Statistics, arithmetic and the sums of weight and bias gradients are float32
        (float64 for float64 hidden states); the CLS token's gradient is zero.

    Raises:
        ValueError: a shape or dtype that differs from the above.
    """
    if hidden_ITC.ndim != 3 or not hidden_ITC.is_floating_point():
        raise ValueError(f"hidden must be [I, 1 + G * G, C] float, got {list(hidden_ITC.shape)} {hidden_ITC.dtype}")
    num_patches, channels = hidden_ITC.shape[1] - 1, hidden_ITC.shape[2]
    if num_patches < 0 or math.isqrt(num_patches) ** 2 != num_patches or num_patches % 4:
        raise ValueError(f"hidden must have 1 + G * G tokens a tile, G even, got {num_patches + 1}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (4 * channels,):
            raise ValueError(f"{name} must be [{4 * channels}], got {list(tensor.shape)}")
    return torch.ops.mmrm_fast.pixel_shuffle_norm_fwd(hidden_ITC, weight, bias, eps)[0]
