"""The client gives the scorer's rewards, waits for a busy server, and stands where TRL and OpenRLHF want a function."""

import asyncio
import base64
import importlib.util
import io
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
from PIL import Image
from reward_server import picture, running

from mmrm_fast.client import RESPONSES_AT_ONCE, RewardClient, image_url
from mmrm_fast.data.images import load_image

EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"
PROMPT, RESPONSES = "What is in the picture?", ["two red circles", "I think so.", ""]
EXACT = {"abs": 1e-5}


@pytest.fixture(scope="module")
def url(scorer):
    with running(scorer) as url:
        yield url


@pytest.fixture
def client(url):
    return RewardClient(url)


@pytest.fixture
def wide(tmp_path):
    (tmp_path / "wide.png").write_bytes(picture())
    return str(tmp_path / "wide.png")


def rewards_of(scorer, prompt, responses, **image):
    return scorer.score([{"prompt": prompt, "responses": responses, **image}])[0]


def as_pil(content):
    return Image.open(io.BytesIO(content))


ENCODINGS = {
    "bytes": lambda content: content,
    "PIL": as_pil,
    "datasets": lambda content: {"bytes": content, "path": None},
    "data URL": lambda content: image_url(content),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
def test_rewards_are_the_scorers(client, scorer, wide, encode):
    expected = rewards_of(scorer, PROMPT, RESPONSES, img_path=wide)
    assert client.score(PROMPT, RESPONSES, [encode(picture())]) == pytest.approx(expected, **EXACT)
    assert client.score(PROMPT, RESPONSES) == pytest.approx(rewards_of(scorer, PROMPT, RESPONSES), **EXACT)


def test_a_conversation_is_scored_with_the_image_in_its_place(client, scorer, wide):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": PROMPT},
    ]
    record = [{"role": "user", "content": "Look: <image>\n"}, *turns[1:]]
    expected = rewards_of(scorer, record, RESPONSES, img_path=wide)
    assert client.score(turns, RESPONSES, [picture()]) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("held", ENCODINGS.values(), ids=ENCODINGS)
def test_a_part_may_hold_its_picture(client, scorer, wide, held):
    image = {"type": "image", "image": held(picture()), "text": None}  # nulls as Arrow's tables fill them in
    turns = [{"role": "user", "content": [image, {"type": "text", "text": "?", "image": None}]}]
    expected = rewards_of(scorer, "<image>\n?", RESPONSES, img_path=wide)
    assert client.score(turns, RESPONSES) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"messages\[0\].content is None"),
        ([{"type": "image"}], r"messages\[0\].content has an image part without"),
        (["What?"], r"messages\[0\].content has 'What\?'; expected parts of type"),
        ([{"type": "image", "image": {"bytes": None, "path": None}}], "None is no picture"),
        ([{"type": "video", "video": "a.mp4"}], r"content has \{'type': 'video'"),
    ],
)
def test_content_that_says_nothing_is_refused(client, content, reason):
    with pytest.raises(ValueError, match=reason):
        client.score([{"role": "user", "content": content}], RESPONSES)


def test_images_that_have_no_place_in_the_messages_are_refused(client):
    turns = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "?"}]}]
    with pytest.raises(ValueError, match=r"no place for 1 of the images"):
        client.score(turns, RESPONSES, [picture(1)])


def test_turns_of_tools_are_sent_as_they_are_and_refused_where_the_template_drops_them(client):
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(ValueError, match=r"422: .*tool_calls.*the chat template drops"):
        client.score([*turns, {"role": "tool", "content": "red"}], RESPONSES)


def test_many_coroutines_get_their_own_rewards(client, scorer):
    async def score_all():
        return await asyncio.gather(*(asyncio.to_thread(client.score, f"What is {i}?", RESPONSES) for i in range(24)))

    rewards = asyncio.run(score_all())
    expected = scorer.score([{"prompt": f"What is {i}?", "responses": RESPONSES} for i in range(24)])
    assert rewards == [pytest.approx(own, **EXACT) for own in expected]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "P", "LA", "RGBA", "I;16", "1"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_pil_image_is_seen_as_its_file_is(mode, turned):
    image = as_pil(picture()).convert("RGB").convert("L" if mode == "I;16" else mode)
    image = image.convert("I;16") if mode == "I;16" else image
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    file = io.BytesIO()
    image.save(file, "TIFF", exif=exif)
    sent = base64.b64decode(image_url(as_pil(file.getvalue())).partition(",")[2])
    assert load_image(sent).tobytes() == load_image(file.getvalue()).tobytes()


def test_more_responses_than_a_request_takes_are_sent_in_several(client, scorer):
    responses = [f"{number} circles" for number in range(RESPONSES_AT_ONCE + 3)]
    rewards = client.score(PROMPT, responses)
    assert rewards[-4:] == pytest.approx(rewards_of(scorer, PROMPT, responses[-4:]), **EXACT)
    assert len(rewards) == len(responses)


def test_of_several_servers_one_that_answers_is_asked(url, scorer):
    client = RewardClient(["http://127.0.0.1:9", url], retries=2)  # the discard port: nobody listens
    for _ in range(3):
        assert client.score(PROMPT, RESPONSES) == pytest.approx(rewards_of(scorer, PROMPT, RESPONSES), **EXACT)


