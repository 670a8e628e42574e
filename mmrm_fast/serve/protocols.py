"""The field's reward protocols over HTTP: OpenRLHF's and vLLM's requests to records, rewards to their answers.

Everything that a request asks for becomes records (`prompt` as chat messages, `responses`), so that the server reads,
checks and scores them as files are.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from scipy.special import expit

from mmrm_fast.data.messages import MESSAGE_EXTRAS
from mmrm_fast.data.prompt import IMAGE
from mmrm_fast.data.types import FieldError
from mmrm_fast.files import json_lines
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
    Pictures are in `images`, or in a label, as an object or its JSON, `{"images": ["cat.png"]}`, or as an indexed id.
    """

    query: Texts
    prompts: Annotated[list[str | Messages], Field(**BOUNDED)] | None = None
    labels: list[Any] | None = None
    images: Annotated[list[Annotated[list[str], Field(**BOUNDED)]], Field(**BOUNDED)] | None = None

    def with_indexed(self, index: Mapping[str, dict]) -> "RewardRequest":
        """The request with what an index says in place of labels that it has."""
        labels = self.labels and [index.get(own, own) if isinstance(own, str) else own for own in self.labels]
        return self.model_copy(update={"labels": labels})

    def records(self, reader: ConversationReader) -> list[dict]:
        """One record a query. Raises `FieldError`."""
        records, absent = [], [None] * len(self.query)
        for name in ("prompts", "labels", "images"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.query):
                raise FieldError(name, f"has {len(values)} entries for {len(self.query)} queries")
        images = self.images or map(label_images, self.labels or absent)
        for query, prompt, own in zip(self.query, self.prompts or absent, images, strict=True):
            if isinstance(prompt, list):
                turns, response = [turn.as_json() for turn in prompt], without_end(query, reader.closing)
            else:
                turns, response = reader.read(query, prompt)
            records.append({"prompt": with_pictures(turns, own), "images": own, "responses": [response]})
        return records


class PoolingBody(Body):
    """What vLLM's requests have in common.

    Rewards are given raw, as vLLM does for models of `problem_type: regression`, unless the sigmoid is asked for.
    """

    model: str | None = None
    encoding_format: Literal["float"] = "float"
    use_activation: bool | None = Field(None, validation_alias=AliasChoices("use_activation", "activation"))

    def answer(self, items: list[dict]) -> dict:
        """The answer that has an item a reward."""
        return {"data": items}


class InputRequest(PoolingBody):
    """vLLM's /classify and /pooling: `input`, whole templated texts, or `messages`, the last of them the response."""

    input: str | Texts | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=2, **BOUNDED)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(**BOUNDED)] | None = None
    """What the messages may call."""

    def records(self, reader: ConversationReader) -> list[dict]:
        """One record an input. Raises `FieldError`."""
        if (self.input is None) == (self.messages is None):
            raise FieldError("input", "send either `input` or `messages`")
        if self.messages is not None:
            *turns, last = self.messages
            if last.role != "assistant":
                raise FieldError("messages", "the last message must be the assistant's: it is what gets the reward")
            prompt = [turn.as_json() for turn in turns]
            return [{"prompt": prompt, "responses": [last.as_json()], "tools": self.tools}]
        if self.tools is not None:
            raise FieldError("tools", "go with `messages`; a text of `input` has them in it already")
        queries = map(reader.read, [self.input] if isinstance(self.input, str) else self.input)
        return [{"prompt": with_pictures(prompt, ()), "responses": [response]} for prompt, response in queries]


class ScoreRequest(PoolingBody):
    """vLLM's /score: a query is a prompt, a document a response; one query to all documents, or one each."""

    queries: Text | TextList = Field(validation_alias=AliasChoices("queries", "text_1"))
    documents: Text | TextList = Field(validation_alias=AliasChoices("documents", "text_2"))

    def records(self, reader: ConversationReader) -> list[dict]:
        """One record for one query, or one a pair of query and document. Raises `FieldError`."""
        queries = self.queries if isinstance(self.queries, list) else [self.queries]
        responses = responses_of(self.documents if isinstance(self.documents, list) else [self.documents])
        if len(queries) == 1:
            return [{"prompt": user(queries[0]), "responses": responses}]
        if len(queries) != len(responses):
            raise FieldError("documents", f"{len(responses)} for {len(queries)} queries; send one query, or one each")
        pairs = zip(queries, responses, strict=True)
        return [{"prompt": user(query), "responses": [response]} for query, response in pairs]


