"""The published sizes of InternVL 2 to 3.5, as original checkpoints have them."""

from original import original_config

TOWERS = {
    "300M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "6B": {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800},
}
SU = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED = {  # vision tower, LLM, hidden size, layers, heads, key/value heads, MLP, vocabulary
    "InternVL2-1B, 2.5-1B, 3-1B": ("300M", "Qwen2", 896, 24, 14, 2, 4864, 151_655),
    "InternVL2-2B, 2.5-2B": ("300M", "InternLM2", 2048, 24, 16, 8, 8192, 92_553),
    "InternVL2-4B": ("300M", "Phi3", 3072, 32, 32, 32, 8192, 32_020),
    "InternVL2-8B, 2.5-8B": ("300M", "InternLM2", 4096, 32, 32, 8, 14336, 92_553),
    "InternVL2-26B, 2.5-26B": ("6B", "InternLM2", 6144, 48, 48, 8, 16384, 92_553),
    "InternVL2-40B": ("6B", "Llama", 7168, 60, 56, 8, 20480, 64_009),
    "InternVL2-Llama3-76B": ("6B", "Llama", 8192, 80, 64, 8, 28672, 128_265),
    "InternVL2.5-4B": ("300M", "Qwen2", 2048, 36, 16, 2, 11008, 151_674),
    "InternVL3-2B": ("300M", "Qwen2", 1536, 28, 12, 2, 8960, 151_674),
    "InternVL3-8B": ("300M", "Qwen2", 3584, 28, 28, 4, 18944, 151_674),
    "InternVL3-14B": ("300M", "Qwen2", 5120, 48, 40, 8, 13824, 151_674),
    "InternVL2.5-38B, 3-38B": ("6B", "Qwen2", 5120, 64, 40, 8, 27648, 151_674),
    "InternVL2.5-78B, 3-78B": ("6B", "Qwen2", 8192, 80, 64, 8, 29568, 151_674),
    "InternVL3.5-1B": ("300M", "Qwen3", 1024, 28, 16, 8, 3072, 151_936),
    "InternVL3.5-2B": ("300M", "Qwen3", 2048, 28, 16, 8, 6144, 151_936),
    "InternVL3.5-4B": ("300M", "Qwen3", 2560, 36, 32, 8, 9728, 151_936),
    "InternVL3.5-8B": ("300M", "Qwen3", 4096, 36, 32, 8, 12288, 151_936),
    "InternVL3.5-14B": ("300M", "Qwen3", 5120, 40, 40, 8, 17408, 151_936),
    "InternVL3.5-38B": ("6B", "Qwen3", 5120, 64, 64, 8, 25600, 151_936),
    "InternVL3.5-20B-A4B": ("300M", "GptOss", 2880, 24, 64, 8, 2880, 201_088),
    "InternVL3.5-30B-A3B": ("300M", "Qwen3Moe", 2048, 48, 32, 4, 6144, 151_936),
    "InternVL3.5-241B-A28B": ("6B", "Qwen3Moe", 4096, 94, 64, 4, 12288, 151_936),
}
MOE = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
MORE = {  # further settings, by language model or by name
    "Phi3": {
        "rope_scaling": SU, "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096,
        "sliding_window": 262_144,
    },
    "Qwen3": {"head_dim": 128},
    "InternVL3.5-30B-A3B": {**MOE, "moe_intermediate_size": 768},
    "InternVL3.5-241B-A28B": {**MOE, "moe_intermediate_size": 1536},
    "InternVL3.5-20B-A4B": {"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4},
}  # fmt: skip
BILLIONS = {  # with the vocabulary head, cut or rounded; of 3.5 as tables of the models say, of 2 to 3 as remembered
    "InternVL2-1B, 2.5-1B, 3-1B": 0.94, "InternVL2-2B, 2.5-2B": 2.21, "InternVL2-4B": 4.15,
    "InternVL2-8B, 2.5-8B": 8.08, "InternVL2-26B, 2.5-26B": 25.51, "InternVL2-40B": 40.07,
    "InternVL2-Llama3-76B": 76.26, "InternVL2.5-4B": 3.71, "InternVL3-2B": 2.09, "InternVL3-8B": 7.94,
    "InternVL3-14B": 15.12, "InternVL2.5-38B, 3-38B": 38.39, "InternVL2.5-78B, 3-78B": 78.41,
    "InternVL3.5-1B": 1.06, "InternVL3.5-2B": 2.35, "InternVL3.5-4B": 4.73, "InternVL3.5-8B": 8.53,
    "InternVL3.5-14B": 15.12, "InternVL3.5-38B": 38.40, "InternVL3.5-20B-A4B": 21.23, "InternVL3.5-30B-A3B": 30.85,
    "InternVL3.5-241B-A28B": 240.70,
}  # fmt: skip


def published_config(name: str) -> dict:
    """config.json of a published original checkpoint."""
    tower, llm, hidden, layers, heads, kv_heads, mlp, vocab = PUBLISHED[name]
    config = original_config(llm, tower, vocab, force_image_size=448)
    config["vision_config"] |= {**TOWERS[tower], "image_size": 448}
    config["llm_config"] |= {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip
    config["llm_config"] |= {**MORE.get(llm, {}), **MORE.get(name, {})}
    return config
