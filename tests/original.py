"""The original `internvl_chat` architectures written out in plain torch, and random tiny checkpoints of them.

Written from the published descriptions, one sequence at a time, over the original weight names; it shares nothing with
the package. Shapes: T tokens, H heads, E head size, D hidden size.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear, silu

GOLDEN = Path(__file__).parent / "golden"
HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 32, 4, 2, 48, 2
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

VISION = {
    "300M": {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False},
    "6B": {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True},
}
SU = {
    "type": "su",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.5, 2.5, 4.0, 8.0],
}
LLM = {
    "InternLM2": {"architectures": ["InternLM2ForCausalLM"], "bias": False},
    "InternLM2 with biases": {"architectures": ["InternLM2ForCausalLM"], "bias": True},
    "InternLM2 dynamic": {
        "architectures": ["InternLM2ForCausalLM"], "bias": False, "max_position_embeddings": 200,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "Phi3": {"architectures": ["Phi3ForCausalLM"]},
    "Phi3 su": {
        "architectures": ["Phi3ForCausalLM"], "rope_scaling": SU, "original_max_position_embeddings": 200,
        "max_position_embeddings": 3200,
    },
    "Phi3 yarn": {
        "architectures": ["Phi3ForCausalLM"], "rope_scaling": {**SU, "type": "yarn"},
        "original_max_position_embeddings": 200, "max_position_embeddings": 3200,
    },
    "Llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0},
    "Qwen2": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0},
    "Qwen3": {"architectures": ["Qwen3ForCausalLM"], "rope_theta": 1000000.0, "head_dim": 12},
    "Qwen3Moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "rope_theta": 1000000.0, "head_dim": 12, "num_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "GptOss": {
        "architectures": ["GptOssForCausalLM"], "rope_theta": 150000.0, "head_dim": 12, "num_local_experts": 8,
        "num_experts_per_tok": 3, "sliding_window": 128, "swiglu_limit": 7.0, "attention_bias": True,
        "max_position_embeddings": 131_072,
        "rope_scaling": {
            "type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
TEMPLATE = {"InternLM2": "internlm2-chat", "Phi3": "phi3-chat"}


def original_config(llm: str, vision: str, vocab_size: int, **changes) -> dict:
    """config.json of a tiny checkpoint."""
    llm_config = {
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": vocab_size,
        "intermediate_size": MLP, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
        **LLM[llm],
    }  # fmt: skip
    vision_config = {
        "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 3, "image_size": 56,
        "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "model_type": "intern_vit_6b", **VISION[vision],
    }  # fmt: skip
    return {
        "model_type": "internvl_chat", "architectures": ["InternVLRewardModel"],
        "template": TEMPLATE.get(llm.split()[0], "Hermes-2"), "downsample_ratio": 0.5,
        "dynamic_image_size": True, "force_image_size": 56, "max_dynamic_patch": 6,
        "min_dynamic_patch": 1, "use_thumbnail": True, "ps_version": "v2", "select_layer": -1,
        "llm_config": llm_config, "vision_config": vision_config, **changes,
    }  # fmt: skip


def write_checkpoint(folder: Path, config: dict, *, drop: tuple[str, ...] = (), extra: dict | None = None) -> dict:
    """Write a random checkpoint with its tokenizer; returns its tensors."""
    write_tokenizer(folder, config)
    state = {name: value for name, value in random_state(config).items() if name not in drop} | (extra or {})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return state


def write_tokenizer(folder: Path, config: dict) -> None:
    """A published tokenizer's file layout for the LLM's kind."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = config["llm_config"]["architectures"][0].removesuffix("ForCausalLM")
    source = GOLDEN / ("Qwen2ForCausalLM" if kind.startswith("Qwen") else "InternLM2ForCausalLM") / "checkpoint"
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copy(path, folder)
    if kind == "Phi3":
        names = {560: "<|endoftext|>", 561: "<|assistant|>", 562: "<|system|>", 563: "<|end|>", 564: "<|user|>"}
        added = {id: {"content": name, "rstrip": id > 560, "special": True} for id, name in names.items()}
        settings = {"added_tokens_decoder": added, "legacy": False, "bos_token": "<s>", "model_max_length": 4096}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "added_tokens.json").unlink()


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint."""
    llm, vision = config["llm_config"], config["vision_config"]
    kind = llm["architectures"][0].removesuffix("ForCausalLM")
    width, fold = vision["hidden_size"], int(1 / config["downsample_ratio"]) ** 2
    all_shapes = {
        "mlp1.0.weight": (fold * width,), "mlp1.0.bias": (fold * width,),
        "mlp1.1.weight": (llm["hidden_size"], fold * width), "mlp1.1.bias": (llm["hidden_size"],),
        "mlp1.3.weight": (llm["hidden_size"], llm["hidden_size"]), "mlp1.3.bias": (llm["hidden_size"],),
        "score.weight": (1, llm["hidden_size"]),
    }  # fmt: skip
    all_shapes |= {f"vision_model.{name}": shape for name, shape in vision_shapes(vision).items()}
    llm_shapes = internlm2_shapes if kind == "InternLM2" else llama_shapes
    return all_shapes | {f"language_model.{name}": shape for name, shape in llm_shapes(llm).items()}


def head_size(llm: dict) -> int:
    return llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"]


def vision_shapes(vision: dict) -> dict[str, tuple[int, ...]]:
    width, mlp, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    found = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding": (1, (vision["image_size"] // patch) ** 2 + 1, width),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        found |= {layer + name: (width,) for name in ("ls1", "ls2", "norm1.weight", "norm2.weight")}
        if vision["norm_type"] == "layer_norm":
            found |= {layer + name: (width,) for name in ("norm1.bias", "norm2.bias")}
        if vision["qk_normalization"]:
            found |= {layer + name: (width,) for name in ("attn.q_norm.weight", "attn.k_norm.weight")}
        if vision["qkv_bias"]:
            found[layer + "attn.qkv.bias"] = (3 * width,)
        linears = {"attn.proj": (width, width), "mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
        for name, shape in linears.items():
            found |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        found[layer + "attn.qkv.weight"] = (3 * width, width)
    return found


def internlm2_shapes(llm: dict) -> dict[str, tuple[int, ...]]:
    hidden, mlp, table = llm["hidden_size"], llm["intermediate_size"], (llm["vocab_size"], llm["hidden_size"])
    size = hidden // llm["num_attention_heads"]
    packed = (llm["num_attention_heads"] + 2 * llm["num_key_value_heads"]) * size
    found = {"model.tok_embeddings.weight": table, "output.weight": table, "model.norm.weight": (hidden,)}
    for i in range(llm["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found |= {
            layer + "attention.wqkv.weight": (packed, hidden), layer + "attention.wo.weight": (hidden, hidden),
            layer + "feed_forward.w1.weight": (mlp, hidden), layer + "feed_forward.w3.weight": (mlp, hidden),
            layer + "feed_forward.w2.weight": (hidden, mlp),
            layer + "attention_norm.weight": (hidden,), layer + "ffn_norm.weight": (hidden,),
        }  # fmt: skip
        if llm["bias"]:
            found |= {layer + "attention.wqkv.bias": (packed,), layer + "attention.wo.bias": (hidden,)}
    return found


def llama_shapes(llm: dict) -> dict[str, tuple[int, ...]]:
    """Of every architecture whose names are Llama's."""
    hidden, mlp, table = llm["hidden_size"], llm["intermediate_size"], (llm["vocab_size"], llm["hidden_size"])
    kind, size = llm["architectures"][0].removesuffix("ForCausalLM"), head_size(llm)
    heads, small = (llm[f"num_{name}_heads"] * size for name in ("attention", "key_value"))
    found = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (hidden,)}
    for i in range(llm["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found |= {layer + name + ".weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        found[layer + "self_attn.o_proj.weight"] = (hidden, heads)
        if kind == "Phi3":
            found |= {
                layer + "self_attn.qkv_proj.weight": (heads + 2 * small, hidden),
                layer + "mlp.gate_up_proj.weight": (2 * mlp, hidden), layer + "mlp.down_proj.weight": (hidden, mlp),
            }  # fmt: skip
            continue
        for name, rows in (("q_proj", heads), ("k_proj", small), ("v_proj", small)):
            found[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
            if kind in ("Qwen2", "GptOss"):
                found[f"{layer}self_attn.{name}.bias"] = (rows,)
        if kind in ("Qwen3", "Qwen3Moe"):
            found |= {f"{layer}self_attn.{name}.weight": (size,) for name in ("q_norm", "k_norm")}
        if kind == "GptOss":
            found |= {layer + name: shape for name, shape in gpt_oss_shapes(llm).items()}
        elif kind == "Qwen3Moe":
            found[layer + "mlp.gate.weight"] = (llm["num_experts"], hidden)
            for expert in range(llm["num_experts"]):
                found |= gated_shapes(f"{layer}mlp.experts.{expert}.", hidden, llm["moe_intermediate_size"])
        else:
            found |= gated_shapes(layer + "mlp.", hidden, mlp)
    return found


def gated_shapes(prefix: str, hidden: int, mlp: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
    return {f"{prefix}{name}_proj.weight": shape for name, shape in shapes.items()}


def gpt_oss_shapes(llm: dict) -> dict[str, tuple[int, ...]]:
    """Of a layer of GPT-OSS, what is not Llama's: sinks, a bias wherever there is a weight, experts in one."""
    hidden, mlp, experts = llm["hidden_size"], llm["intermediate_size"], llm["num_local_experts"]
    return {
        "self_attn.sinks": (llm["num_attention_heads"],), "self_attn.o_proj.bias": (hidden,),
        "mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,),
        "mlp.experts.gate_up_proj": (experts, hidden, 2 * mlp), "mlp.experts.gate_up_proj_bias": (experts, 2 * mlp),
        "mlp.experts.down_proj": (experts, mlp, hidden), "mlp.experts.down_proj_bias": (experts, hidden),
    }  # fmt: skip


def random_state(config: dict) -> dict[str, torch.Tensor]:
    """Random weights large enough that everything matters."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name or name.startswith("mlp1.0") or ".ls" in name:
            value = (0.0 if name.endswith("bias") else 1.0) + 0.2 * value
        elif len(shape) > 1 and "embed" not in name:
            fan_in = shape[1] if "experts" in name and len(shape) == 3 else math.prod(shape[1:])
            value = value / math.sqrt(fan_in) * (4.0 if name == "score.weight" else 1.5)
        state[name] = value.to(torch.bfloat16)
    return state


# the forward pass


def rms_norm(x, weight, epsilon):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))


class Weights:
    """fp32 weights under a prefix."""

    def __init__(self, state, prefix=""):
        self.state, self.prefix = state, prefix

    def __getitem__(self, name):
        return self.state[self.prefix + name].float()

    def under(self, prefix):
        return Weights(self.state, self.prefix + prefix)

    def linear(self, x, name):
        bias = self.state.get(f"{self.prefix}{name}.bias")
        return linear(x, self[name + ".weight"], None if bias is None else bias.float())


def image_features(state, config, pixels):
    """[I, 3, S, S] -> [I * tokens, D]."""
    weights, vision = Weights(state, "vision_model."), config["vision_config"]
    x = conv2d(pixels, weights["embeddings.patch_embedding.weight"], weights["embeddings.patch_embedding.bias"], 14)
    side, positions = x.shape[-1], weights["embeddings.position_embedding"]
    x = torch.cat([weights["embeddings.class_embedding"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    trained = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    grid = interpolate(grid, (side, side), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    states = [x + torch.cat([positions[:, :1], grid], 1)]
    for i in range(vision["num_hidden_layers"]):
        states.append(vision_layer(states[-1], weights.under(f"encoder.layers.{i}."), vision))
    x = states[config["select_layer"]][:, 1:].unflatten(1, (side, side))
    fold = int(1 / config["downsample_ratio"])
    x = x.unflatten(1, (-1, fold)).unflatten(3, (-1, fold)).permute(0, 1, 3, 2, 4, 5)  # [I, Y, X, y, x, C]
    x = (x.transpose(1, 2) if config["ps_version"] == "v1" else x).flatten(3).flatten(0, 2)
    weights = Weights(state, "mlp1.")
    x = layer_norm(x, x.shape[-1:], weights["0.weight"], weights["0.bias"])
    return weights.linear(gelu(weights.linear(x, "1")), "3")


def vision_layer(x, weights, vision):
    def norm(x, name):
        if vision["norm_type"] == "rms_norm":
            return rms_norm(x, weights[name + ".weight"], vision["layer_norm_eps"])
        return layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], vision["layer_norm_eps"])

    q, k, v = weights.linear(norm(x, "norm1"), "attn.qkv").chunk(3, -1)
    if vision["qk_normalization"]:
        q = rms_norm(q, weights["attn.q_norm.weight"], vision["layer_norm_eps"])
        k = rms_norm(k, weights["attn.k_norm.weight"], vision["layer_norm_eps"])
    q, k, v = (part.unflatten(-1, (vision["num_attention_heads"], -1)).transpose(1, 2) for part in (q, k, v))
    attended = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    x = x + weights.linear(attended.transpose(1, 2).flatten(2), "attn.proj") * weights["ls1"]
    return x + weights.linear(gelu(weights.linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2") * weights["ls2"]


def rotary(llm, length):
    """cos, sin [T, E] of one sequence of its own length."""
    size = head_size(llm)
    base, scaling, factor = llm["rope_theta"], llm.get("rope_scaling") or {}, 1.0
    exponents, stretch = torch.arange(0, size, 2) / size, torch.ones(size // 2)
    longest = llm["max_position_embeddings"]
    if scaling.get("type") == "dynamic" and length > longest:
        base *= (scaling["factor"] * length / longest - scaling["factor"] + 1) ** (size / (size - 2))
    if "beta_fast" in scaling:
        stretch, factor = yarn_stretch(scaling, base, size), 0.1 * math.log(scaling["factor"]) + 1
    elif scaling.get("type") in ("su", "yarn"):
        trained = llm["original_max_position_embeddings"]
        stretch = torch.tensor(scaling["long_factor" if length > trained else "short_factor"])
        ratio = math.log(longest / trained)
        factor = math.sqrt(1 + ratio / math.log(trained)) if scaling["type"] == "su" else 0.1 * ratio + 1
    angles = torch.arange(length)[:, None].float() * (1 / (stretch * base**exponents))  # rounded as the original does
    angles = torch.cat([angles, angles], -1)
    return angles.cos() * factor, angles.sin() * factor


def yarn_stretch(scaling, base, size):
    """YaRN: what turns often over the trained length stays, what turns seldom is stretched, a ramp between them."""
    low, high = (
        size * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    )
    ramp = ((torch.arange(size // 2) - max(low, 0)) / (min(high, size - 1) - max(low, 0))).clamp(0, 1)
    return 1 / (ramp / scaling["factor"] + 1 - ramp)


def rotated(x_HTE, cos, sin):
    first, second = x_HTE.chunk(2, -1)
    return x_HTE * cos + torch.cat([-second, first], -1) * sin


def projections(x, weights, llm):
    """q [H, T, E], k and v [G, T, E] before RoPE."""
    heads, kv = llm["num_attention_heads"], llm["num_key_value_heads"]
    size, kind = head_size(llm), llm["architectures"][0]
    if kind == "InternLM2ForCausalLM":
        packed = weights.linear(x, "attention.wqkv").reshape(len(x), kv, heads // kv + 2, size)
        q, k, v = packed[:, :, :-2].flatten(1, 2), packed[:, :, -2], packed[:, :, -1]
    elif kind == "Phi3ForCausalLM":
        packed = weights.linear(x, "self_attn.qkv_proj").unflatten(-1, (-1, size))
        q, k, v = packed.split([heads, kv, kv], 1)
    else:
        q, k, v = (weights.linear(x, f"self_attn.{name}_proj").unflatten(-1, (-1, size)) for name in "qkv")
    if kind.startswith("Qwen3"):
        q = rms_norm(q, weights["self_attn.q_norm.weight"], llm["rms_norm_eps"])
        k = rms_norm(k, weights["self_attn.k_norm.weight"], llm["rms_norm_eps"])
    return (part.transpose(0, 1) for part in (q, k, v))


def mixture(x, weights, llm):
    """Each token [D] through the experts that its router likes most, by the renormalised probabilities."""
    probabilities = weights.linear(x, "gate").softmax(-1)
    rows = []
    for token, shares in zip(x, probabilities, strict=True):
        shares, chosen = shares.topk(llm["num_experts_per_tok"])
        outputs = [gated(token, weights.under(f"experts.{expert}.")) for expert in chosen]
        rows.append(torch.stack(outputs, 1) @ (shares / shares.sum()))
    return torch.stack(rows)


def gated(x, weights):
    return weights.linear(silu(weights.linear(x, "gate_proj")) * weights.linear(x, "up_proj"), "down_proj")


def clamped_mixture(x, weights, llm):
    """GPT-OSS: each token through the experts of the largest logits, gates and ups in turns, bounded."""
    values, chosen = weights.linear(x, "router").topk(llm["num_experts_per_tok"])
    gate_ups, gate_up_biases, downs, down_biases = (
        weights["experts." + name] for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    )
    rows, limit = [], llm["swiglu_limit"]
    for token, shares, experts in zip(x, values.softmax(-1), chosen, strict=True):
        row = torch.zeros_like(token)
        for share, e in zip(shares, experts, strict=True):
            gate, up = (token @ gate_ups[e] + gate_up_biases[e]).unflatten(-1, (-1, 2)).unbind(-1)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            row += share * (((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ downs[e] + down_biases[e])
        rows.append(row)
    return torch.stack(rows)


def attention_shares(scores, weights, llm, number):
    """Softmax of scores [H, T, T]; GPT-OSS has a sink, a logit without a value, and a window in every other layer."""
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    if llm["architectures"][0] != "GptOssForCausalLM":
        return scores.masked_fill(future, float("-inf")).softmax(-1)
    if number % 2 == 0:
        future |= torch.ones_like(future).tril(-llm["sliding_window"])
    sinks = weights["self_attn.sinks"][:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores.masked_fill(future, float("-inf")), sinks], -1).softmax(-1)[..., :-1]


def decoder_layer(x, weights, llm, cos, sin, number):
    names = {"InternLM2ForCausalLM": ("attention_norm", "attention.wo", "ffn_norm")}
    before, out, after = names.get(
        llm["architectures"][0], ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm")
    )
    q, k, v = projections(rms_norm(x, weights[before + ".weight"], llm["rms_norm_eps"]), weights, llm)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    attended = attention_shares(scores, weights, llm, number) @ v
    x = x + weights.linear(attended.transpose(0, 1).flatten(1), out)
    y = rms_norm(x, weights[after + ".weight"], llm["rms_norm_eps"])
    if llm["architectures"][0] == "InternLM2ForCausalLM":
        gate, up, down = weights.linear(y, "feed_forward.w1"), weights.linear(y, "feed_forward.w3"), "feed_forward.w2"
    elif llm["architectures"][0] == "Phi3ForCausalLM":
        (gate, up), down = weights.linear(y, "mlp.gate_up_proj").chunk(2, -1), "mlp.down_proj"
    elif llm["architectures"][0] == "Qwen3MoeForCausalLM":
        return x + mixture(y, weights.under("mlp."), llm)
    elif llm["architectures"][0] == "GptOssForCausalLM":
        return x + clamped_mixture(y, weights.under("mlp."), llm)
    else:
        return x + gated(y, weights.under("mlp."))
    return x + weights.linear(silu(gate) * up, down)


@torch.no_grad()
def reward(state, config, keys, tiles) -> float:
    """The reward of one sequence: token ids, -1 - row for the rows of its uint8 tiles [I, S, S, 3]."""
    llm, weights = config["llm_config"], Weights(state, "language_model.model.")
    is_internlm2 = llm["architectures"][0] == "InternLM2ForCausalLM"
    table = weights["tok_embeddings.weight" if is_internlm2 else "embed_tokens.weight"]
    keys = torch.as_tensor(keys)
    x = table[keys.clamp(min=0)]
    if len(tiles):
        pixels = ((torch.as_tensor(tiles).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)
        x[keys < 0] = image_features(state, config, pixels)[-1 - keys[keys < 0]]
    cos, sin = rotary(llm, len(x))
    for i in range(llm["num_hidden_layers"]):
        x = decoder_layer(x, weights.under(f"layers.{i}."), llm, cos, sin, i)
    hidden = rms_norm(x[-1], weights["norm.weight"], llm["rms_norm_eps"])
    return float(hidden @ state["score.weight"].float()[0])
