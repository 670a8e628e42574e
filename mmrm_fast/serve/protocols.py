"""The field's reward protocols over HTTP: OpenRLHF's and vLLM's requests to records, rewards to their answers.

Everything that a request asks for becomes records (`prompt` as chat messages, `responses`), so that the server reads,
checks and scores them as files are.
"""

import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from mmrm_fast.data.messages import MESSAGE_EXTRAS
from mmrm_fast.data.prompt import IMAGE
from mmrm_fast.data.types import FieldError
from mmrm_fast.serve.conversation import ConversationReader, without_end

# What clients of other servers send that changes no reward here; any other unknown field is refused.
HARMLESS = {"user", "request_id", "priority", "cache_salt", "detail", "cache_control", "add_special_tokens"}
REMEDY = "send messages with image parts, or /get_reward with `images` or `labels` that name them"
BOUNDED = {"max_length": 1 << 16, "fail_fast": True}  # of lists: an error an item would be much more than the body


class Body(BaseModel):
    """Types are strict; a field that is not known could change what is meant, and is refused unless it is null."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_harmless(cls, fields: Any) -> Any:
        """The fields without nulls that are not known and without `HARMLESS` ones."""
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if name in cls.model_fields or (value is not None and name not in HARMLESS)
        }


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
    """OpenAI's message; what a model called is JSON text there, and becomes an object as chat templates take it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(**BOUNDED)] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def as_json(self) -> dict:
        """The message as a record has it."""
        extra = {name: getattr(self, name) for name in MESSAGE_EXTRAS if getattr(self, name) is not None}
        extra |= {"tool_calls": [*map(with_object, self.tool_calls)]} if self.tool_calls else {}
        return {"role": self.role, "content": None if self.content is None else plain(self.content), **extra}


Messages = Annotated[list[ChatMessage], Field(min_length=1, **BOUNDED)]


class Parts(Body):
    content: Content


Text = str | Parts
TextList = Annotated[list[Text], Field(min_length=1, **BOUNDED)]
Texts = Annotated[list[str], Field(min_length=1, **BOUNDED)]


class RewardRequest(Body):
    """OpenRLHF: `query` is the whole decoded prompt + response, special tokens included.

    A prompt of `prompts` is the text that its query begins with, or messages; then the query is the response alone.
    Pictures are in `images`, or in a label, as an object or its JSON: `{"images": ["cat.png"]}`.
    """

    query: Texts
    prompts: Annotated[list[str | Messages], Field(**BOUNDED)] | None = None
    labels: list[Any] | None = None
    images: Annotated[list[Annotated[list[str], Field(**BOUNDED)]], Field(**BOUNDED)] | None = None


class PoolingBody(Body):
    """What vLLM's requests have in common.

    Rewards are given raw, as vLLM does for models of `problem_type: regression`, unless the sigmoid is asked for.
    """

    model: str | None = None
    encoding_format: Literal["float"] = "float"
    use_activation: bool | None = Field(None, validation_alias=AliasChoices("use_activation", "activation"))


class InputRequest(PoolingBody):
    """vLLM's /classify and /pooling: `input`, whole templated texts, or `messages`, the last of them the response."""

    input: str | Texts | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=2, **BOUNDED)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(**BOUNDED)] | None = None
    """What the messages may call."""


class ScoreRequest(PoolingBody):
    """vLLM's /score: a query is a prompt, a document a response; one query to all documents, or one each."""

    queries: Text | TextList = Field(validation_alias=AliasChoices("queries", "text_1"))
    documents: Text | TextList = Field(validation_alias=AliasChoices("documents", "text_2"))


class RerankRequest(PoolingBody):
    """vLLM's /rerank: the documents, responses to the query, best first."""

    query: Text
    documents: TextList
    top_n: Annotated[int, Field(ge=0)] = 0


