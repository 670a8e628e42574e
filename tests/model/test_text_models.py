"""Every text model of transformers that an InternVL config takes gives a plain forward's values or is refused by name.

`python tests/model/test_text_models.py [model_type ...]` prints what each of them does; the tests here try those whose
code differs in kind.
"""

import copy
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mmrm_fast.data.images import NORMALIZATION
from mmrm_fast.data.packing import plan_tokens
from mmrm_fast.model.decoder import packed_hidden, renew_rope, rope_regime
from mmrm_fast.model.reward_model import RewardModel

BOUND = 1e-5  # of the largest value, in fp32
VOCABULARY = 64
WINDOW = 8  # shorter than the paths below
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "ffn_dim": 48, "d_ff": 48,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MROPE = {"hidden_size": 512, "head_dim": 128}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
OWN = {
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA,
    "cosmos3_edge_text": MROPE,
    "cwm": TOKENS,
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0},
    "glm4v_moe_text": {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1},
    "glm4v_text": {"hidden_size": 256, "head_dim": 64},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0},
    "glm_image_text": {**TOKENS, "hidden_size": 256, "head_dim": 64},
    "glm_ocr_text": {"hidden_size": 256, "head_dim": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "hunyuan_vl_text": TOKENS,
    "hy_v4_vl_text": {"qk_rope_head_dim": 64},
    "kyutai_speech_to_text": TOKENS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "modernbert-decoder": TOKENS,
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "xlnet": {"d_head": 8},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
SCALES = {"embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 5.0}
VARIANTS = {  # a model type, and what differs from its defaults
    "qwen2, windows from layer 1": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3, windows from layer 0": ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    "phi3, longrope": (
        "phi3", {"original_max_position_embeddings": 20, "max_position_embeddings": 80, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}}
    ),
    "llama, dynamic RoPE and biases": (
        "llama", {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 30,
                  "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    ),
    "llama, one key/value head": ("llama", {"num_key_value_heads": 1}),
    "granite, multipliers": ("granite", SCALES),
    "granitemoe, multipliers": ("granitemoe", SCALES),
    "stablelm, normalized queries": ("stablelm", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "gemma2, all windows": ("gemma2", {"layer_types": ["sliding_attention"] * 2}),
    "cohere, normalized queries": ("cohere", {"use_qk_norm": True}),
    "gpt_oss, four windows of two": ("gpt_oss", {"sliding_window": 2, "num_hidden_layers": 4}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "ministral3, scaled by position": (
        "ministral3", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20,
            "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}}
    ),
}  # fmt: skip
MAXIMUM = 30_000_000  # parameters
PROMPT = np.arange(40) % 7
SEQUENCES = [PROMPT[:5], *(np.append(PROMPT, np.arange(count) + count) for count in (0, 3, 6, 20))]


CORE = (
    "cohere2", "gpt_oss", "granite", "internlm3", "llama", "ministral", "mistral", "mixtral", "olmo2", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
REFUSED = {
    "bert": "it has no embed_tokens",
    "deepseek_v3": "kv_lora_rank 8, latent attention",
    "falcon": "it has no embed_tokens",
    "gemma3_text": "token embedding is Gemma3TextScaledWordEmbedding",
    "glm4_moe": "values that are no parameters, such as .*e_score_correction_bias",
    "gpt2": "it has no embed_tokens",
    "llama4_text": "layers of chunked_attention",
    "mamba": "layers of linear_attention",
    "qwen3_next": "layers of linear_attention",
    "stablelm, normalized queries": "the packing plan did not reach the attention",
    "gemma2, all windows": "token embedding is Gemma2TextScaledWordEmbedding",
}


def tiny_config(model_type: str, **options) -> PreTrainedConfig:
    """A text model's config with its sizes made small and the rest as it is by default."""
    kind = CONFIG_MAPPING[model_type]
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:
        sizes.pop("head_dim", None)
    return kind(**{**sizes, **OWN.get(model_type, {}), **options})


def internvl_config(text_config: PreTrainedConfig) -> InternVLConfig:
    """A tiny InternVL around a text model."""
    vision = InternVLVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=28, patch_size=14
    )
    return InternVLConfig(
        vision_config=vision, text_config=text_config, image_token_id=VOCABULARY - 1, image_seq_length=1
    )


def empty_model(config: InternVLConfig) -> InternVLModel:
    """transformers' own model without weights."""
    with torch.device("meta"):
        return InternVLModel(copy.deepcopy(config)).eval()


def tiny_model(config: InternVLConfig) -> InternVLModel:
    """transformers' own model with random weights."""
    config.text_config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = InternVLModel(config).float().eval()
    for name, parameter in model.named_parameters():  # large enough that attention is not uniform
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else parameter.shape[-1] ** -0.5)
        else:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def packed_values(model: RewardModel, sequences: list) -> torch.Tensor:
    """The last hidden states of packed sequences."""
    decoder = model.model.language_model
    plan = plan_tokens(sequences, rope_regime(decoder.config))
    hidden = packed_hidden(decoder, decoder.embed_tokens.weight[plan.source_T], plan)
    return hidden[plan.read_row_R if model.reads_last_tokens else plan.last_index_R]


@torch.no_grad()
def difference(plain: InternVLModel, empty: RewardModel) -> float:
    """The largest difference of packed values, of a model and of one filled from the meta device."""
    empty.model.to_empty(device="cpu")
    renew_rope(empty.model.language_model, "cpu")
    empty.model.load_state_dict(plain.state_dict())
    alone = [plain(input_ids=torch.from_numpy(ids)[None], use_cache=False).last_hidden_state for ids in SEQUENCES]
    expected = torch.cat([hidden[0, -1:] for hidden in alone])
    own = RewardModel(plain, *NORMALIZATION["imagenet"])
    errors = [(packed_values(model, SEQUENCES) - expected).abs().max() for model in (own, empty)]
    return float(torch.stack(errors).max() / expected.abs().max())


def outcome(model_type: str, options: dict) -> tuple[str, str]:
    """What comes of a text model: `equal` or `DIFFERS` and by how much, `refused` or `none` and the words.

    `none` is what transformers builds no InternVL of, or not from these sizes.
    """
    try:
        config = internvl_config(tiny_config(model_type, **options))
        empty = empty_model(config)
    except Exception as error:
        return "none", f"{type(error).__name__}: {error}"
    try:
        empty = RewardModel(empty, *NORMALIZATION["imagenet"])
    except ValueError as error:
        return "refused", str(error)
    size = sum(parameter.numel() for parameter in empty.parameters())
    assert size <= MAXIMUM, f"{size} parameters"
    worst = difference(tiny_model(config), empty)
    return "equal" if worst <= BOUND else "DIFFERS", f"{worst:.1e}"


@pytest.mark.parametrize("name", sorted({*CORE, *REFUSED, *VARIANTS}))
def test_a_text_model_gives_a_plain_forward_s_values_or_is_refused_by_name(name):
    """What is refused says which model and why; nothing differs, and nothing else is raised."""
    model_type, options = VARIANTS.get(name, (name, {}))
    if model_type not in MODEL_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    result, text = outcome(model_type, options)
    assert result == ("refused" if name in REFUSED else "equal"), text
    if result == "refused":
        assert re.search(f"InternVLModel with .*Model is not supported: .*{REFUSED[name]}", text)


@pytest.mark.parametrize("name", random.Random(0).sample(sorted({*MODEL_MAPPING_NAMES} - {*CORE, *REFUSED}), 40))
def test_any_model_that_could_be_named_gives_a_plain_forward_s_values_or_is_refused(name):
    assert outcome(name, {})[0] in ("equal", "refused", "none")


def print_table(names: list[str]) -> None:
    """The outcome of each of these, all without any."""
    transformers.logging.set_verbosity_error()
    found = Counter()
    for name in names or [*sorted(MODEL_MAPPING_NAMES), *VARIANTS]:
        result, text = outcome(*VARIANTS.get(name, (name, {})))
        found[result] += 1
        print(name, result, " ".join(text.split()), sep=" | ", flush=True)
    print(dict(found))


if __name__ == "__main__":
    print_table(sys.argv[1:])
