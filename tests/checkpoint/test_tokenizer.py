"""Tokenizers built from a folder's data files: the ids of the slow tokenizers, templates by name, no code run."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mmrm_fast.checkpoint.tokenizer import IMAGE_TOKENS, load_tokenizer, named_template, template_names
from mmrm_fast.data.prompt import PromptEncoder
from mmrm_fast.data.types import Message

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATES = {"InternLM2ForCausalLM": "internlm2-chat", "Qwen2ForCausalLM": "Hermes-2"}
PHI3 = GOLDEN / "Phi3ForCausalLM" / "checkpoint"
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


class SlowLlama:
    """The rule by which transformers 4's slow Llama tokenizer reads a text, over the sentencepiece library."""

    def __init__(self, folder):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        legacy = settings.get("legacy") in (None, True)
        model = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
        model.normalizer_spec.add_dummy_prefix = legacy
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.spaced = not legacy and settings.get("add_prefix_space") in (None, True)
        self.added = {fields["content"]: (int(id), fields) for id, fields in settings["added_tokens_decoder"].items()}
        names = [settings[role] for role in ("bos_token", "eos_token", "unk_token", "pad_token")]
        self.mapped = {self.id(token) for token in [*names, *settings["additional_special_tokens"]]}
        self.legacy = legacy

    def id(self, token):
        return self.added[token][0] if token in self.added else self.pieces.piece_to_id(token)

    def encode(self, text):
        """Ids of a text, without the bos token that goes before them."""
        if self.legacy or not text:
            return self.split(text)
        text = text.replace("▁", " ")
        ids = self.split("▁" + text if self.spaced else text)
        lone = self.spaced and len(ids) > 1 and ids[0] == self.pieces.piece_to_id("▁") and ids[1] in self.mapped
        return ids[1:] if lone else ids

    def split(self, text):
        """Ids of a text's runs and of the added tokens between them, some of which drop the white space beside them."""
        runs = re.split("(" + "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) + ")", text)
        for i in range(1, len(runs), 2):
            fields = self.added[runs[i]][1]
            runs[i + 1] = runs[i + 1].lstrip() if fields["rstrip"] else runs[i + 1]
            runs[i - 1] = runs[i - 1].rstrip() if fields["lstrip"] else runs[i - 1]
        return [id for i, run in enumerate(runs) for id in ([self.id(run)] if i % 2 else self.pieces.encode(run))]


VARIANTS = {  # settings, and those of the token that a conversation begins with
    "legacy": ({"legacy": True}, {}),
    "legacy absent": ({"legacy": None}, {}),
    "as Phi-3": ({}, {}),
    "no prefix space": ({"add_prefix_space": False}, {}),
    "the first token in the map": ({"additional_special_tokens": ["<|system|>"]}, {}),
    "the first token swallows to its left": ({}, {"lstrip": True}),
    "the first token swallows nothing": ({}, {"rstrip": False}),
}


@pytest.fixture
def phi3(tmp_path):
    """The folder of a Phi-3 with a slow tokenizer's files."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(PHI3 / name, tmp_path / name)
    return tmp_path


@pytest.fixture(params=VARIANTS)
def slow_llama(phi3, request):
    """The same with other settings."""
    changes, first = VARIANTS[request.param]
    settings = json.loads((phi3 / "tokenizer_config.json").read_text()) | changes
    settings["added_tokens_decoder"]["566"] |= first
    settings = {name: value for name, value in settings.items() if value is not None}
    (phi3 / "tokenizer_config.json").write_text(json.dumps(settings))
    return phi3


def conversations(count):
    draw = random.Random(1)
    for contents in zip(texts(count), texts(2 * count)[count:], strict=True):
        system = [("system", draw.choice(PARTS))] if draw.random() < 0.5 else []
        yield system, *contents


def test_conversations_have_the_ids_of_a_slow_llama_tokenizer(slow_llama):
    slow, body = SlowLlama(slow_llama), named_template("phi3-chat")
    tokenizer = load_tokenizer(slow_llama, template="phi3-chat", original=True)
    tokenizer.save_pretrained(slow_llama / "saved")
    saved = load_tokenizer(slow_llama / "saved")
    encoders = [PromptEncoder(each, tokens_per_tile=4, max_length=9_999) for each in (tokenizer, saved)]
    for system, question, answer in conversations(60):
        turns = [*system, ("user", question), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        rendered = tokenizer.apply_chat_template(messages, chat_template=body, tokenize=False)
        expected = [tokenizer.bos_token_id, *slow.encode(rendered)]
        prompt = tuple(Message(role, content) for role, content in turns[:-1])
        for encoder in encoders:
            assert encoder.encode(prompt, (answer,)).sequences[0].tolist() == expected, turns


@pytest.mark.parametrize("first", ["", "<|user|>", "<s>", " ", "a", "<|placeholder1|> a"])
def test_a_template_of_the_folder_begins_as_a_slow_llama_tokenizer_has_it(slow_llama, first):
    body = "{{ '" + first + "' }}{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    (slow_llama / "chat_template.jinja").write_text(body)
    encoder = PromptEncoder(load_tokenizer(slow_llama, original=True), tokens_per_tile=4, max_length=9_999)
    for text in texts(30):
        if text.strip(" \n\t▁"):
            (actual,) = encoder.encode(text, ("b",)).sequences
            assert actual.tolist() == SlowLlama(slow_llama).encode(f"{first}{text}<|end|>b<|end|>"), repr(text)


def test_missing_image_tokens_are_added_in_their_order(phi3):
    settings = json.loads((phi3 / "tokenizer_config.json").read_text())
    decoder = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"] = {id: decoder[id] for id in decoder if decoder[id]["content"] not in IMAGE_TOKENS}
    (phi3 / "tokenizer_config.json").write_text(json.dumps(settings))
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


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "one setting", "several settings"])
def test_the_folder_s_chat_template_is_found_wherever_it_stands(phi3, place):
    settings, template = json.loads((phi3 / "tokenizer_config.json").read_text()), "{{ messages[0]['content'] }}<|end|>"
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    if place == "chat_template.jinja":
        (phi3 / place).write_text(template)
    elif place == "chat_template.json":
        (phi3 / place).write_text(json.dumps({"chat_template": template}))
    else:
        settings["chat_template"] = template if place == "one setting" else several
    (phi3 / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(phi3).chat_template.endswith(template)


def test_several_chat_templates_without_a_default_are_refused(phi3):
    settings = json.loads((phi3 / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "rag", "template": "x"}]
    (phi3 / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the chat templates rag, none of them 'default'"):
        load_tokenizer(phi3)
