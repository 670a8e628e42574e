"""The HTTP API: OpenRLHF's and vLLM's reward endpoints, a page, the API's description, health and metrics."""

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from jinja2 import Template
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from mmrm_fast import __version__
from mmrm_fast.data.types import FieldError
from mmrm_fast.files import ASSETS
from mmrm_fast.serve import protocols
from mmrm_fast.serve.conversation import ConversationReader
from mmrm_fast.serve.guard import Guard, Limits, Refused, client_of, refusal
from mmrm_fast.serve.metrics import Metrics
from mmrm_fast.serve.service import Answer

PAGE_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
REFUSALS = {status: {"description": reason} for status, reason in {
    400: "Not JSON.", 401: "No token, or a wrong one.", 408: "The body came too slowly.",
    413: "The body is too large.", 421: "Not a name of this server.",
    422: "A field is missing, of the wrong type, or over a limit.", 429: "Too many requests.",
    500: "The model failed, or gave no number.", 503: "No replica answered.", 504: "Too slow.",
}.items()}  # fmt: skip


class Replicas(Protocol):
    """Copies of a model, wherever they run."""

    async def score(self, records: list[dict], client: str) -> Answer | Refused:
        """Rewards of records, or why there are none; a cancelled call's work is dropped."""

    async def ready(self) -> Refused | None:
        """None where one of them is ready."""


class Front:
    """What stands between HTTP and the replicas: requests become records, answers are counted."""

    def __init__(self, replicas: Replicas, reader: ConversationReader, name: str, index: Mapping[str, dict]):
        self.replicas, self.reader, self.name, self.index, self.metrics = replicas, reader, name, index, Metrics()

    async def score(self, body: protocols.RewardRequest | protocols.PoolingBody, request: Request) -> Answer:
        """The answer to a request's records. Raises `Refused` and `FieldError`."""
        records = await asyncio.to_thread(body.records, self.reader)
        answer = await self.replicas.score(records, client_of(request.scope.get("client")))
        if isinstance(answer, Refused):
            raise answer
        self.metrics.count(answer.work)
        return answer


def make_app(
    front: Front, *, limits: Limits | None = None, token: str | None = None, hosts: Iterable[str] = ()
) -> FastAPI:
    app = FastAPI(title="mmrm_fast reward server", version=__version__, docs_url=None, redoc_url=None)
    add_scoring(app, front)
    add_pages(app, front)
    for error in (Refused, FieldError, HTTPException, RequestValidationError):
        app.add_exception_handler(error, refused)
    paths = frozenset(route.path for route in app.routes)
    app.add_middleware(Guard, limits=limits or Limits(), metrics=front.metrics, token=token, hosts=hosts, paths=paths)
    return app


def add_scoring(app: FastAPI, front: Front) -> None:
    """OpenRLHF's remote reward model, and the pooling endpoints of vLLM and SGLang under all of their paths."""

    @app.post("/get_reward", responses=REFUSALS, tags=["OpenRLHF"])
    async def get_reward(body: protocols.RewardRequest, request: Request) -> dict:
        """Rewards of whole decoded queries, with `images` optionally."""
        answer = await front.score(body.with_indexed(front.index), request)
        return protocols.reward_answer(answer.rewards, answer.truncated)

    def responder(endpoint: protocols.Endpoint) -> Callable:
        async def respond(body: endpoint.body, request: Request) -> dict:
            answer = await front.score(body, request)
            return endpoint.respond(body, answer.rewards, model=front.name, num_tokens=answer.num_tokens)

        return respond

    for endpoint in protocols.VLLM:
        for path in endpoint.paths:
            app.post(path, responses=REFUSALS, tags=["vLLM"], description=endpoint.says)(responder(endpoint))


def add_pages(app: FastAPI, front: Front) -> None:
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    schema = Template((ASSETS / "pages" / "api.html").read_text(encoding="utf-8"), autoescape=True)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return html(page, PAGE_POLICY)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return html(schema.render(app.openapi(), dumps=json.dumps), DOCS_POLICY)

    @app.get("/health", include_in_schema=False)  # vLLM's name
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict:
        """The model is loaded."""
        if refused := await front.replicas.ready():
            raise refused
        return {"status": "ready", "model": front.name}

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def html(content: str, policy: str) -> HTMLResponse:
    """A page that may load nothing from elsewhere."""
    return HTMLResponse(content, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})


async def refused(request: Request, error: Exception) -> JSONResponse:
    """Why there is no answer: as a replica or the framework says, 422 for what is no record or does not fit the schema.

    Nothing of what was sent is repeated.
    """
    if isinstance(error, Refused):
        return refusal(error.status, error.message, error.field)
    if isinstance(error, FieldError):
        return refusal(422, str(error), error.field or None)
    if isinstance(error, HTTPException):  # no such path, no such method, an unreadable body
        response = refusal(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response
    first = max(error.errors(), key=lambda own: len(own["loc"]))  # of alternatives the one that was meant
    field = ".".join(map(str, first["loc"][1:]))
    if first["type"] == "json_invalid":
        return refusal(400, f"not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    return refusal(422, f"{field}: {first['msg']}" if field else first["msg"], field or None)
