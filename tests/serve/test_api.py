"""The reward server's protocols: what OpenRLHF's and vLLM's clients send is answered in their forms, with the rewards
that scoring the same records gives; requests that meet share what they have in common."""

import asyncio
import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from pydantic import ValidationError
from reward_server import data_url, picture, running
from runs import wait_until

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.data.records import Group, RecordError
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.serve.batcher import Batcher
from mmrm_fast.serve.guard import Limits
from mmrm_fast.serve.protocols import RerankRequest, RewardRequest, ScoreRequest, read_index

PROMPT = "What is in the picture?"
RESPONSES = ["two red circles", "I think so.", "", "two red circles on the left"]
POISON = "on which the model fails"
EXACT = {"abs": 1e-5}


def content(*, image):
    return [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": PROMPT}]


@pytest.fixture(scope="module")
def scorer(make_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, make_checkpoint(max_length=256))
    return Scorer.from_pretrained(folder, "cpu")


@pytest.fixture(scope="module")
def image_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "wide.png").write_bytes(picture())
    return root


@pytest.fixture(scope="module")
def client(scorer, image_root):
    with (
        running(scorer, image_root=image_root, index={"7": {"images": ["wide.png"]}}) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def expected(scorer, image_root):
    """Rewards of PROMPT with `wide.png` and without a picture."""
    records = [{"prompt": PROMPT, "responses": RESPONSES, "img_path": path} for path in (image_root / "wide.png", None)]
    records[0]["img_path"] = str(records[0]["img_path"])
    with_image, without = scorer.score(records)
    return {"image": with_image, "text": without}


def post(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def rendered(scorer, prompt, response):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return scorer.checkpoint.tokenizer.apply_chat_template(messages, tokenize=False)


# OpenRLHF


def test_get_reward_scores_whole_decoded_queries(client, scorer, expected):
    body = {"query": [rendered(scorer, PROMPT, response) for response in RESPONSES], "labels": [None] * 4}
    answer = post(client, "/get_reward", body)
    assert answer["rewards"] == pytest.approx(expected["text"], **EXACT)
    assert answer["scores"] == pytest.approx([1 / (1 + math.exp(-reward)) for reward in answer["rewards"]])
    assert answer["extra_logs"] == {"truncated": [0.0] * 4}


@pytest.mark.parametrize("image", ["wide.png", data_url(picture())], ids=["path", "data URL"])
def test_get_reward_takes_images(client, scorer, expected, image):
    body = {"query": [rendered(scorer, PROMPT, RESPONSES[0])], "prompts": [PROMPT], "images": [[image]]}
    body["prompts"] = [body["query"][0].partition(RESPONSES[0])[0]]
    assert post(client, "/get_reward", body)["rewards"] == pytest.approx(expected["image"][:1], **EXACT)


@pytest.mark.parametrize(
    "label", [{"images": ["wide.png"]}, '{"images": ["wide.png"]}', "7"], ids=["object", "JSON", "indexed"]
)
def test_get_reward_takes_images_that_a_label_names(client, scorer, expected, label):
    body = {"query": [rendered(scorer, PROMPT, RESPONSES[0])] * 2, "labels": [label, "a cat"]}
    assert post(client, "/get_reward", body)["rewards"] == pytest.approx(
        [expected["image"][0], expected["text"][0]], **EXACT
    )


def test_an_index_of_images_is_read_or_refused_by_its_line(tmp_path):
    path = tmp_path / "index.jsonl"
    path.write_text('{"id": "a", "images": ["x.png"]}\n{"id": 7, "images": [], "prompt": "?"}\n')
    assert read_index(path) == {"a": {"images": ["x.png"]}, "7": {"images": []}} and read_index(None) == {}
    for line in ('{"id": "a"}', '{"images": []}', '{"id": 7, "images": []}\n{"id": "7", "images": []}'):
        path.write_text('{"id": "b", "images": []}\n' + line)
        with pytest.raises(ValueError, match=r"index.jsonl:[23]: expected a new `id` and a list of `images`"):
            read_index(path)


def test_a_response_that_was_cut_is_reported(client, scorer):
    answer = post(client, "/get_reward", {"query": [rendered(scorer, PROMPT, "I think so. " * 200)]})
    assert answer["extra_logs"] == {"truncated": [1.0]}


def test_get_reward_takes_prompts_as_messages_and_the_response_alone(client, expected):
    body = {"query": [response + "<|im_end|>" for response in RESPONSES]}
    body["prompts"] = [[{"role": "user", "content": PROMPT}]] * 4
    assert post(client, "/get_reward", body)["rewards"] == pytest.approx(expected["text"], **EXACT)


def test_several_turns_and_a_system_turn_get_the_reward_of_their_messages(client, scorer):
    turns = [("system", "Be brief."), ("user", "What?"), ("assistant", "Two."), ("user", "Red?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = scorer.checkpoint.tokenizer.apply_chat_template(messages, tokenize=False)
    (chat,) = post(client, "/pooling", {"messages": messages})["data"]
    (whole,) = post(client, "/pooling", {"input": text})["data"]
    assert whole["data"] == pytest.approx(chat["data"], **EXACT)
    body = {"query": [text], "prompts": [text.rpartition("Yes.")[0]]}
    assert post(client, "/get_reward", body)["rewards"] == pytest.approx(chat["data"], **EXACT)


@pytest.mark.parametrize(
    "body",
    [
        {"query": ["What? two"]},
        {"query": ["What? two"], "prompts": ["What?"]},
        {"query": ["[INST]What?[/INST]two"], "prompts": ["[INST]What?[/INST]"]},
    ],
    ids=["no template", "a plain prompt", "another model's template"],
)
def test_a_query_that_cannot_be_read_says_what_to_send(client, body):
    answer = client.post("/get_reward", json=body)
    assert answer.status_code == 422
    assert "send it as messages in `prompts`, or with its template" in answer.json()["error"]["message"]


def test_a_query_that_does_not_match_its_prompt_is_refused(client):
    answer = client.post("/get_reward", json={"query": ["What? two"], "prompts": ["Which?"]})
    assert answer.status_code == 422 and "begin with its prompt" in answer.json()["error"]["message"]
    answer = client.post("/get_reward", json={"query": ["What? two"], "prompts": []})
    assert answer.status_code == 422 and "0 entries for 1" in answer.json()["error"]["message"]


def test_expanded_image_tokens_take_the_images_beside_them_and_are_refused_without(client, scorer, expected):
    text = rendered(scorer, "<img>" + "<IMG_CONTEXT>" * 8 + "</img>\n" + PROMPT, RESPONSES[0])
    answer = client.post("/get_reward", json={"query": [text]})
    assert (
        answer.status_code == 422
        and "shows 1 pictures and none was sent: send messages" in answer.json()["error"]["message"]
    )
    body = {"query": [text], "images": [["wide.png"]]}
    assert post(client, "/get_reward", body)["rewards"] == pytest.approx(expected["image"][:1], **EXACT)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/classify", {"messages": [{"role": "user", "content": "a"}] * 2, "chat_template": "x"}, "chat_template"),
        ("/pooling", {"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("/score", {"queries": "a", "documents": "b", "instruction": "c"}, "instruction"),
        ("/classify", {"messages": [{"role": "user", "content": "a", "function_call": {}}] * 2}, "function_call"),
        ("/get_reward", {"query": ["a"], "image": ["b"]}, "image"),
    ],
)
def test_a_field_that_is_not_known_is_refused_by_name(client, path, body, field):
    answer = client.post(path, json=body)
    assert answer.status_code == 422 and answer.json()["error"]["param"].endswith(field)


def test_fields_that_change_no_reward_and_nulls_are_let_pass(client, expected):
    body = {"queries": PROMPT, "documents": list(RESPONSES), "user": "u", "truncate_prompt_tokens": None}
    scores = [item["score"] for item in post(client, "/score", body)["data"]]
    assert scores == pytest.approx(expected["text"], **EXACT)


# vLLM


def test_classify_takes_text_and_chats(client, scorer, expected):
    texts = [rendered(scorer, PROMPT, response) for response in RESPONSES]
    answer = post(client, "/classify", {"model": "any", "input": texts, "use_activation": False})
    assert [item["probs"][-1] for item in answer["data"]] == pytest.approx(expected["text"], **EXACT)
    assert answer["data"][0] == {**answer["data"][0], "index": 0, "num_classes": 1} and answer["object"] == "list"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 20
    chat = [{"role": "user", "content": content(image="wide.png")}, {"role": "assistant", "content": RESPONSES[0]}]
    answer = post(client, "/classify", {"messages": chat})
    assert answer["data"][0]["probs"] == pytest.approx(expected["image"][:1], **EXACT)


@pytest.mark.parametrize("name", ["use_activation", "activation"])
def test_an_activation_is_the_sigmoid(client, scorer, expected, name):
    answer = post(client, "/classify", {"input": rendered(scorer, PROMPT, RESPONSES[0]), name: True})
    assert answer["data"][0]["probs"] == pytest.approx([1 / (1 + math.exp(-expected["text"][0]))], **EXACT)


def test_pooling_gives_the_reward_as_a_vector(client, scorer, expected):
    answer = post(client, "/pooling", {"input": rendered(scorer, PROMPT, RESPONSES[0])})
    assert answer["data"][0]["object"] == "pooling"
    assert answer["data"][0]["data"] == pytest.approx(expected["text"][:1], **EXACT)


@pytest.mark.parametrize("names", [("queries", "documents"), ("text_1", "text_2")])
def test_score_takes_one_query_or_one_each(client, expected, names):
    query = {"content": content(image=data_url(picture()))}
    for queries in (query, [query] * len(RESPONSES)):
        answer = post(client, "/score", dict(zip(names, (queries, RESPONSES), strict=True)))
        assert [item["score"] for item in answer["data"]] == pytest.approx(expected["image"], **EXACT)
    answer = post(client, "/score", {names[0]: PROMPT, names[1]: {"content": [{"type": "text", "text": RESPONSES[1]}]}})
    assert [item["score"] for item in answer["data"]] == pytest.approx(expected["text"][1:2], **EXACT)


def test_rerank_is_best_of_n(client, expected):
    answer = post(client, "/rerank", {"query": PROMPT, "documents": RESPONSES, "top_n": 2})
    order = sorted(range(4), key=lambda i: -expected["text"][i])[:2]
    assert [item["index"] for item in answer["results"]] == order
    assert [item["document"]["text"] for item in answer["results"]] == [RESPONSES[i] for i in order]
    scores = [item["relevance_score"] for item in answer["results"]]
    assert scores == pytest.approx([expected["text"][i] for i in order], **EXACT)


def test_a_conversation_is_scored_as_its_record_is(client, scorer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": PROMPT},
    ]
    answer = post(client, "/classify", {"messages": [*turns, {"role": "assistant", "content": "two"}]})
    (expected,) = scorer.score([{"prompt": turns, "responses": ["two"]}])
    assert answer["data"][0]["probs"] == pytest.approx(expected, **EXACT)


def test_calls_tools_and_reasoning_are_scored_as_their_record_is_and_refused_where_the_template_drops_them(
    client, make_checkpoint, tmp_path
):
    checkpoint = make_checkpoint(max_length=256)
    tokenizer = copy.deepcopy(checkpoint.tokenizer)
    tokenizer.chat_template = (
        "{{ tools | tojson if tools }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.reasoning_content }}{{ message.content or '' }}"
        "{{ message.tool_calls | tojson if message.tool_calls }}<|im_end|>\n{% endfor %}"
    )
    save_checkpoint(tmp_path / "model", replace(checkpoint, tokenizer=tokenizer))
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"where": "left"}}}
    as_text = {**call, "function": {"name": "look", "arguments": '{"where":"left"}'}}  # as OpenAI's clients send it
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "two", "tool_call_id": "1"}]
    reply = {"role": "assistant", "content": "Two.", "reasoning_content": "One and one."}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    scorer = Scorer.from_pretrained(tmp_path / "model", "cpu")
    (expected,) = scorer.score([{"prompt": turns, "responses": [reply], "tools": tools}])
    body = {"messages": [turns[0], {**turns[1], "tool_calls": [as_text]}, turns[2], reply], "tools": tools}
    with running(scorer) as url:
        answer = httpx.post(f"{url}/classify", json=body, timeout=30).json()
    assert answer["data"][0]["probs"] == pytest.approx(expected, **EXACT)
    for dropped, field in ((body, "tools"), ({"messages": body["messages"]}, "prompt[1].tool_calls")):
        refused = client.post("/classify", json=dropped)  # by a template that knows none of it
        assert refused.status_code == 422 and refused.json()["error"]["param"] == field
        assert "the chat template drops" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/classify", {}, "input"),
        ("/classify", {"input": "a", "messages": [{"role": "user", "content": "a"}] * 2}, "input"),
        ("/classify", {"messages": [{"role": "user", "content": "a"}] * 2}, "messages"),
        ("/classify", {"input": "a", "tools": [{}]}, "tools"),
        ("/score", {"queries": ["a", "b"], "documents": ["c"]}, "documents"),
        ("/score", {"documents": "a"}, "queries"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": [{"content": content(image="wide.png")}]}, "documents"),
        ("/score", {"queries": {"content": [{"type": "video_url"}]}, "documents": "b"}, "tags: 'text', 'image_url'"),
    ],
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_refused_by_its_field(client, path, body, field):
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    assert field in answer.json()["error"]["param"] or field in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", [RewardRequest, ScoreRequest, RerankRequest])
def test_a_list_of_wrong_items_is_refused_by_its_first(kind):
    for items in ([1] * 5000, [{"content": [{"type": "text"}] * 5000}]):
        body = {"query": items, "queries": items, "documents": items}
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(body)
        assert caught.value.error_count() < 20


