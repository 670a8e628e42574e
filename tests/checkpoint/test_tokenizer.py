"""Tokenizers built from a folder's data files: the ids of the slow tokenizers, templates by name, no code run."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece

from mmrm_fast.checkpoint.tokenizer import IMAGE_TOKENS, load_tokenizer, template_names

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATES = {"InternLM2ForCausalLM": "internlm2-chat", "Qwen2ForCausalLM": "Hermes-2"}
SENTENCEPIECE = GOLDEN / "InternLM2ForCausalLM" / "checkpoint"
SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
PARTS = [
    "the red circle",
    " ",
    "  ",
    "\n",
    "\t",
    "图片中",
    "é",
    "é",
    "🐱",
    "<0x0A>",
    "▁",
    "12",
    ".",
    "a",
    "▁▁ a",
    "\u200b",
]


def texts(count):
    draw = random.Random(0)
    return ["".join(draw.choices(PARTS, k=draw.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_reference(name):
    tokenizer = load_tokenizer(GOLDEN / name / "checkpoint", template=TEMPLATES[name], original=True)
    records = [json.loads(line) for line in (GOLDEN / name / "records.jsonl").read_text().splitlines()]
    items = json.loads((GOLDEN / name / "expected.json").read_text())["items"]
    assert len(items) == 17
    for item in items:
        record = records[item["record"]]
        response = record["responses"][item["response"]]
        placeholder = "<img>" + "<IMG_CONTEXT>" * 4 * item["num_tiles"] + "</img>\n"
        messages = [("user", placeholder + record["prompt"]), ("assistant", response)]
        rendered = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages], tokenize=False)
        rendered = rendered if response else rendered.removesuffix("<|im_end|>")  # the reference ends nothing empty
        assert tokenizer.encode(rendered, add_special_tokens=False) == item["input_ids"]


def test_sentencepiece_ids_are_those_of_sentencepiece():
    slow = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE / "tokenizer.model"))
    fast = load_tokenizer(SENTENCEPIECE, template="internlm2-chat", original=True)
    for text in texts(3_000):
        assert fast.encode(text, add_special_tokens=False) == slow.encode(text), repr(text)


def test_runs_between_special_tokens_begin_anew():
    slow = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE / "tokenizer.model"))
    fast = load_tokenizer(SENTENCEPIECE, template="internlm2-chat", original=True)
    end = fast.convert_tokens_to_ids("<|im_end|>")
    assert end == slow.piece_to_id("[UNUSED_TOKEN_145]")
    expected = [*slow.encode("a circle"), end, *slow.encode("\n b")]
    assert fast.encode("a circle<|im_end|>\n b", add_special_tokens=False) == expected


@pytest.fixture
def phi3(tmp_path):
    """A folder with Phi-3's rules: no prefix space (`legacy` off), white space after special tokens swallowed."""
    shutil.copy(SENTENCEPIECE / "tokenizer.model", tmp_path)
    size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).get_piece_size()
    names = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    added = {size + i: {"content": name, "rstrip": i > 0, "special": True} for i, name in enumerate(names)}
    settings = {"added_tokens_decoder": added, "legacy": False, "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_phi3_has_no_prefix_space_and_swallows_white_space_after_special_tokens(phi3):
    tokenizer = load_tokenizer(phi3, template="phi3-chat", original=True)
    ids = tokenizer.encode("<|user|>\n the<|end|>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "t", "he", "<|end|>"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert rendered == f"<s><|system|>\n{SYSTEM}<|end|><|user|>\nQ<|end|>"


def test_missing_image_tokens_are_added_in_their_order(phi3):
    tokenizer = load_tokenizer(phi3, template="phi3-chat", original=True)
    ids = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    assert ids == list(range(len(tokenizer) - 9, len(tokenizer)))


def test_a_saved_tokenizer_loads_with_the_same_ids(tmp_path):
    tokenizer = load_tokenizer(SENTENCEPIECE, template="internlm2-chat", original=True)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.chat_template == tokenizer.chat_template and len(again) == len(tokenizer)
    for text in [*texts(200), "<|im_end|>\n b"]:
        assert again.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", [name for name in template_names() if name != "internvl_zh"])
def test_templates_take_a_system_prompt_and_several_turns(name):
    tokenizer = load_tokenizer(SENTENCEPIECE, template=name, original=True)
    turns = [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "Q2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    places = [rendered.index(word) for word in ("system", "S", "user", "Q", "assistant", "A", "Q2")]
    assert places == sorted(places) and "InternVL" not in rendered and rendered.startswith("<s><|")
    assert rendered.rstrip("\n|>").endswith("assistant")


def test_the_oldest_template_has_no_system_prompt():
    tokenizer = load_tokenizer(SENTENCEPIECE, template="internvl_zh", original=True)
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s> <human>: Q <bot>: A</s>"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "no tokenizer_config.json"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "no tokenizer.json, tokenizer.model or vocab.json"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"\x0a\xff"), "not a sentencepiece model"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(phi3, break_it, message):
    break_it(phi3)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(phi3, template="phi3-chat", original=True)


def test_an_unknown_template_is_named_with_those_there_are(phi3):
    with pytest.raises(ValueError, match="'vicuna' is not one of Hermes-2, internlm2-chat"):
        load_tokenizer(phi3, template="vicuna", original=True)
