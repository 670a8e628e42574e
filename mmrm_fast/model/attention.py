"""Attention as transformers' own interface, so that models stay theirs; and what no reward reads, left out."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import rotate_half

from mmrm_fast.ops.trie_attention import has_native, trie_attention

NAME, TILES_NAME = "mmrm_trie", "mmrm_tiles"
PRE_NORM_LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def trie_attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **plan
) -> tuple[Tensor, None]:
    """transformers' calling convention around `trie_attention`: q, k, v are [1, heads, T, E].

    The packing plan (`packing.TokenPlan.attention_plan`) travels as keyword arguments from the model's forward.
    """
    if "kv_index" not in plan:
        raise ValueError("the packing plan did not reach the attention: pass **plan.attention_plan() to the model")
    window = plan.get("sliding_window")
    if window and plan["max_seqlen_k"] > window:
        raise ValueError(
            f"this model attends over {window} tokens, a sequence has {plan['max_seqlen_k']}: not supported"
        )
    if plan.get("dropout"):
        raise ValueError(f"attention dropout {plan['dropout']} is not supported: a reward must not be random")
    out = trie_attention(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        cu_seqlens_q=plan["cu_seqlens_q"],
        kv_index=plan["kv_index"],
        cu_seqlens_k=plan["cu_seqlens_k"],
        max_seqlen_q=plan["max_seqlen_q"],
        max_seqlen_k=plan["max_seqlen_k"],
        scale=scaling,
    )
    return out.unsqueeze(0), None


def tile_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """Every patch over its own tile's: `trie_attention` where it has a C++ kernel, torch's SDPA elsewhere.

    q, k, v are [I, heads, L, E]: I tiles of L patches.
    """
    num_tiles, _, length, size = query.shape
    if query.device.type != "cpu" or not has_native(query.dtype, size) or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    edges = length * torch.arange(num_tiles + 1, dtype=torch.int32)
    out = trie_attention(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        cu_seqlens_q=edges,
        kv_index=torch.arange(num_tiles * length),
        cu_seqlens_k=edges,
        max_seqlen_q=length,
        max_seqlen_k=length,
        scale=scaling,
        causal=False,
    )
    return out.unflatten(0, (num_tiles, length)), None


def use_trie_attention(language_model: PreTrainedModel) -> None:
    """Let a transformers decoder attend through the trie plan."""
    AttentionInterface.register(NAME, trie_attention_forward)
    language_model.set_attn_implementation(NAME)


def use_tile_attention(vision_tower: PreTrainedModel) -> None:
    """Let a transformers vision tower attend by `tile_attention_forward`."""
    AttentionInterface.register(TILES_NAME, tile_attention_forward)
    vision_tower.set_attn_implementation(TILES_NAME)


def read_last_tokens(language_model: PreTrainedModel) -> bool:
    """Let the last layer compute only the rows that `read_index`, a keyword argument of the forward, names.

    Nothing but the keys and values of the last layer's other tokens is read by a reward; their queries and MLP are not.
    False where the layer's class is not known to be attention and MLP, each behind its norm and added: nothing changes.
    """
    layer = language_model.layers[-1]
    if type(layer).__name__ not in PRE_NORM_LAYERS:
        return False
    layer.forward = partial(last_layer_forward, layer)
    return True


def last_layer_forward(
    layer: nn.Module, hidden_states: Tensor, *, read_index: Tensor | None = None, **kwargs
) -> Tensor:
    """A pre-norm decoder layer's output [1, R, D] at `read_index` [R] of its tokens [1, T, D]; all where it is None."""
    if read_index is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    attended = read_attention(layer.self_attn, layer.input_layernorm(hidden_states), read_index, **kwargs)
    hidden = hidden_states.index_select(1, read_index) + attended
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def read_attention(
    attention: nn.Module,
    hidden_states: Tensor,
    read_index: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    read_kv_index: Tensor,
    read_cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    **kwargs,
) -> Tensor:
    """A decoder layer's attention [1, R, D] whose queries are the tokens `read_index`, each over its own path."""
    read, rotary = hidden_states.index_select(1, read_index), torch.stack(position_embeddings)
    query, key, value = (
        project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project, x in (
            (attention.q_proj, read), (attention.k_proj, hidden_states), (attention.v_proj, hidden_states)
        )
    )  # fmt: skip
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    out, _ = trie_attention_forward(
        attention, rotate(query, *rotary.index_select(2, read_index)), rotate(key, *rotary), value, None,
        attention.scaling, sliding_window=getattr(attention, "sliding_window", None),
        dropout=attention.attention_dropout if attention.training else 0.0,
        cu_seqlens_q=torch.arange(len(read_index) + 1, dtype=torch.int32, device=read_index.device),
        kv_index=read_kv_index, cu_seqlens_k=read_cu_seqlens_k, max_seqlen_q=1, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    return attention.o_proj(out.flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of queries or keys [1, heads, T, E] as the layers of PRE_NORM_LAYERS have it; cos and sin are [1, T, E]."""
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)