# operations


def test_docs_health_and_metrics(client):
    docs = client.get("/docs")
    assert "<h2>POST /get_reward</h2>" in docs.text and "RerankRequest" in docs.text
    assert (
        docs.headers["content-security-policy"].startswith("default-src 'none'; style-src") and "http" not in docs.text
    )
    assert client.get("/healthz").json() == client.get("/health").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "tiny"}
    post(client, "/rerank", {"query": PROMPT, "documents": RESPONSES})
    counted = 'mmrm_requests_total{path="/rerank",status="200"}'  # after the answer has gone
    metrics = wait_until(lambda: counted in (text := client.get("/metrics").text) and text, counted, seconds=30)
    assert "mmrm_tokens_total" in metrics and "mmrm_responses_total" in metrics
    assert client.get("/nowhere").status_code == 404 and client.get("/rerank").status_code == 405
    assert client.get("/nowhere").json()["error"]["code"] == 404


# sharing


def group(number, *responses, prompt=PROMPT, images=()):
    return Group(f"file:{number}", number, None, prompt, None, images, responses)


def outcomes_of(scorer, groups):
    """What a batcher makes of groups that arrive together, errors in their place, and the batches that it scored."""
    batches = []

    async def score_one(batcher, group):
        try:
            (outcome,) = await batcher.score([scorer.encode(group)])
        except RuntimeError as error:
            return error
        return outcome

    async def score():
        batcher = Batcher(scorer, on_batch=batches.append)
        return await asyncio.gather(*(score_one(batcher, group) for group in groups))

    return asyncio.run(score()), batches


