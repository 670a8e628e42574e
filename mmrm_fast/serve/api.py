"""The HTTP API around one scorer: OpenRLHF's and vLLM's reward endpoints, a page, health and metrics."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from mmrm_fast import __version__
from mmrm_fast.data.images import ImageError, image_size
from mmrm_fast.data.records import Group, RecordError, parse_group
from mmrm_fast.data.samples import Sample
from mmrm_fast.data.types import FieldError, RewardError
from mmrm_fast.score.scorer import Scorer, join
from mmrm_fast.serve import protocols
from mmrm_fast.serve.batcher import Batcher
from mmrm_fast.serve.conversation import ConversationReader
from mmrm_fast.serve.guard import Guard, Limits, Refused, refusal
from mmrm_fast.serve.metrics import Metrics

CHARACTERS_PER_TOKEN = 8  # more text than this a token is not even tokenised
PAGE_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REFUSALS = {status: {"description": reason} for status, reason in {
    400: "Not JSON.", 401: "No token, or a wrong one.", 413: "The body is too large.",
    422: "A field is missing, of the wrong type, or over a limit.", 429: "Too many requests.",
    500: "The model failed, or gave no number.", 503: "No replica answered.", 504: "Too slow.",
}.items()}  # fmt: skip


class Answer(NamedTuple):
    """What came of a request's records, response by response."""

    rewards: list[float]
    truncated: list[bool]
    num_tokens: int  # of all sequences, as if nothing were shared


class RewardService:
    """Scores the records of requests, within limits, batched with those of other requests."""

    def __init__(
        self, scorer: Scorer, name: str, *, limits: Limits, image_root: Path | None = None, max_delay: float = 0.003
    ):
        self.scorer, self.name, self.limits, self.image_root = scorer, name, limits, image_root
        self.reader = ConversationReader(scorer.checkpoint.prompt_encoder().chat, scorer.checkpoint.tokenizer)
        self.metrics = Metrics()
        self.has_told = False  # of a reward that is no number
        self.batcher = Batcher(scorer, max_delay=max_delay, on_batch=self.metrics.count_batch)

    async def score(self, records: Sequence[dict]) -> Answer:
        """Score records as parsed JSON. Raises `RecordError`, `Refused`."""
        samples = await asyncio.to_thread(self.prepare, records)
        pieces = [self.scorer.split(sample) for sample in samples]
        outcomes = iter(await self.batcher.score([piece for parts in pieces for piece in parts]))
        joined = [
            join(sample.group, [next(outcomes) for _ in parts]) for sample, parts in zip(samples, pieces, strict=True)
        ]
        for outcome in joined:
            if isinstance(outcome, RecordError):
                raise outcome
        rewards = [reward for scored in joined for reward in scored.rewards]
        truncated = [cut for scored in joined for cut in scored.truncated]
        self.metrics.responses.inc(len(rewards))
        return Answer(rewards, truncated, sum(sample.num_tokens_unshared for sample in samples))

    def prepare(self, records: Sequence[dict]) -> list[Sample]:
        """Records to samples, everything checked that can be before the pixels are decoded."""
        groups = [
            parse_group(fields, source=f"record {i}", record=i, image_root=self.image_root, confined=True)
            for i, fields in enumerate(records)
        ]
        limits, tile = self.limits, self.scorer.checkpoint.tokens_per_tile
        require(sum(len(group.responses) for group in groups), limits.responses, "responses")
        require(sum(map(len_text, groups)), limits.tokens * CHARACTERS_PER_TOKEN, "characters of text")
        require(sum(len(group.images) for group in groups), limits.tokens // tile, "images")
        for group in groups:
            check_pixels(group, limits.pixels)
        samples = [self.scorer.encode(group) for group in groups]
        require(sum(map(self.scorer.cost, samples)), limits.tokens, "tokens of work")
        return samples

    async def no_reward(self, request: Request, error: RewardError) -> JSONResponse:
        """500 for a reward that is no number; the first one is logged, a broken model would fill the log."""
        if not self.has_told:
            logging.getLogger(__name__).error("%s: %s; more of these are not logged", request.url.path, error)
        self.has_told = True
        return refusal(500, str(error), error.field)


def require(number: int, limit: int, what: str) -> None:
    """Raise `Refused` where there are too many."""
    if number > limit:
        raise Refused(422, f"{number} {what} are over the limit of {limit}")


def len_text(group: Group) -> int:
    """Characters of a group; a turn is more than its text."""
    turns = [group.prompt] if isinstance(group.prompt, str) else [turn.content + turn.extra for turn in group.prompt]
    return sum(
        len(text) + CHARACTERS_PER_TOKEN for text in (*turns, *group.responses, *group.tools, *(group.extras or ()))
    )


def check_pixels(group: Group, limit: int) -> None:
    """Raise `RecordError` for an image whose header announces too many pixels, or that is none."""
    for image in group.images:
        try:
            width, height = image_size(image)
        except ImageError as error:
            raise RecordError(group.source, "image", str(error)) from None
        if width * height > limit:
            raise RecordError(group.source, "image", f"{width} x {height} pixels are over the limit of {limit}")


def make_app(service: RewardService, token: str | None = None) -> FastAPI:
    """The ASGI application of one replica."""
    app = FastAPI(title="mmrm_fast reward server", version=__version__, redoc_url=None)
    add_openrlhf(app, service)
    for endpoint in protocols.VLLM:
        add_vllm(app, service, endpoint)
    add_pages(app, service)
    app.add_exception_handler(RequestValidationError, invalid_request)
    app.add_exception_handler(HTTPException, http_error)
    for kind in (RecordError, FieldError):
        app.add_exception_handler(kind, invalid_record)
    app.add_exception_handler(RewardError, service.no_reward)
    paths = frozenset(route.path for route in app.routes)
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics, token=token, paths=paths)
    return app


def add_openrlhf(app: FastAPI, service: RewardService) -> None:
    """OpenRLHF's remote reward model."""

    @app.post("/get_reward", responses=REFUSALS, tags=["OpenRLHF"])
    async def get_reward(request: protocols.RewardRequest) -> dict:
        """Rewards of whole decoded queries, with `images` optionally."""
        answer = await service.score(await asyncio.to_thread(protocols.reward_records, request, service.reader))
        return protocols.reward_answer(answer.rewards, answer.truncated)


def add_vllm(app: FastAPI, service: RewardService, endpoint: protocols.Endpoint) -> None:
    """One of the pooling endpoints of vLLM and SGLang, under all of its paths."""

    async def respond(request: endpoint.body) -> dict:
        answer = await service.score(await asyncio.to_thread(endpoint.records, request, service.reader))
        return endpoint.respond(request, answer.rewards, model=service.name, num_tokens=answer.num_tokens)

    for path in endpoint.paths:
        app.post(path, responses=REFUSALS, tags=["vLLM"], description=endpoint.answer.__doc__)(respond)


def add_pages(app: FastAPI, service: RewardService) -> None:
    """The page, health and metrics."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict:
        """The model is loaded."""
        return {"status": "ready", "model": service.name}

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """422 for what does not fit the schema, without repeating what was sent; 400 for what is not JSON."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"][1:]))
    if first["type"] == "json_invalid":
        return refusal(400, f"not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    return refusal(422, f"{field}: {first['msg']}" if field else first["msg"], field or None)


async def invalid_record(request: Request, error: RecordError | FieldError) -> JSONResponse:
    """422 for a record that cannot be scored."""
    return refusal(422, str(error), error.field or None)


async def http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What the framework refuses: no such path, no such method, an unreadable body."""
    response = refusal(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response