def test_trl_gets_a_reward_a_completion(client, scorer, wide):
    prompts = [PROMPT, PROMPT, [{"role": "user", "content": "What?"}]]
    completions = [RESPONSES[0], RESPONSES[1], [{"role": "assistant", "content": RESPONSES[0]}]]
    images = [[as_pil(picture())], [as_pil(picture())], []]
    rewards = client.reward_func(prompts=prompts, completions=completions, completion_ids=[[1]] * 3, images=images)
    expected = rewards_of(scorer, PROMPT, RESPONSES[:2], img_path=wide) + rewards_of(scorer, "What?", RESPONSES[:1])
    assert rewards == pytest.approx(expected, **EXACT)
    assert client.reward_func.__name__ == "reward_func"


def test_trls_pictures_stand_in_its_messages_and_in_a_column_and_are_sent_once(client, scorer, wide):
    """As TRL 1.16 calls: it fills the parts and hands on the column as well."""
    parts = [{"type": "image", "image": as_pil(picture())}, {"type": "text", "text": PROMPT}]
    turns = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": parts}]
    completions = [[{"role": "assistant", "content": response}] for response in RESPONSES[:2]]
    rewards = client.reward_func([turns] * 2, completions, completion_ids=[[1]] * 2, images=[[as_pil(picture())]] * 2)
    record = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"<image>\n{PROMPT}"}]
    assert rewards == pytest.approx(rewards_of(scorer, record, RESPONSES[:2], img_path=wide), **EXACT)


def test_a_completion_of_several_turns_is_scored_by_its_last(client, scorer):
    between = [{"role": "assistant", "content": "I look."}, {"role": "user", "content": "And?"}]
    last = {"role": "assistant", "content": [{"type": "text", "text": "two"}]}
    expected = rewards_of(scorer, [{"role": "user", "content": PROMPT}, *between], ["two"])
    assert client.reward_func([PROMPT], [[*between, last]]) == pytest.approx(expected, **EXACT)
    for unfit in ({"role": "assistant", "content": None}, {**last, "tool_calls": [{}]}, {**last, "content": [{}]}):
        with pytest.raises(ValueError, match="a completion must end in text"):
            client.reward_func([PROMPT], [[unfit]])


@pytest.fixture
def example(url, monkeypatch):
    """An example as a module that asks the server."""
    monkeypatch.setenv("REWARD_SERVER", url)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_verl_gets_the_reward_of_messages_with_their_pictures(scorer, example, wide):
    compute_score = example("verl_reward").compute_score
    asked = {"data_source": "shapes", "solution_str": RESPONSES[0], "ground_truth": "", "reward_router_address": None}
    info = {"messages": [{"role": "user", "content": PROMPT}], "images": [image_url(picture())], "num_turns": None}
    reward = asyncio.run(compute_score(**asked, extra_info=info))
    assert reward == pytest.approx(rewards_of(scorer, PROMPT, RESPONSES[:1], img_path=wide)[0], **EXACT)
    with pytest.raises(ValueError, match=r"shapes has no extra_info\['messages'\]"):
        asyncio.run(compute_score(**asked, extra_info={"index": 3}))


def test_openrlhf_gets_tensors(scorer, example):
    module = example("openrlhf_reward")
    template = scorer.checkpoint.tokenizer.apply_chat_template
    head = template([{"role": "user", "content": PROMPT}], tokenize=False) + "<|im_start|>assistant\n"
    answer = module.reward_func([head + RESPONSES[0] + "<|im_end|>"], [head], [None])
    assert answer["rewards"].tolist() == pytest.approx(rewards_of(scorer, PROMPT, RESPONSES[:1]), **EXACT)
    assert answer["extra_logs"]["truncated"].tolist() == [0.0]


def test_openrlhfs_file_hands_on_the_label_that_names_a_prompts_pictures(scorer, example, wide):
    module = example("openrlhf_reward")
    head = f"<|im_start|>user\n<IMG_CONTEXT>\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    query = head.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * 4 + "</img>") + RESPONSES[0] + "<|im_end|>"
    label = json.dumps({"images": [image_url(picture())]})
    expected = rewards_of(scorer, PROMPT, RESPONSES[:1], img_path=wide)
    assert module.reward_func([query], [head], [label])["rewards"].tolist() == pytest.approx(expected, **EXACT)
    with pytest.raises(ValueError, match=r"422: .*shows 1 pictures and none was sent"):
        module.reward_func([query], [head], ["label"])


def test_a_refusal_is_an_error_with_the_servers_reason(client):
    with pytest.raises(ValueError, match=r"422: .*not downloaded"):
        client.score(PROMPT, RESPONSES, ["http://example.com/x.png"])


@pytest.fixture
def busy():
    """A server that refuses twice, with 429, and then answers."""
    answers = iter([429, 429, 200])

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(next(answers, 200))
            body = json.dumps({"data": [{"score": 1.5}]}).encode()
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_busy_server_is_asked_again(busy):
    assert RewardClient(busy).score("a", ["b"]) == [1.5]


def test_it_does_not_ask_for_ever(busy):
    with pytest.raises(requests.RequestException):
        RewardClient(busy, retries=1).score("a", ["b"])


@pytest.mark.slow
def test_grpo_of_trl_trains_on_the_servers_rewards(url, tokenizer, tmp_path):
    """The example as a user runs it, with a policy of two layers."""
    pytest.importorskip("trl", reason="pip install trl")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(4)))
    options = {"model": tmp_path / "policy", "data": tmp_path / "prompts.jsonl", "server": url, "output-dir": tmp_path,
               "max-steps": 2, "num-generations": 4, "max-completion-length": 8}  # fmt: skip
    command = [sys.executable, EXAMPLES / "grpo_trl.py", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'reward'" in done.stdout and (tmp_path / "model.safetensors").is_file()
