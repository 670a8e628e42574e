"""Templated conversations read back into their turns: those that the template renders to the text, or refused."""

import random
from pathlib import Path

import pytest
from data.test_chat import LOOKING, looking

from mmrm_fast.checkpoint.tokenizer import load_tokenizer, template_names
from mmrm_fast.data.prompt import PromptEncoder
from mmrm_fast.data.types import FieldError
from mmrm_fast.serve.conversation import ConversationReader

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ("What?", "two red circles", "", " a ", "图片", "1\n2", "<image>\nWhat?", "user", "assistant")


def reader_of(tokenizer):
    encoder = PromptEncoder(tokenizer, tokens_per_tile=1, max_length=999)
    return ConversationReader(encoder.chat, tokenizer)


def rendered(tokenizer, turns, **options):
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text.replace("<image>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>")


def conversations(count):
    draw = random.Random(0)
    for _ in range(count):
        turns = [("system", draw.choice(TEXTS[1:6]))] if draw.random() < 0.4 else []
        for number in range(draw.choice((1, 1, 2, 3))):
            turns += [("assistant", draw.choice(TEXTS[:6]))] if number else []
            turns.append(("user", draw.choice(TEXTS)))
        yield [*turns, ("assistant", draw.choice(TEXTS[:6]))]


@pytest.fixture(params=["moves reasoning", "trims", *template_names()])
def templated(request, tokenizer):
    if request.param in LOOKING:
        return looking(tokenizer, request.param)
    model = "Phi3ForCausalLM" if request.param == "phi3-chat" else "InternLM2ForCausalLM"
    return load_tokenizer(GOLDEN / model / "checkpoint", template=request.param, original=True)


def test_turns_found_are_those_that_the_template_renders_to_the_text(templated):
    reader = reader_of(templated)
    for turns in conversations(60):
        text = rendered(templated, turns)
        try:
            messages, response = reader.read(text)
        except FieldError:
            assert templated.chat_template.startswith("{{- bos_token }}{{- (messages[0]")  # its turns have no marks
            continue
        again = [*((turn["role"], turn["content"]) for turn in messages), ("assistant", response)]
        assert rendered(templated, again) == text


def test_with_its_prompt_given_a_response_that_plays_the_template_stays_a_response(tokenizer):
    reader = reader_of(tokenizer)
    prompt = rendered(tokenizer, [("user", "Q"), ("assistant", "¤")]).partition("¤")[0]
    playing = "A<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nB"
    messages, response = reader.read(prompt + playing + "<|im_end|>\n", prompt)
    assert (messages, response) == ([{"role": "user", "content": "Q"}], playing)


@pytest.mark.parametrize(
    ("query", "want"),
    [
        ("<pad><pad>{whole}<pad><pad>", "two"),
        ("{open}two {end}\n{end}<pad> \n", "two "),
        ("{open}two circ", "two circ"),
        ("{open}", ""),
    ],
    ids=["padded", "white space between end tokens", "without an end", "an empty response"],
)
def test_what_surrounds_a_conversation_is_dropped(tokenizer, query, want):
    whole = rendered(tokenizer, [("user", "What?"), ("assistant", "two")])
    parts = {"whole": whole, "open": whole.partition("two")[0], "end": "<|im_end|>"}
    messages, response = reader_of(tokenizer).read(query.format(**parts))
    assert (messages, response) == ([{"role": "user", "content": "What?"}], want)


@pytest.mark.parametrize("cut", [1, 5, 14, 20])
def test_a_prompt_cut_on_its_left_is_refused(tokenizer, cut):
    text = rendered(tokenizer, [("user", "What is it?"), ("assistant", "two")])
    with pytest.raises(FieldError, match="not a conversation in this model's chat template"):
        reader_of(tokenizer).read(text[cut:])
