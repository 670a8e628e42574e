"""The layouts in which preference data is published: each is read as what it says, or refused with words that name why.

One record a layout, with all the fields of its card; through JSON lines, or Parquet where it is published so.
"""

import json

import pyarrow
import pytest
from pyarrow import parquet

from mmrm_fast.data.records import Records
from mmrm_fast.data.types import Message, RecordError, prompt_json

PNG = {"bytes": b"\x89PNG", "path": "000.png"}
TURNS = [{"role": "user", "content": "What is it?"}]
REPLY, OTHER = {"role": "assistant", "content": "A cat."}, {"role": "assistant", "content": "A dog."}
RATED = {"Helpfulness": {"Rating": "4", "Rationale": "r"}, "Visual Faithfulness": {"Rating": "5", "Rationale": "r"}}
LOW = {"Helpfulness": {"Rating": "1", "Rationale": "r"}, "Visual Faithfulness": {"Rating": "N/A", "Rationale": "r"}}
ASPECTS = {name: {"Rating": "4", "Rationale": "r"} for name in ("helpfulness", "honesty", "truthfulness")}
WORSE = ASPECTS | {"honesty": {"Rating": "1", "Rationale": "r"}}


def sharegpt(*texts):
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def openbmb(**fields):
    return {
        "ds_name": "x",
        "image": PNG,
        **fields,
        "origin_dataset": "COCO",
        "origin_split": "{}",
        "image_path": "0.jpg",
    }


def helpsteer3(preference):
    return {
        "domain": "general", "language": "english", "context": TURNS, "response1": "A cat.", "response2": "A dog.",
        "overall_preference": preference, "individual_preference": [{"score": preference, "reasoning": "r",
        "feedback1": "f", "feedback2": "f"}],
    }  # fmt: skip


def completion(annotations, response, **fields):
    return {"model": "m", "response": response, "annotations": annotations, **fields}


def ultrafeedback(**fields):
    own = {"principle": "honesty", "overall_score": 7.5, "fine-grained_score": 4.0, "critique": "c", **fields}
    completions = [completion(ASPECTS, "A cat.", **own), completion(WORSE, "A dog.", **own)]
    return {
        "source": "evol", "instruction": "What is it?", "models": ["m"] * 2, "completions": completions,
        "correct_answers": ["None"], "incorrect_answers": ["None"],
    }  # fmt: skip


def vlfeedback(completions):
    return {"id": "1", "prompt": "What is it?", "img_path": "a.jpg", "models": ["m"] * 3, "completions": completions}


