"""The field's reward protocols over HTTP: OpenRLHF's and vLLM's requests to records, rewards to their answers.

Everything that a request asks for becomes records (`prompt` as chat messages, `responses`), so that the server reads,
checks and scores them as files are.
"""

import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from mmrm_fast.data.prompt import IMAGE
from mmrm_fast.data.types import FieldError

SLOTS = ("MMRMPROMPTSLOT", "MMRMRESPONSESLOT")
BOUNDED = {"max_length": 1 << 16, "fail_fast": True}  # of lists: an error an item would be much more than the body


class Body(BaseModel):
    """Types are strict; fields that other servers know and this one has no use for are ignored."""

    model_config = ConfigDict(strict=True)


class ImageUrl(Body):
    url: str
    """A `data:` URL, or a path under the server's image root."""


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(**BOUNDED)]


class ChatMessage(Body):
    role: Literal["system", "user", "assistant"]
    content: Content


class Parts(Body):
    content: Content


Text = str | Parts
TextList = Annotated[list[Text], Field(min_length=1, **BOUNDED)]
Texts = Annotated[list[str], Field(min_length=1, **BOUNDED)]


class RewardRequest(Body):
    """OpenRLHF: `query` is the whole decoded prompt + response, special tokens included."""

    query: Texts
    prompts: Annotated[list[str], Field(**BOUNDED)] | None = None
    labels: list[Any] | None = None
    images: Annotated[list[Annotated[list[str], Field(**BOUNDED)]], Field(**BOUNDED)] | None = None


class PoolingBody(Body):
    """What vLLM's requests have in common.

    Rewards are given raw, as vLLM does for models of `problem_type: regression`, unless the sigmoid is asked for.
    """

    model: str | None = None
    use_activation: bool | None = Field(None, validation_alias=AliasChoices("use_activation", "activation"))


class InputRequest(PoolingBody):
    """vLLM's /classify and /pooling: `input`, whole templated texts, or `messages`, the last of them the response."""

    input: str | Texts | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=2, **BOUNDED)] | None = None


class ScoreRequest(PoolingBody):
    """vLLM's /score: a query is a prompt, a document a response; one query to all documents, or one each."""

    queries: Text | TextList = Field(validation_alias=AliasChoices("queries", "text_1"))
    documents: Text | TextList = Field(validation_alias=AliasChoices("documents", "text_2"))


class RerankRequest(PoolingBody):
    """vLLM's /rerank: the documents, responses to the query, best first."""

    query: Text
    documents: TextList
    top_n: Annotated[int, Field(ge=0)] = 0


