"""What changes inside transformers' decoder: attention over a plan, and three modules that compute the same for less.

Attention comes in by transformers' own interface, so that models stay theirs; `self_check` says what of it is exact.

Shapes: T packed tokens, R tokens that are read, E head size, D hidden size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from mmrm_fast.data.packing import TokenPlan
from mmrm_fast.ops.trie_attention import trie_attention

NAME = "mmrm_trie"
PLAN = ("cu_seqlens_q", "kv_index", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "calls", "call_sizes")
READ_ELSEWHERE = (
    "read_index", "read_kv_index", "read_cu_seqlens_k", "read_calls", "read_call_sizes", "position_ids",
    "output_router_logits",
)  # fmt: skip
PRE_NORM_LAYERS = (
    "GptOssDecoderLayer", "LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer",
)  # fmt: skip
GATED_MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP")


def use_trie_attention(language_model: PreTrainedModel) -> None:
    """Let a transformers decoder attend through the trie plan. Raises `ValueError` where its attention is its own."""
    AttentionInterface.register(NAME, trie_attention_forward)
    language_model.set_attn_implementation(NAME)
    if language_model.config._attn_implementation != NAME:
        raise ValueError("it does not attend through transformers' AttentionInterface")


def trie_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, s_aux: Tensor | None = None, **options,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' calling convention around `trie_attention`: q, k, v are [1, heads, T, E], sinks `s_aux` [heads].

    The packing plan (`packing.TokenPlan.attention_plan`) travels as keyword arguments from the model's forward.
    Raises `ValueError` for any other argument, as it is not honoured here.
    """
    if "kv_index" not in options:
        raise ValueError("the packing plan did not reach the attention: pass **plan.attention_plan() to the model")
    check_options(module, {**options, "attention_mask": attention_mask, "dropout": dropout or None})
    out = trie_attention(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        **{name: options[name] for name in PLAN if name in options},
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        sink_H=s_aux,
    )
    return out.unsqueeze(0), None


def check_options(module: nn.Module, options: dict) -> None:
    """Raise `ValueError` for what an attention is asked for but does not do; None and False ask for nothing."""
    name = type(module).__name__
    if options.pop("is_causal", None) is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{name} lets tokens attend to those after them: not supported")
    for option, value in options.items():
        if option not in (*PLAN, *READ_ELSEWHERE) and value is not None and value is not False:
            raise ValueError(f"{name} attends with {option}, which is not supported: a reward would not be the model's")


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
    out = layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden + (out[0] if isinstance(out, tuple) else out)  # experts return their router's scores too