MM_RLHF = {
    "id": "1", "question": "What is it?", "answer": "A cat.", "image": "short/a.jpg", "video": None,
    "models_output": ["A cat.", "A dog."], "faithfulness": [1, 2], "helpfulness": [1, 2], "ethical": [1, 1],
    "final_ranking": [1, 2], "score_reasons": ["r"], "ranking_reason": "r",
}  # fmt: skip
PAIR = ([(0, 1)], ["A cat.", "A dog."])
READ = {  # record, pairs and responses, images
    "RLAIF-V": (openbmb(question="What is it?", chosen="A cat.", rejected="A dog.", idx="7"), *PAIR, [b"\x89PNG"]),
    "RLHF-V": (
        openbmb(text=json.dumps({"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}), idx=7),
        *PAIR,
        [b"\x89PNG"],
    ),
    "VLFeedback, lines": (
        vlfeedback(
            [
                completion(RATED, "A cat."),
                completion(LOW, "?"),
                completion({key: {"Rating": "1"} for key in RATED}, "A dog."),
            ]
        ),
        [(0, 2)],
        ["A cat.", "?", "A dog."],
        ["a.jpg"],
    ),
    "VLFeedback, columns": (
        vlfeedback({"annotations": [RATED, LOW], "model": ["m"] * 2, "response": ["A cat.", "?"]}),
        [],
        ["A cat.", "?"],
        ["a.jpg"],
    ),
    "POVID": (
        {
            "id": "1",
            "image": "a.jpg",
            "conversations": sharegpt("<image>\nWhat is it?", "A cat."),
            "rejected_conversations": sharegpt("<image>\nWhat is it?", "A dog."),
        },
        *PAIR,
        ["a.jpg"],
    ),
    "MMPR": (
        {"image": "a.jpg", "question": "<image>\nWhat is it?", "chosen": "A cat.", "rejected": "A dog."},
        *PAIR,
        ["a.jpg"],
    ),
    "MMPR, several pictures": (
        {
            "image": ["a.jpg", "b.jpg"],
            "question": "<image><image>What is it?",
            "chosen": "A cat.",
            "rejected": "A dog.",
        },
        *PAIR,
        ["a.jpg", "b.jpg"],
    ),
    "Skywork": ({"chosen": [*TURNS, REPLY], "rejected": [*TURNS, OTHER], "source": "magpie"}, *PAIR, []),
    "HelpSteer3": (helpsteer3(-2), *PAIR, []),
    "HelpSteer3, the second": (helpsteer3(3), [(1, 0)], PAIR[1], []),
    "HelpSteer3, the same": (helpsteer3(0), [], PAIR[1], []),
    "UltraFeedback, binarized": (
        {
            "prompt": "What is it?",
            "prompt_id": "1",
            "chosen": [*TURNS, REPLY],
            "rejected": [*TURNS, OTHER],
            "messages": [*TURNS, REPLY],
            "score_chosen": 8.5,
            "score_rejected": 8.0,
        },
        *PAIR,
        [],
    ),
    "UltraFeedback, cleaned": (
        {
            "source": "evol",
            "prompt": "What is it?",
            "chosen": [*TURNS, REPLY],
            "chosen-rating": 4.0,
            "chosen-model": "m",
            "rejected": [*TURNS, OTHER],
            "rejected-rating": 3.0,
            "rejected-model": "m",
        },
        *PAIR,
        [],
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": sharegpt("<image>What is it?"),
            "chosen": sharegpt("", "A cat.")[1],
            "rejected": sharegpt("", "A dog.")[1],
            "images": ["a.jpg"],
        },
        *PAIR,
        ["a.jpg"],
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "What is it?", "input": "", "chosen": "A cat.", "rejected": "A dog.", "system": ""},
        *PAIR,
        [],
    ),
    "ms-swift, a reply": (
        {"messages": [*TURNS, REPLY], "rejected_response": "A dog.", "images": ["a.jpg"]},
        *PAIR,
        ["a.jpg"],
    ),
    "ms-swift, messages": (
        {
            "messages": [*TURNS, REPLY],
            "rejected_messages": [*TURNS, OTHER],
            "images": ["a.jpg"],
            "rejected_images": ["b.jpg"],
        },
        *PAIR,
        ["a.jpg", "b.jpg"],
    ),
    "TRL": ({"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog.", "margin": 1.5}, *PAIR, []),
    "TRL, conversational": ({"prompt": TURNS, "chosen": [REPLY], "rejected": [OTHER]}, *PAIR, []),
    "TRL, vision": (
        {
            "images": [PNG],
            "prompt": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]}
            ],
            **{
                side: [{"role": "assistant", "content": [{"type": "text", "text": reply["content"]}]}]
                for side, reply in (("chosen", REPLY), ("rejected", OTHER))
            },
        },
        *PAIR,
        [b"\x89PNG"],
    ),
}
REFUSED = {  # record, field, words
    "UltraFeedback": (
        ultrafeedback(custom_system_prompt="Be honest."),
        "completions[0].custom_system_prompt",
        "is not read",
    ),
    "MM-RLHF": (MM_RLHF, "chosen", "missing; training and evaluation need chosen/rejected or completions"),
    "MMPR, a video": (
        {"video": "a.mp4", "question": "<video>\nWhat?", "chosen": "A cat.", "rejected": "A dog."},
        "video",
        "is not read",
    ),
    "RLHF-V, lines": (
        openbmb(text='{"question": "q", "chosen": "a", "rejected": "b"}') | {"image": "COCO"},
        "image_path",
        "other images",
    ),
    "TRL, implicit prompt": ({"chosen": "What is it? A cat.", "rejected": "What is it? A dog."}, "prompt", "missing"),
    "ms-swift, query": ({"query": "q", "response": "a", "rejected_response": "b"}, "chosen", "missing"),
    "ms-swift, a tool's role": (
        {"messages": [*TURNS, {"role": "tool_call", "content": "{}"}, REPLY], "rejected_response": "b"},
        "messages[1].role",
        "expected system, user, assistant or tool",
    ),
}


def write(record, tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record) + "\n")
    return Records(path, image_root=".", need_pairs=True)


def kinds(layouts):
    """Each layout in Parquet, and in JSON lines where it holds no bytes."""
    return [
        (name, kind)
        for name in layouts
        for kind in ("parquet", "jsonl")
        if kind == "parquet" or PNG not in flat(layouts[name][0])
    ]


def flat(value):
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(found for item in items for found in flat(item))]


@pytest.mark.parametrize(("name", "kind"), kinds(READ))
def test_a_public_layout_is_read_as_what_it_says(tmp_path, name, kind):
    record, pairs, responses, images = READ[name]
    group = write(record, tmp_path, kind).group(0)
    assert [pair[:2] for pair in group.pairs] == pairs and list(group.responses) == responses
    assert list(group.images) == images
    prompt = prompt_json(group.prompt)
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    assert asked.replace("<image>", "").strip() == "What is it?"


@pytest.mark.parametrize(("name", "kind"), kinds(REFUSED))
def test_a_public_layout_that_is_not_read_is_refused_with_words(tmp_path, name, kind):
    record, field, words = REFUSED[name]
    with pytest.raises(RecordError, match=words) as caught:
        write(record, tmp_path, kind).group(0)
    assert caught.value.field == field


def test_ultrafeedback_is_read_once_its_system_prompts_are_let_go(tmp_path):
    records = write(ultrafeedback(custom_system_prompt="Be honest."), tmp_path, "jsonl")
    group = Records(records.files[0].path, ignored=("custom_system_prompt",)).group(0)
    assert [pair[:2] for pair in group.pairs] == [(0, 1)] and group.prompt == "What is it?"


def test_an_instruction_and_its_input_are_one_prompt_and_history_comes_before(tmp_path):
    record = {
        "instruction": "Translate.", "input": "Guten Tag", "chosen": "Hello", "rejected": "Bye", "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }  # fmt: skip
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Translate.\nGuten Tag")]
    assert write(record, tmp_path, "jsonl").group(0).prompt == tuple(Message(*turn) for turn in said)


def test_messages_that_are_not_the_chosen_conversation_are_no_repetition(tmp_path):
    record = {
        "prompt": "What is it?",
        "chosen": [*TURNS, REPLY],
        "rejected": [*TURNS, OTHER],
        "messages": [*TURNS, OTHER],
    }
    with pytest.raises(RecordError, match="messages: there is a `prompt` beside it"):
        write(record, tmp_path, "jsonl").group(0)