class RerankRequest(PoolingBody):
    """vLLM's /rerank: the documents, responses to the query, best first."""

    query: Text
    documents: TextList
    top_n: Annotated[int, Field(ge=0)] = 0

    def records(self, reader: ConversationReader) -> list[dict]:
        """One record. Raises `FieldError`."""
        return [{"prompt": user(self.query), "responses": responses_of(self.documents)}]

    def answer(self, items: list[dict]) -> dict:
        documents = zip(items, responses_of(self.documents), strict=True)
        results = [{**item, "document": {"text": text}} for item, text in documents]
        return {"results": sorted(results, key=lambda item: -item["relevance_score"])[: self.top_n or None]}


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
    return [{"role": "user", "content": plain(text if isinstance(text, str) else text.content)}]


def plain(content: Content) -> str | list[dict]:
    return content if isinstance(content, str) else [part.model_dump() for part in content]


def responses_of(documents: list[Text]) -> list[str]:
    """The responses, which are text alone. Raises `FieldError`."""
    contents = [document if isinstance(document, str) else document.content for document in documents]
    if any(isinstance(part, ImagePart) for content in contents if isinstance(content, list) for part in content):
        raise FieldError("documents", "a response is text; images belong to the prompt")
    return [own if isinstance(own, str) else "".join(part.text for part in own) for own in contents]


def label_images(label: Any) -> list:
    """The pictures that OpenRLHF's label of a prompt names, the only thing that its client sends beside texts."""
    if isinstance(label, str) and label.startswith("{"):
        with suppress(ValueError, RecursionError):
            label = json.loads(label)
    images = label.get("images") if isinstance(label, dict) else None
    return images or []


def read_index(path: Path | None) -> dict[str, dict]:
    """What each id of an image index stands for. Raises `ValueError` naming the line that is no id with its images."""
    index: dict[str, dict] = {}
    for source, row in json_lines(path) if path else ():
        identity, images = row.get("id"), row.get("images")
        if not isinstance(identity, (str, int)) or not isinstance(images, list) or str(identity) in index:
            raise ValueError(f"{source}: expected a new `id` and a list of `images`")
        index[str(identity)] = {"images": images}
    return index


def with_pictures(turns: list[dict], images: Sequence) -> list[dict]:
    """The turns. Raises `FieldError` where they show pictures that were not sent."""
    shown = sum(turn["content"].count(IMAGE) for turn in turns if isinstance(turn["content"], str))
    if shown and not images:
        raise FieldError("images", f"the text shows {shown} pictures and none was sent: {REMEDY}")
    return turns


def reward_answer(rewards: Sequence[float], truncated: Sequence[bool]) -> dict:
    """OpenRLHF: raw rewards, their sigmoid as scores, and which responses were cut to the maximum length."""
    logs = {"truncated": [float(cut) for cut in truncated]}
    return {"rewards": list(rewards), "scores": expit(rewards).tolist(), "extra_logs": logs}


@dataclass(frozen=True)
class Endpoint:
    """One of vLLM's endpoints: what it takes, what its answer says, and what that has for a reward."""

    paths: tuple[str, ...]
    body: type[PoolingBody]
    says: str
    item: Callable[[float], dict]

    def respond(self, request: PoolingBody, rewards: Sequence[float], *, model: str, num_tokens: int) -> dict:
        """The answer to a request, in what every vLLM answer carries."""
        values = expit(rewards).tolist() if request.use_activation else rewards
        return {
            "id": f"{self.paths[0].rpartition('/')[2]}-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
            **request.answer([{"index": i, **self.item(value)} for i, value in enumerate(values)]),
        }


VLLM = (
    Endpoint(
        ("/classify", "/v1/classify"), InputRequest,
        "The reward of each input as the one class's `probs`; raw unless `use_activation` asks for the sigmoid.",
        lambda value: {"label": "LABEL_0", "probs": [value], "num_classes": 1},
    ),
    Endpoint(
        ("/pooling",), InputRequest, "The reward of each input as a vector of one.",
        lambda value: {"object": "pooling", "data": [value]},
    ),
    Endpoint(
        ("/v1/embeddings",), InputRequest, "The reward of each input as SGLang gives it: an embedding of one.",
        lambda value: {"object": "embedding", "embedding": [value]},
    ),
    Endpoint(
        ("/score", "/v1/score"), ScoreRequest, "The reward of each document as a response to its query.",
        lambda value: {"object": "score", "score": value},
    ),
    Endpoint(
        ("/rerank", "/v1/rerank", "/v2/rerank"), RerankRequest,
        "Best-of-N: the documents as responses to the query, best first, `top_n` of them (0: all); ties as they came.",
        lambda value: {"relevance_score": value},
    ),
)  # fmt: skip