class QueryReader:
    """Cuts a whole decoded conversation back into prompt and response, by the checkpoint's chat template.

    With the template `head + prompt + middle + response + tail`:

    - without `prompt`, the query must begin with `head`; the response follows the first `middle`;
    - with `prompt`, the query must begin with it and the response is the rest. A prompt that is itself in the
      template loses `head` and `middle`; one that is not is taken literally.

    Padding and begin tokens before the query, and end and padding tokens after the response, are dropped; image
    tokens are replaced by a slot. A prompt's text before `middle` comes from the data and a response from a policy:
    that is why the first `middle` counts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        messages = [{"role": role, "content": slot} for role, slot in (("user", SLOTS[0]), ("assistant", SLOTS[1]))]
        self.head, self.middle, tail = re.split(
            "|".join(SLOTS), tokenizer.apply_chat_template(messages, tokenize=False)
        )
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        closing = {tokenizer.eos_token, tokenizer.pad_token} | {token for token in specials if token in tail}
        self.closing = longest_first(closing)
        opening = "|".join(map(re.escape, longest_first({tokenizer.bos_token, tokenizer.pad_token})))
        self.leading = re.compile(f"^(?:{opening or '(?!)'})+")  # without such tokens it matches nothing
        self.image = re.compile(r"<img>(?:<IMG_CONTEXT>)+</img>")

    def read(self, query: str, prompt: str | None = None) -> tuple[str, str]:
        """(prompt, response). Raises `FieldError`."""
        query, head = (self.leading.sub("", text) for text in (query, self.head))
        if prompt is None:
            if not query.startswith(head) or self.middle not in query[len(head) :]:
                raise FieldError("query", "is not in this checkpoint's chat template; send the prompt in `prompts`")
            prompt, _, response = query[len(head) :].partition(self.middle)
        else:
            prompt = self.leading.sub("", prompt)
            if not query.startswith(prompt):
                raise FieldError("query", "does not begin with its prompt of `prompts`")
            response = query[len(prompt) :]
            if prompt.startswith(head) and prompt.endswith(self.middle):
                prompt = prompt[len(head) : -len(self.middle)]
        return self.image.sub(IMAGE, prompt), without_end(response, self.closing)


def longest_first(tokens: set[str | None]) -> list[str]:
    """The tokens that there are, so that none hides a longer one that it is part of."""
    return sorted(filter(None, tokens), key=len, reverse=True)


def without_end(text: str, tokens: Sequence[str]) -> str:
    """The text without the tokens that it ends in, each with the whitespace after it."""
    end = len(text)
    while True:
        at = end
        while at and text[at - 1].isspace():
            at -= 1
        token = next((token for token in tokens if text.endswith(token, 0, at)), None)
        if token is None:
            return text[:end]
        end = at - len(token)


def user(text: Text) -> list[dict]:
    """One user turn."""
    return [{"role": "user", "content": plain(content_of(text))}]


def plain(content: Content) -> str | list[dict]:
    """Content as JSON."""
    return content if isinstance(content, str) else [part.model_dump() for part in content]


def content_of(text: Text | ChatMessage) -> Content:
    return text if isinstance(text, str) else text.content


def response_text(text: Text | ChatMessage, field: str) -> str:
    """A response, which is text alone. Raises `FieldError`."""
    content = content_of(text)
    if isinstance(content, str):
        return content
    if any(isinstance(part, ImagePart) for part in content):
        raise FieldError(field, "a response is text; images belong to the prompt")
    return "".join(part.text for part in content)


def reward_records(request: RewardRequest, reader: QueryReader) -> list[dict]:
    """One record a query. Raises `FieldError`."""
    count = len(request.query)
    for name in ("prompts", "labels", "images"):
        values = getattr(request, name)
        if values is not None and len(values) != count:
            raise FieldError(name, f"has {len(values)} entries for {count} queries")
    records = []
    for i, query in enumerate(request.query):
        prompt, response = reader.read(query, request.prompts[i] if request.prompts else None)
        images = request.images[i] if request.images else []
        records.append({"prompt": prompt, "images": images, "responses": [response]})
    return records


def input_records(request: InputRequest, reader: QueryReader) -> list[dict]:
    """One record an input. Raises `FieldError`."""
    if (request.input is None) == (request.messages is None):
        raise FieldError("input", "send either `input` or `messages`")
    if request.messages is not None:
        *turns, last = request.messages
        if last.role != "assistant":
            raise FieldError("messages", "the last message must be the assistant's: it is what gets the reward")
        prompt = [{"role": turn.role, "content": plain(turn.content)} for turn in turns]
        return [{"prompt": prompt, "responses": [response_text(last, "messages")]}]
    queries = map(reader.read, [request.input] if isinstance(request.input, str) else request.input)
    return [{"prompt": prompt, "responses": [response]} for prompt, response in queries]


def score_records(request: ScoreRequest, reader: QueryReader) -> list[dict]:
    """One record for one query, or one a pair of query and document. Raises `FieldError`."""
    queries = request.queries if isinstance(request.queries, list) else [request.queries]
    documents = request.documents if isinstance(request.documents, list) else [request.documents]
    responses = [response_text(document, "documents") for document in documents]
    if len(queries) == 1:
        return [{"prompt": user(queries[0]), "responses": responses}]
    if len(queries) != len(documents):
        raise FieldError("documents", f"{len(documents)} for {len(queries)} queries; send one query, or one each")
    pairs = zip(queries, responses, strict=True)
    return [{"prompt": user(query), "responses": [response]} for query, response in pairs]


def rerank_records(request: RerankRequest, reader: QueryReader) -> list[dict]:
    """One record. Raises `FieldError`."""
    responses = [response_text(document, "documents") for document in request.documents]
    return [{"prompt": user(request.query), "responses": responses}]


def reward_answer(rewards: Sequence[float], truncated: Sequence[bool]) -> dict:
    """OpenRLHF: raw rewards, their sigmoid as scores, and which responses were cut to the maximum length."""
    logs = {"truncated": [float(cut) for cut in truncated]}
    return {"rewards": list(rewards), "scores": list(map(sigmoid, rewards)), "extra_logs": logs}


def classify_answer(request: InputRequest, values: Sequence[float]) -> dict:
    """The reward of each input as the one class's `probs`; raw unless `use_activation` asks for the sigmoid."""
    data = [{"index": i, "label": "LABEL_0", "probs": [value], "num_classes": 1} for i, value in enumerate(values)]
    return {"data": data}


def pooling_answer(request: InputRequest, values: Sequence[float]) -> dict:
    """The reward of each input as a vector of one."""
    return {"data": [{"index": i, "object": "pooling", "data": [value]} for i, value in enumerate(values)]}


def score_answer(request: ScoreRequest, values: Sequence[float]) -> dict:
    """The reward of each document as a response to its query."""
    return {"data": [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]}


def rerank_answer(request: RerankRequest, values: Sequence[float]) -> dict:
    """Best-of-N: the documents as responses to the query, best first, `top_n` of them (0: all); ties as they came."""
    order = sorted(range(len(values)), key=lambda i: -values[i])[: request.top_n or None]
    texts = [response_text(request.documents[i], "documents") for i in order]
    rows = zip(order, texts, strict=True)
    return {"results": [{"index": i, "document": {"text": t}, "relevance_score": values[i]} for i, t in rows]}


@dataclass(frozen=True)
class Endpoint:
    """One of vLLM's endpoints: `body` to `records`, their rewards to an `answer`."""

    path: str
    body: type[PoolingBody]
    records: Callable[[Any, QueryReader], list[dict]]
    answer: Callable[[Any, Sequence[float]], dict]

    def respond(self, request: PoolingBody, rewards: Sequence[float], *, model: str, num_tokens: int) -> dict:
        """The answer to a request, in what every vLLM answer carries."""
        return {
            "id": f"{self.path.strip('/')}-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
            **self.answer(request, list(map(sigmoid, rewards)) if request.use_activation else rewards),
        }


VLLM = (
    Endpoint("/classify", InputRequest, input_records, classify_answer),
    Endpoint("/pooling", InputRequest, input_records, pooling_answer),
    Endpoint("/score", ScoreRequest, score_records, score_answer),
    Endpoint("/rerank", RerankRequest, rerank_records, rerank_answer),
)


def sigmoid(reward: float) -> float:
    """1 / (1 + exp(-reward)), without overflow."""
    small = math.exp(-abs(reward))
    return (1 if reward >= 0 else small) / (1 + small)