def test_requests_for_the_same_picture_and_prompt_share_them(scorer):
    groups = [group(i, f"{response} {i}", images=(picture(),)) for i, response in enumerate(RESPONSES * 4)]
    groups.insert(3, group(99, "red", images=(picture(1),)))
    outcomes, (batch,) = outcomes_of(scorer, groups)
    assert len(batch.tiles) == 3 + 3 and batch.num_responses == (16, 1)
    for one, outcome in zip(groups, outcomes, strict=True):
        (alone,) = scorer.score_groups([one])
        assert outcome.group == one and outcome.rewards == pytest.approx(alone.rewards, **EXACT)


def test_a_batch_stays_within_the_budget_and_the_oldest_go_first(scorer, monkeypatch):
    monkeypatch.setattr(scorer, "tokens_per_micro_batch", 300)
    groups = [group(i, "red " * 20, prompt=f"What {i}?") for i in range(12)]
    outcomes, batches = outcomes_of(scorer, groups)
    assert len(batches) > 1 and [outcome.group for outcome in outcomes] == groups
    assert all(len(batch.main.source_T) <= 300 for batch in batches)


def test_a_request_that_cannot_be_scored_harms_no_other(scorer):
    groups = [group(0, "two", images=(picture(),)), group(1, "two", images=(picture()[:-900],)), group(2, "two")]
    outcomes, _ = outcomes_of(scorer, groups)
    assert isinstance(outcomes[1], RecordError) and outcomes[1].source == "file:1"
    assert outcomes[0].rewards and outcomes[2].rewards