def read_attention(
    attention: nn.Module, hidden_states: Tensor, read_index: Tensor, *, position_embeddings: tuple[Tensor, Tensor],
    read_kv_index: Tensor, read_cu_seqlens_k: Tensor, read_calls: Tensor, read_call_sizes: tuple[int, ...],
    max_seqlen_k: int, **kwargs,
) -> Tensor:  # fmt: skip
    """A decoder layer's attention [1, R, D] whose queries are the tokens `read_index`, each over its own path."""
    read, rotary = hidden_states.index_select(1, read_index), torch.stack(position_embeddings)
    projected = (attention.q_proj(read), attention.k_proj(hidden_states), attention.v_proj(hidden_states))
    query, key, value = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in projected)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    out, _ = trie_attention_forward(
        attention, rotate(query, *rotary.index_select(2, read_index)), rotate(key, *rotary), value, None,
        attention.scaling, sliding_window=getattr(attention, "sliding_window", None),
        dropout=attention.attention_dropout if attention.training else 0.0,
        s_aux=getattr(attention, "sinks", None),
        cu_seqlens_q=torch.arange(len(read_index) + 1, dtype=torch.int32, device=read_index.device),
        kv_index=read_kv_index, cu_seqlens_k=read_cu_seqlens_k, max_seqlen_q=1, max_seqlen_k=max_seqlen_k,
        calls=read_calls, call_sizes=read_call_sizes,
    )  # fmt: skip
    return attention.o_proj(out.flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of queries or keys [1, heads, T, E] as the layers of PRE_NORM_LAYERS have it.

    cos and sin are [1, T, E], or [1, T, E / 2] for both halves.
    """
    if cos.shape[-1] < x.shape[-1]:
        cos, sin = (torch.cat([half, half], dim=-1) for half in (cos, sin))
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


class GatedProduct(torch.autograd.Function):
    """silu(gate) * up, elementwise; bit for bit what autograd gives, of which it saves the two arguments alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


class GatedMLP(nn.Module):
    """transformers' gated MLP, `down(silu(gate(x)) * up(x))`, around its own layers."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))


def use_gated_product(language_model: PreTrainedModel) -> bool:
    """Let the decoder's MLPs be `GatedMLP`, where their class is known to mean it; whether any is."""
    if getattr(language_model.config, "hidden_act", None) != "silu":
        return False
    known = [layer for layer in language_model.layers if type(getattr(layer, "mlp", None)).__name__ in GATED_MLPS]
    for layer in known:
        layer.mlp = GatedMLP(layer.mlp)
    return bool(known)


def rope_regime(config: PreTrainedConfig) -> Callable[[int], int] | None:
    """Which frequencies a text config's RoPE gives a sequence of so many tokens; None where all have the same.

    That is 0 for those of the short, else a length that has them: `dynamic` (InternLM2) stretches its base with every
    token over a threshold, `longrope` (Phi-3's "su") has other factors over one.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {own.get("rope_type") for own in (parameters, *parameters.values()) if isinstance(own, dict)}
    if not kinds & {"dynamic", "longrope"}:
        return None
    if "rope_type" not in parameters:
        raise ValueError(f"{config.model_type}: layers of one kind have RoPE of their own that depends on the length")
    if parameters["rope_type"] == "dynamic":
        return partial(regime, threshold=config.max_position_embeddings, is_continuous=True)
    return partial(regime, threshold=parameters["original_max_position_embeddings"], is_continuous=False)


def regime(length: int, *, threshold: int, is_continuous: bool) -> int:
    """A length with the frequencies of a sequence of this one; `is_continuous` where each over a threshold has own."""
    return 0 if length <= threshold else length if is_continuous else threshold + 1


class OwnLengthRope(nn.Module):
    """transformers' rotary embedding `kind`, with each token's own frequencies and no state.

    transformers takes the length from the longest position in the batch and remembers it, which would let one long
    response change its neighbours' rewards. Here it is asked once a regime, anew, with a sequence of that length alone.

    Called with position ids [1, T], or [2, T]: position ids and the `rope_regime` of each token's sequence.
    """

    def __init__(self, kind: type[nn.Module], config: PreTrainedConfig):
        super().__init__()
        self.kind, self.config = kind, config

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, E] in x's dtype, computed in fp32."""
        positions, *regimes = position_ids
        if not regimes:
            return self.of_regime(0, x, positions)
        rotary = None
        for regime in regimes[0].unique().tolist():
            is_own = regimes[0] == regime
            own = torch.stack(self.of_regime(regime, x, positions.where(is_own, 0)))
            rotary = own if rotary is None else own.where(is_own[:, None], rotary)
        return rotary[0], rotary[1]

    def of_regime(self, regime: int, x: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, E] with the frequencies of one regime, at positions of its sequences."""
        with x.device:
            rope = self.kind(self.config)
        if x.is_meta:  # transformers would look at the positions
            cos = x.new_empty(1, len(positions_T), 2 * len(rope.inv_freq))
            return cos, cos.clone()
        last = positions_T.new_full((1,), max(regime - 1, 0))  # of a sequence of that length
        cos, sin = rope(x, torch.cat([positions_T, last])[None])
        return cos[:, :-1], sin[:, :-1]


def use_own_length_rope(language_model: PreTrainedModel) -> None:
    """Replace a decoder's rotary embedding where its frequencies depend on the length."""
    if rope_regime(language_model.config) is not None:
        rope = language_model.rotary_emb
        language_model.rotary_emb = OwnLengthRope(getattr(rope, "kind", type(rope)), language_model.config)


def renew_rope(language_model: PreTrainedModel, device: torch.device | str) -> None:
    """Compute a decoder's frequencies on a device; they are no parameters, so no checkpoint holds them."""
    rope = getattr(language_model, "rotary_emb", None)
    if rope is not None and not isinstance(rope, OwnLengthRope):
        language_model.rotary_emb = type(rope)(language_model.config).to(device)


def packed_hidden(language_model: PreTrainedModel, embeds_TD: Tensor, plan: TokenPlan) -> Tensor:
    """A prepared decoder's last hidden states [T, D] of packed tokens, or of those that are read alone."""
    options = {"position_ids": plan.rope_positions(), "use_cache": False, **plan.attention_plan()}
    return language_model(inputs_embeds=embeds_TD.unsqueeze(0), **options).last_hidden_state[0]
