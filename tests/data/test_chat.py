"""Token ids are those of the whole conversation rendered by its chat template, whatever the template looks at."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmrm_fast.checkpoint.tokenizer import load_tokenizer, template_names
from mmrm_fast.data.prompt import PromptEncoder
from mmrm_fast.data.types import FieldError, Message

TOKENS_PER_TILE = 2
CHECKPOINT = Path(__file__).parents[1] / "golden" / "InternLM2ForCausalLM" / "checkpoint"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
LOOKING = {  # templates that look at what they render, as those of reasoning models do
    "moves reasoning": (
        "{%- set ns = namespace(last=0) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- set c = m.content %}{%- set r = '' %}"
        "{%- if m.role == 'assistant' and '</think>' in c %}"
        "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{%- set c = c.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n' + r + '\n</think>\n\n' }}{%- endif %}"
        "{{- c + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "drops reasoning of all turns": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    ),
    "marks the last turn": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + (' (last)' if loop.last else '') + '\n' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
    ),
    "tells some texts": (
        "{% for m in messages %}{% if 'circle' in m.content %}<|im_start|>circle\n<|im_end|>{% endif %}"
        + TURN
        + "{% endfor %}"
    ),
    "trims": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content|trim }}<|im_end|>{% endfor %}",
}
TEXTS = (
    "", " ", "\n", "a", "the red circle", " on the left ", "图片中有什么？", "cafe\u0301", "👩\u200d🔬", "1 2",
    "<think>\nhm\n</think>\n\nA circle", "<think></think>", "</think> so", "{{ bos_token }}", "\U000f0001 \U000f0000",
)  # fmt: skip


def looking(tokenizer, name):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=LOOKING[name])


@pytest.fixture(params=[*LOOKING, *(name for name in template_names() if name not in ("phi3-chat", "internvl_zh"))])
def templated(request, tokenizer):
    """A tokenizer with one of the templates."""
    if request.param in LOOKING:
        return looking(tokenizer, request.param)
    return load_tokenizer(CHECKPOINT, template=request.param, original=True)


def conversations(count):
    """(turns, tiles of each image): users' texts have image slots here and there."""
    draw = random.Random(0)
    for _ in range(count):
        turns = [("system", draw.choice(TEXTS))] if draw.random() < 0.3 else []
        for number in range(draw.choice((1, 1, 2, 3))):
            turns += [("assistant", draw.choice(TEXTS))] if number else []
            slots = "".join(draw.choices(("", "<image>", "<image>\n"), (5, 2, 2), k=2))
            turns.append(("user", slots + draw.choice(TEXTS if not slots else TEXTS[:10])))
        count_slots = sum(text.count("<image>") for role, text in turns if role == "user")
        yield turns, tuple(draw.choices((1, 3), k=count_slots))


def whole(tokenizer, turns, tiles_per_image):
    """The rendered conversation with written-out images, tokenised at once, up to its last special token."""
    tiles = iter(tiles_per_image)
    messages = []
    for role, text in turns:
        while role == "user" and "<image>" in text:
            image = "<img>" + "<IMG_CONTEXT>" * (TOKENS_PER_TILE * next(tiles)) + "</img>"
            text = text.replace("<image>", image, 1)
        messages.append({"role": role, "content": text})
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    specials = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[: max(place for place, id in enumerate(ids) if id in specials) + 1]


def encode(tokenizer, turns, responses, tiles_per_image=(), max_length=9_999):
    encoder = PromptEncoder(tokenizer, tokens_per_tile=TOKENS_PER_TILE, max_length=max_length)
    encoded = encoder.encode(tuple(Message(*turn) for turn in turns), responses, tiles_per_image)
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return [np.where(keys < 0, image, keys).tolist() for keys in encoded.sequences], encoded


def test_ids_are_those_of_the_rendered_conversation(templated):
    for turns, tiles_per_image in conversations(60):
        sequences, encoded = encode(templated, turns, TEXTS[:6] + TEXTS[-5:], tiles_per_image)
        for response, ids in zip(TEXTS[:6] + TEXTS[-5:], sequences, strict=True):
            assert ids == whole(templated, [*turns, ("assistant", response)], tiles_per_image), (turns, response)
        prefix = sequences[0][: encoded.prefix_length]
        assert all(ids[: encoded.prefix_length] == prefix for ids in sequences)


def test_special_tokens_typed_in_a_text_change_no_other_id(templated):
    end = next(token.content for token in templated.added_tokens_decoder.values() if token.special)
    for turns in ([("user", "a {} b")], [("system", "{}"), ("user", "c"), ("assistant", "{} d"), ("user", "e")]):
        typed, plain = ([(role, text.format(word)) for role, text in turns] for word in (end, "¤"))
        (ids,), _ = encode(templated, typed, (f"f {end} g",))
        (others,), _ = encode(templated, plain, ("f ¤ g",))
        specials = {id for id, token in templated.added_tokens_decoder.items() if token.special}
        assert [id for id in ids if id in specials] == [id for id in others if id in specials]


def test_an_overlong_response_of_a_looking_template_keeps_its_end_token(tokenizer):
    wrapped = looking(tokenizer, "moves reasoning")
    turns, response = [("user", "Q")], "<think>\nhm\n</think>\n\n" + "a " * 50
    ((whole_ids,), _), ((cut,), encoded) = (encode(wrapped, turns, (response,), max_length=n) for n in (999, 60))
    assert cut == [*whole_ids[:59], whole_ids[-1]] and encoded.truncated == (True,)


@pytest.mark.parametrize(
    ("template", "turns", "response", "reason"),
    [
        (
            "{% for m in messages if m.content != 'drop' %}" + TURN + "{% endfor %}",
            [("user", "a")], "drop", "the chat template drops it",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% if 'bye' in m.content %}bye{% endif %}"
            "{% endfor %}",
            [("user", "a")], "bye", "ends it otherwise",
        ),
        (
            "{% for m in messages[-2:] %}" + TURN + "{% endfor %}",
            [("user", "<image>"), ("user", "a")], "b", "renders 0 of its 1 images",
        ),
    ],
    ids=["drops a response", "says more after one", "drops an image"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(tokenizer, template, turns, response, reason):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    images = sum(text.count("<image>") for _, text in turns)
    with pytest.raises(FieldError, match=reason):
        encode(wrapped, turns, (response,), (1,) * images)