class Raising:
    """A scorer that fails as a whole where one of the responses is POISON."""

    def __init__(self, scorer):
        self.scorer = scorer

    def __getattr__(self, name):
        return getattr(self.scorer, name)

    def score_packed(self, packed):
        if any(POISON in sample.group.responses for sample in packed.samples):
            raise RuntimeError("an illegal memory access")
        return self.scorer.score_packed(packed)


@pytest.mark.parametrize("place", [0, 5, 8])
def test_a_failure_of_the_model_costs_only_the_request_at_fault(scorer, place):
    groups = [group(i, f"two {i}", prompt=f"What {i // 3}?") for i in range(9)]
    groups[place] = group(place, "red", POISON, prompt=groups[place].prompt)
    outcomes, _ = outcomes_of(Raising(scorer), groups)
    assert str(outcomes.pop(place)) == "an illegal memory access"
    groups.pop(place)
    for outcome, alone in zip(outcomes, scorer.score_groups(groups), strict=True):
        assert (outcome.group, outcome.rewards) == (alone.group, pytest.approx(alone.rewards, **EXACT))


def test_a_failure_of_the_model_is_answered_in_json_and_logged_once(scorer, caplog, capfd):
    with running(Raising(scorer)) as url, ThreadPoolExecutor(8) as pool:
        ask = lambda text: httpx.post(f"{url}/rerank", json={"query": PROMPT, "documents": [text]}, timeout=30)  # noqa: E731
        answers = list(pool.map(ask, [*RESPONSES, POISON, *RESPONSES]))
        metrics = httpx.get(f"{url}/metrics").text
    failed = answers.pop(len(RESPONSES))
    assert failed.status_code == 500 and "log says why" in failed.json()["error"]["message"]
    assert {answer.status_code for answer in answers} == {200}
    assert 'mmrm_requests_total{path="/rerank",status="500"} 1.0' in metrics
    (logged,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "illegal memory access" in str(logged.exc_info[1]) and "Traceback" not in capfd.readouterr().err


def test_one_client_a_request_gets_the_rewards_of_one_batch(client, expected):
    body = {"query": PROMPT, "documents": None}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda r: post(client, "/rerank", {**body, "documents": [r]}), RESPONSES * 8))
    rewards = [answer["results"][0]["relevance_score"] for answer in answers]
    assert rewards == pytest.approx(expected["text"] * 8, **EXACT)