def with_object(call: dict) -> dict:
    """A call with its arguments as the object that their JSON is."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError) as error:
        raise FieldError("messages", f"the arguments of a call are not JSON ({error})") from None


def user(text: Text) -> list[dict]:
    """One user turn."""
    return [{"role": "user", "content": plain(content_of(text))}]


def plain(content: Content) -> str | list[dict]:
    """Content as JSON."""
    return content if isinstance(content, str) else [part.model_dump() for part in content]


def content_of(text: Text) -> Content:
    return text if isinstance(text, str) else text.content


def response_text(text: Text, field: str) -> str:
    """A response, which is text alone. Raises `FieldError`."""
    content = content_of(text)
    if isinstance(content, str):
        return content
    if any(isinstance(part, ImagePart) for part in content):
        raise FieldError(field, "a response is text; images belong to the prompt")
    return "".join(part.text for part in content)


def reward_records(request: RewardRequest, reader: ConversationReader) -> list[dict]:
    """One record a query. Raises `FieldError`."""
    count = len(request.query)
    for name in ("prompts", "labels", "images"):
        values = getattr(request, name)
        if values is not None and len(values) != count:
            raise FieldError(name, f"has {len(values)} entries for {count} queries")
    records = []
    for i, query in enumerate(request.query):
        turns, response = read_query(query, request.prompts[i] if request.prompts else None, reader)
        images = request.images[i] if request.images else label_images(request.labels[i] if request.labels else None)
        records.append({"prompt": with_pictures(turns, images), "images": images, "responses": [response]})
    return records


def label_images(label: Any) -> list:
    """The pictures that OpenRLHF's label of a prompt names, the only thing that its client sends beside texts."""
    if isinstance(label, str) and label.startswith("{"):
        with suppress(ValueError, RecursionError):
            label = json.loads(label)
    images = label.get("images") if isinstance(label, dict) else None
    return images or []


def with_pictures(turns: list[dict], images: Sequence) -> list[dict]:
    """The turns. Raises `FieldError` where they show pictures that were not sent."""
    shown = sum(turn["content"].count(IMAGE) for turn in turns if isinstance(turn["content"], str))
    if shown and not images:
        raise FieldError("images", f"the text shows {shown} pictures and none was sent: {REMEDY}")
    return turns


def read_query(query: str, prompt: str | list[ChatMessage] | None, reader: ConversationReader) -> tuple[list, str]:
    """(prompt as messages, response). Raises `FieldError`."""
    if isinstance(prompt, list):
        return [turn.as_json() for turn in prompt], without_end(query, reader.closing)
    return reader.read(query, prompt)


def input_records(request: InputRequest, reader: ConversationReader) -> list[dict]:
    """One record an input. Raises `FieldError`."""
    if (request.input is None) == (request.messages is None):
        raise FieldError("input", "send either `input` or `messages`")
    if request.messages is not None:
        *turns, last = request.messages
        if last.role != "assistant":
            raise FieldError("messages", "the last message must be the assistant's: it is what gets the reward")
        prompt = [turn.as_json() for turn in turns]
        return [{"prompt": prompt, "responses": [last.as_json()], "tools": request.tools}]
    if request.tools is not None:
        raise FieldError("tools", "go with `messages`; a text of `input` has them in it already")
    queries = map(reader.read, [request.input] if isinstance(request.input, str) else request.input)
    return [{"prompt": with_pictures(prompt, ()), "responses": [response]} for prompt, response in queries]


def score_records(request: ScoreRequest, reader: ConversationReader) -> list[dict]:
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


def rerank_records(request: RerankRequest, reader: ConversationReader) -> list[dict]:
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


def embeddings_answer(request: InputRequest, values: Sequence[float]) -> dict:
    """The reward of each input as SGLang gives it: an embedding of one."""
    return {"data": [{"index": i, "object": "embedding", "embedding": [value]} for i, value in enumerate(values)]}


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

    paths: tuple[str, ...]
    body: type[PoolingBody]
    records: Callable[[Any, ConversationReader], list[dict]]
    answer: Callable[[Any, Sequence[float]], dict]

    def respond(self, request: PoolingBody, rewards: Sequence[float], *, model: str, num_tokens: int) -> dict:
        """The answer to a request, in what every vLLM answer carries."""
        return {
            "id": f"{self.paths[0].rpartition('/')[2]}-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
            **self.answer(request, list(map(sigmoid, rewards)) if request.use_activation else rewards),
        }


VLLM = (
    Endpoint(("/classify", "/v1/classify"), InputRequest, input_records, classify_answer),
    Endpoint(("/pooling",), InputRequest, input_records, pooling_answer),
    Endpoint(("/v1/embeddings",), InputRequest, input_records, embeddings_answer),
    Endpoint(("/score", "/v1/score"), ScoreRequest, score_records, score_answer),
    Endpoint(("/rerank", "/v1/rerank", "/v2/rerank"), RerankRequest, rerank_records, rerank_answer),
)


def sigmoid(reward: float) -> float:
    """1 / (1 + exp(-reward)), without overflow."""
    small = math.exp(-abs(reward))
    return (1 if reward >= 0 else small) / (1 + small)
