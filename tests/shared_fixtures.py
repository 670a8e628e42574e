"""Shared pieces: a small random InternVL, a tokenizer trained on the spot, pictures and records."""

import copy
import gc
import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import mixed_records
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    InternVLConfig,
    InternVLModel,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
)

from mmrm_fast.checkpoint.folder import Checkpoint, save_checkpoint
from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import with_options
from mmrm_fast.data.images import NORMALIZATION, Tiling
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.score.scorer import Scorer

TOKENS_PER_TILE = 4
WINDOW = 20  # shorter than the sequences
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
CORPUS = ["What is in the picture? There are two red circles on the left.", "user assistant system\n", "I think so."]


gc.set_threshold(20_000, 20, 20)  # of a million objects; as Python has it, collecting them takes a tenth of all time


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with ChatML, as native InternVL checkpoints have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS * 20, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    wrapped.chat_template = CHATML
    return wrapped


MORE = {  # settings of a text model besides those that all have
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": WINDOW},
    "qwen2 with windows": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
}


def tiny_backbone(vocab_size: int, image_token_id: int, *, text: str = "qwen2", dtype=torch.float32) -> InternVLModel:
    """A random InternVL of two layers each: 56-pixel tiles of 4 tokens, grouped key/value heads."""
    text_config = AutoConfig.for_model(
        text.partition(" ")[0], vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=4096, pad_token_id=None,
        **MORE.get(text, {}),
    )  # fmt: skip
    vision_config = InternVLVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=56, patch_size=14,
        attention_bias=True,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=image_token_id,
        image_seq_length=TOKENS_PER_TILE,
    )  # fmt: skip
    torch.manual_seed(0)
    model = InternVLModel(config)
    for name, parameter in model.named_parameters():  # large enough that attention is not uniform
        if parameter.ndim > 1 or name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else parameter.shape[-1] ** -0.5)
    return exact(model.double()) if dtype == torch.float64 else model.to(dtype)


class ExactRMSNorm(torch.nn.Module):
    """RMSNorm in its input's dtype: transformers' own computes in fp32, which would hide errors below 1e-7."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


class ExactRouter(torch.nn.Module):
    """Qwen3's router in its input's dtype, whose shares transformers rounds to fp32."""

    def __init__(self, router: torch.nn.Module):
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, x):
        logits = x @ self.weight.T
        shares, chosen = logits.softmax(-1).topk(self.top_k)
        return logits, shares / shares.sum(-1, keepdim=True), chosen


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 model without what transformers rounds."""
    getattr(model, "language_model", model).set_experts_implementation("eager")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactRMSNorm(child))
            elif type(child).__name__ == "Qwen3MoeTopKRouter":
                setattr(parent, name, ExactRouter(child))
    return model


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer):
    """Build a `Checkpoint` of a tiny random reward model."""

    def make(*, text="qwen2", dtype=torch.float32, max_length=512, max_tiles=6) -> Checkpoint:
        backbone = tiny_backbone(
            len(tokenizer), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), text=text, dtype=dtype
        )
        return Checkpoint(
            model=RewardModel(backbone, *NORMALIZATION["imagenet"]),
            tokenizer=tokenizer,
            tiling=Tiling(56, 1, max_tiles),
            tokens_per_tile=TOKENS_PER_TILE,
            max_length=max_length,
        )

    return make


@pytest.fixture(scope="session")
def pristine():
    """transformers' own model, of its own modules alone, with the weights of one that was prepared for packing."""

    def copied(model: InternVLModel) -> InternVLModel:
        config = copy.deepcopy(model.config)
        for part in (config, config.text_config, config.vision_config):
            part._attn_implementation = "sdpa"  # eager rounds its softmax to fp32
        if config.text_config.model_type == "gpt_oss":
            config.text_config._attn_implementation = "eager"  # it has no other, and this one rounds nothing
        twin = InternVLModel(config).to(model.dtype)
        if model.vision_tower is None:
            twin.vision_tower = twin.multi_modal_projector = None
        twin.load_state_dict(model.state_dict())
        return exact(twin) if model.dtype == torch.float64 else twin

    return copied


@pytest.fixture
def pictures(tmp_path):
    """Paths of five pictures of different sizes: 1, 3, 7, 5 and 2 tiles with the thumbnail."""
    rng = np.random.default_rng(0)
    paths = {}
    for name, size in {"square": (60, 60), "wide": (120, 60), "photo": (180, 120), "tall": (60, 240)}.items():
        path = tmp_path / f"{name}.png"
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
        paths[name] = str(path)
    return paths


@pytest.fixture
def write_jsonl(tmp_path):
    """Write records (or raw lines) to a JSONL file and return its path."""

    def write(records, name="records.jsonl"):
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def model_folder(make_checkpoint, tmp_path):
    save_checkpoint(tmp_path / "model", make_checkpoint(max_length=256))
    return tmp_path / "model"


@pytest.fixture
def make_config(model_folder, pictures, write_jsonl, tmp_path):
    """A TrainConfig on small mixed data, in a run folder of its own."""
    data = write_jsonl(mixed_records(pictures), "train.jsonl")
    evaluation = write_jsonl(mixed_records(pictures)[:3], "eval.jsonl")

    def make(name, **options):
        defaults = {
            "data": (str(data),),
            "eval": (f"small={evaluation}", f"one={write_jsonl(mixed_records(pictures)[1:2], 'one.jsonl')}"),
            "model": model_folder,
            "output_dir": tmp_path / name,
            "lr": 1e-3,
            "tokens_per_batch": 400,
            "tokens_per_micro_batch": 200,
        }
        return with_options(TrainConfig(), **{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def scorer(make_checkpoint, tmp_path_factory):
    """A scorer of a saved checkpoint."""
    folder = tmp_path_factory.mktemp("scorer")
    save_checkpoint(folder, make_checkpoint())
    return Scorer.from_pretrained(folder, "cpu")
