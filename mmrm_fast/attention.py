"""Trie attention as transformers' own attention interface, so that the language model's code stays theirs."""

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from mmrm_fast.ops.trie_attention import trie_attention

NAME = "mmrm_trie"


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


def use_trie_attention(language_model: PreTrainedModel) -> None:
    """Let a transformers decoder attend through the trie plan (vision towers keep SDPA)."""
    AttentionInterface.register(NAME, trie_attention_forward)
    language_model.set_attn_implementation(NAME)
