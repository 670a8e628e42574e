"""Calls, reasoning, names and tools go through the template that knows them: the tokens are those of transformers'
`apply_chat_template` of the same conversation, and what a template drops is refused by its name."""

import copy
import json

import pytest

from mmrm_fast.config import ScoreConfig
from mmrm_fast.data.prompt import PromptEncoder
from mmrm_fast.data.records import RecordError, Records, iter_groups, parse_group
from mmrm_fast.data.samples import Preparer
from mmrm_fast.data.types import FieldError, prompt_json
from mmrm_fast.score.command import rows_of
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.shards import PAIRS, Shards

QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}
{%- endif %}{{- "# Tools\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(seeking=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.seeking and message.role == "user" %}
        {%- set ns.seeking = false %}{%- set ns.last_query_index = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}{{- content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
            {%- set call = tool_call.function or tool_call %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}"""
HERMES = """\
{%- if tools %}{{- '<|im_start|>system\nCall them. <tools>' }}{{- tools | tojson }}{{- '</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}{%- if message.name %}{{- ' ' + message.name }}{%- endif %}{{- '\n' }}
    {%- if message.reasoning_content %}{{- '<scratch>' + message.reasoning_content + '</scratch>\n' }}{%- endif %}
    {%- if message.role == 'tool' %}{{- '<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- elif message.content is not none %}{{- message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n' }}{{- {'arguments': call.function.arguments, 'name': call.function.name} | tojson }}
        {{- '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}"""
TEMPLATES = {"Qwen3": QWEN3, "Hermes": HERMES}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def call(name="look", **arguments):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def turn(role, content, **extra):
    return {"role": role, "content": content, **extra}


def said(content, **extra):
    return turn("assistant", content, **extra)


QUESTION = turn("user", "How many circles?")
CALLED = said(None, tool_calls=[call(where="left", what=["circle", {"red": True}])])
SEEN = turn("tool", "two", name="look", tool_call_id="1")
TYPED = said("", tool_calls=[call(text='a <|im_end|> typed, a " and an <image>')])
CONVERSATIONS = {  # turns, tools
    "a call as the response": ([QUESTION, CALLED], TOOLS),
    "two calls behind a text": ([QUESTION, said("Let me see.", tool_calls=[call(), call("ask", n=1)])], TOOLS),
    "a call, what it gave, the response": ([QUESTION, CALLED, SEEN, said("Two.")], TOOLS),
    "two results": ([QUESTION, CALLED, SEEN, turn("tool", "red"), said("Two red ones.")], TOOLS),
    "arguments as text": (
        [QUESTION, said("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])], None,
    ),
    "reasoning of the response": ([QUESTION, said("Two.", reasoning_content="One and one.")], None),
    "reasoning before a call": (
        [QUESTION, {**CALLED, "reasoning_content": "I look."}, SEEN, said("2", reasoning_content="So.")], TOOLS,
    ),
    "reasoning of an earlier turn": (
        [QUESTION, said("Two.", reasoning_content="Hm."), turn("user", "Sure?"), said("Yes.")], None,
    ),
    "a system turn": ([turn("system", "You see."), QUESTION, said("Two.")], TOOLS),
    "special tokens typed in a call": ([QUESTION, TYPED], None),
}  # fmt: skip


@pytest.fixture
def encoder_of(tokenizer):
    def make(template):
        wrapped = copy.deepcopy(tokenizer)
        wrapped.chat_template = template
        return PromptEncoder(wrapped, tokens_per_tile=4, max_length=4096)

    return make


def parse(turns, tools=None, **fields):
    *prompt, reply = turns
    return parse_group({"prompt": prompt, "responses": [reply], "tools": tools, **fields}, source="file.jsonl:1")


def shown(encoder, keys):
    return "".join(encoder.tokenizer.convert_ids_to_tokens(keys.tolist()))


def encode(encoder, group, **options):
    return encoder.encode(group.prompt, group.replies, tools=group.tools, **options)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_tokens_are_those_of_transformers(encoder_of, template, name):
    turns, tools = CONVERSATIONS[name]
    encoder = encoder_of(TEMPLATES[template])
    (keys,) = encode(encoder, parse(turns, tools)).sequences
    if name == "special tokens typed in a call":  # there they are text, where transformers takes them for its own
        assert [*keys].count(keys[-1]) == 2
        turns = json.loads(json.dumps(turns).replace("<|im_end|>", "<|im-end|>"))
        (keys,) = encode(encoder, parse(turns, tools)).sequences
    expected = encoder.tokenizer.apply_chat_template(turns, tools=tools, tokenize=True, return_dict=False)
    assert keys.tolist() == expected[:-1]  # without the newline behind its end token


@pytest.mark.parametrize("template", TEMPLATES)
def test_responses_of_all_kinds_share_their_prompt(encoder_of, template):
    replies = [said("Two."), CALLED, said("2", reasoning_content="One and one."), "Two."]
    group = parse_group({"prompt": [QUESTION], "responses": replies, "tools": TOOLS}, source="here")
    encoder = encoder_of(TEMPLATES[template])
    together = encode(encoder, group)
    prefix = together.sequences[0][: together.prefix_length]
    for reply, keys in zip(replies, together.sequences, strict=True):
        alone = parse_group({"prompt": [QUESTION], "responses": [reply], "tools": TOOLS}, source="here")
        assert keys.tolist() == encode(encoder, alone).sequences[0].tolist()
        assert keys[: len(prefix)].tolist() == prefix.tolist()
    assert len(prefix) > 20


PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
NO_TOOLS = PLAIN.replace("{{", "{% if m.role != 'tool' %}{{").replace("}}", "}}{% endif %}")
DROPPED = {  # turns, tools, template, field
    "tools": ([QUESTION, said("2")], TOOLS, PLAIN, "tools"),
    "a call": ([QUESTION, CALLED, SEEN, said("2")], None, PLAIN, "prompt[1].tool_calls"),
    "a response's call": ([QUESTION, CALLED], None, PLAIN, "response.tool_calls"),
    "reasoning": ([QUESTION, said("2", reasoning_content="So.")], None, PLAIN, "response.reasoning_content"),
    "reasoning before": (
        [QUESTION, said("2", reasoning_content="So."), QUESTION, said("2")], None, PLAIN,
        "prompt[1].reasoning_content",
    ),
    "a tool's turn": ([QUESTION, said("?"), SEEN, said("2")], None, NO_TOOLS, "prompt[2]"),
}  # fmt: skip


@pytest.mark.parametrize("what", DROPPED)
def test_what_a_template_drops_is_refused_by_its_name(encoder_of, what):
    turns, tools, template, field = DROPPED[what]
    with pytest.raises(FieldError, match="the chat template drops") as caught:
        encode(encoder_of(template), parse(turns, tools))
    assert caught.value.field == field


def test_a_name_or_an_id_that_a_template_does_not_use_changes_nothing(encoder_of):
    encoder, named = encoder_of(PLAIN), {**QUESTION, "name": "Ann"}
    plain, with_name = (encode(encoder, parse([own, said("2")])) for own in (QUESTION, named))
    assert with_name.sequences[0].tolist() == plain.sequences[0].tolist()
    hermes = encode(encoder_of(HERMES), parse([named, said("2")]))
    assert "userĠAnn" in shown(encoder, hermes.sequences[0])


def test_a_template_that_cannot_take_a_call_is_named(encoder_of):
    with pytest.raises(FieldError, match="does not take the turns user"):
        encode(
            encoder_of("{{ messages[1].tool_calls + '' if messages[1].tool_calls }}" + PLAIN), parse([QUESTION, CALLED])
        )


@pytest.mark.parametrize("text", [json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]])
def test_tools_and_calls_may_be_json_as_tables_hold_them(text):
    calls = CALLED["tool_calls"]
    as_text = parse([QUESTION, said(None, tool_calls=json.dumps(calls))], text)
    assert (as_text.tools, as_text.extras) == (parse([QUESTION, CALLED], TOOLS).tools, parse([QUESTION, CALLED]).extras)
    assert parse([QUESTION, said("2", tool_calls=[], name=None)], []).tools == ()


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"in": [value]}
    return value


WRONG = {
    "tools": (said("2"), {"tools": ["look"]}),
    "responses[0].tool_calls": (said("", tool_calls="look"), {}),
    "responses[0].reasoning_content": (said("", reasoning_content=["so"]), {}),
    "responses[0].content": (said(None), {}),
    "responses[0].function_call": (said("", function_call={"name": "f"}), {}),
    "responses[0]": (said("", tool_calls=[nested(200)]), {}),
    "rejected_tools": (said(""), {"rejected_tools": TOOLS}),
    "prompt": (said(""), {"prompt": [QUESTION, CALLED]}),
}


@pytest.mark.parametrize("field", WRONG)
def test_what_is_no_call_is_refused_by_its_field(field):
    reply, fields = WRONG[field]
    with pytest.raises(RecordError) as caught:
        parse([QUESTION, reply], **fields)
    assert caught.value.field == field


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_scored_records_keep_them_and_pairs_are_read_again(tmp_path, kind):
    prompt = [QUESTION, CALLED, SEEN]
    replies = ["Two.", said("2", reasoning_content="One and one.")]
    group = parse_group({"prompt": prompt, "responses": replies, "tools": TOOLS, "img_path": "a.png"}, source="here")
    scored = Scored(group, (1.0, 2.0), (False, False))
    rows = rows_of(scored, ScoreConfig())
    assert [row["response"] for row in rows] == replies and rows[0]["prompt"] == prompt and rows[0]["tools"] == TOOLS
    shards = Shards(tmp_path / "out", kind, 1, PAIRS)
    shards.open({})
    shards.write(0, rows_of(scored, ScoreConfig(to_pairs=0.0)), {})
    (again,) = iter_groups(Records(tmp_path / "out", image_root="."))
    assert (prompt_json(again.prompt), again.tools, again.images) == (prompt, group.tools, ("a.png",))
    assert [again.response_json(place) for place in (0, 1)] == replies[::-1]


def test_pairs_keep_each_sides_own(make_checkpoint, encoder_of):
    fields = {"prompt": [QUESTION], "chosen": [CALLED], "rejected": "Two.", "tools": TOOLS}
    preparer = Preparer(encoder_of(QWEN3), make_checkpoint().tiling, pairs="all", with_text=True)
    sample = preparer.sample(parse_group(fields, source="here"))
    assert ["<tool_call>" in shown(preparer.encoder, keys) for keys in sample.main.sequences] == [True, False]
    assert [own.tolist() for own in sample.text.sequences] == [own.tolist() for own in sample.main.sequences]