# limits


@pytest.fixture(scope="module")
def slow_scorer(scorer):
    """The scorer, so slow that requests meet their limits."""

    class Slow:
        def __getattr__(self, name):
            return getattr(scorer, name)

        def score_packed(self, packed):
            time.sleep(1.0)
            return scorer.score_packed(packed)

    return Slow()


def test_overload_is_shed_and_what_was_admitted_is_answered(slow_scorer):
    with running(slow_scorer, limits=Limits(requests=8)) as url, ThreadPoolExecutor(20) as pool:
        ask = lambda _: httpx.post(f"{url}/rerank", json={"query": "a", "documents": ["b"]}, timeout=30)  # noqa: E731
        answers = list(pool.map(ask, range(20)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    refused = answers[statuses.index(429)]
    assert refused.headers["retry-after"] == "1" and "try again" in refused.json()["error"]["message"]


def test_a_full_server_still_shows_its_metrics(scorer):
    with running(scorer, limits=Limits(requests=0)) as url:
        statuses = [httpx.get(url + path, timeout=30).status_code for path in ("/nowhere", "/metrics", "/healthz")]
    assert statuses == [429, 200, 200]


def test_a_request_that_takes_too_long_is_given_up(slow_scorer):
    with running(slow_scorer, limits=Limits(seconds=0.3)) as url:
        answer = httpx.post(f"{url}/rerank", json={"query": "a", "documents": ["b"]}, timeout=30)
    assert answer.status_code == 504 and "0.3 seconds" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("paths", "body"),
    [
        (("/classify", "/v1/classify"), {"input": "{text}"}),
        (("/score", "/v1/score"), {"queries": PROMPT, "documents": RESPONSES[0]}),
        (("/rerank", "/v1/rerank", "/v2/rerank"), {"query": PROMPT, "documents": list(RESPONSES)}),
    ],
)
def test_every_path_of_an_endpoint_answers_alike(client, scorer, paths, body):
    if "input" in body:
        body = {"input": rendered(scorer, PROMPT, RESPONSES[0])}
    first, *others = ({**post(client, path, body), "id": 0, "created": 0} for path in paths)
    assert all(other == first for other in others)


def test_embeddings_are_what_verl_reads_of_sglang(client, scorer, expected):
    answer = post(client, "/v1/embeddings", {"model": "any", "input": rendered(scorer, PROMPT, RESPONSES[0])})
    assert answer["data"][-1]["embedding"][-1] == pytest.approx(expected["text"][0], **EXACT)
