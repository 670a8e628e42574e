"""What stands between the network and the API: who may ask, how much, how long; one JSON reason for every refusal.

`Guard` is in every replica, `ProxyGuard` in Ray's proxy before them; that process imports neither torch nor a model.
"""

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from mmrm_fast.serve.metrics import Metrics

OPEN_PATHS = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")
PROBES = ("/healthz", "/readyz")
PROBE_SECONDS = 5.0  # without a replica that is ready, Ray lets requests wait
BODIES_IN_FLIGHT = 8  # full-size bodies that all requests together may hold in memory
MAX_BODY = "MMRM_MAX_BODY"  # variable: bytes of a body, which Ray's proxy would hold before any replica counts them
RAYS_TIMEOUT = 408


@dataclass(frozen=True)
class Limits:
    """Bounds of one replica. Sizes in bytes, times in seconds."""

    body: int = 32 << 20
    requests: int = 256  # in flight: read, waiting or being scored
    seconds: float = 60.0  # of a request, from its first byte to its answer
    responses: int = 1024  # of a request
    tokens: int = 65_536  # work of a request, in tokens after sharing
    pixels: int = 50_000_000  # of an image


class Refused(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


def refusal(status: int, message: str, field: str | None = None) -> JSONResponse:
    """The JSON of a refusal, in the form that OpenAI's and vLLM's clients know."""
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
    message = message.encode(errors="replace").decode()  # what was sent may hold lone surrogates
    return JSONResponse({"error": {"code": status, "message": message, "param": field}}, status, headers)


class Guard:
    """ASGI middleware: token, requests in flight, size and time of a body, before anything parses it.

    A body is counted while it arrives and refused at the first byte over the limit. A fault of ours is logged, once.

    Args:
        app: what answers the requests that pass.
        token: what `Authorization: Bearer` must carry, None for no token.
        paths: paths that metrics name; any other is "other".
    """

    def __init__(self, app: Callable, *, limits: Limits, metrics: "Metrics", token: str | None, paths: frozenset[str]):
        self.app, self.limits, self.metrics, self.token, self.paths = app, limits, metrics, token, paths
        self.num_requests = self.num_bytes = 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"
        started, status = time.perf_counter(), None

        async def send_noting_status(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.answer(scope, receive, send_noting_status)
        except Refused as refused:
            await refusal(refused.status, refused.message, refused.field)(scope, receive, send_noting_status)
        except Exception:
            if status is not None:  # too late for another answer
                raise
            logging.getLogger(__name__).exception("%s failed", path)
            await refusal(500, "the server failed; its log says why")(scope, receive, send_noting_status)
        finally:
            self.metrics.requests.labels(path, str(status or 500)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def answer(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Let the request through. Raises `Refused`."""
        if scope["path"] in OPEN_PATHS:
            return await self.app(scope, receive, send)
        self.check_token(Headers(scope=scope))
        if scope["path"] == "/metrics":  # what a full server shows too
            return await self.app(scope, receive, send)
        await self.admit(scope, receive, send)

    def check_token(self, headers: Headers) -> None:
        """Raise `Refused` unless the request carries the token; the comparison takes the same time for any guess."""
        if self.token is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.token.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refused(401, "this server needs its token: send `Authorization: Bearer TOKEN`")

    async def admit(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer within the limits of requests and time."""
        if self.num_requests >= self.limits.requests:
            raise Refused(429, f"{self.limits.requests} requests are waiting already; try again later")
        self.num_requests += 1
        self.metrics.in_flight.inc()
        body = bytearray()
        try:
            await asyncio.wait_for(self.read_and_answer(scope, receive, send, body), self.limits.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refused(504, f"no answer within {self.limits.seconds:g} seconds") from None
        finally:
            self.num_bytes -= len(body)
            self.num_requests -= 1
            self.metrics.in_flight.dec()

    async def read_and_answer(self, scope: dict, receive: Callable, send: Callable, body: bytearray) -> None:
        """Read the body within its limits, then let the app answer."""
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self.limits.body:
            raise Refused(413, f"a body of {declared[:20]} bytes is over the limit of {self.limits.body}")
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk, more = message.get("body", b""), message.get("more_body", False)
            self.check_room(len(body) + len(chunk), len(chunk))
            self.num_bytes += len(chunk)
            body += chunk
        await self.app(scope, replay(bytes(body), receive), send)

    def check_room(self, size: int, more: int) -> None:
        """Raise `Refused` where a body of this size, or so many more bytes of all bodies, are over a limit."""
        if size > self.limits.body:
            raise Refused(413, f"a body of over {self.limits.body} bytes is over the limit")
        if self.num_bytes + more > BODIES_IN_FLIGHT * self.limits.body:
            raise Refused(429, "too many large requests are waiting already; try again later")


def replay(body: bytes, receive: Callable) -> Callable[[], Awaitable[dict]]:
    """An ASGI `receive` that gives a body already read, then what the client does next."""
    given = False

    async def receive_again() -> dict:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


class ProxyGuard:
    """ASGI middleware of Ray's proxy: where no replica answers, the client gets JSON and may ask again.

    Ray itself answers in plain text when its queue is full or no replica is there, and not at all when the replica
    that had the request dies. A body of over `max_body` bytes is cut off as a client that went away.
    """

    def __init__(self, app: Callable, max_body: int):
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, is_rays, size = None, False, 0

        async def receive_within_limit() -> dict:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message if size <= self.max_body else {"type": "http.disconnect"}

        async def send_unless_rays(message: dict) -> None:
            nonlocal status, is_rays
            if message["type"] == "http.response.start":
                status = message["status"]
                kind = Headers(raw=message["headers"]).get("content-type", "")
                is_rays = status >= 400 and not kind.startswith("application/json")
            if not is_rays:
                await send(message)

        try:
            limit = PROBE_SECONDS if scope["path"] in PROBES else None
            await asyncio.wait_for(self.app(scope, receive_within_limit, send_unless_rays), limit)
        except (TimeoutError, asyncio.TimeoutError):
            status = None
        if status is not None and not is_rays:
            return
        if size > self.max_body:
            refused = refusal(413, f"a body of over {self.max_body} bytes is over the limit")
        elif status is None:
            refused = refusal(503, "no replica answered: it ended, or none is ready yet; try again")
        elif status == RAYS_TIMEOUT:
            refused = refusal(504, "no replica answered in time; try again later")
        else:
            refused = refusal(503, "the replicas are all busy, or none is ready; try again later")
        await refused(scope, receive, send)


def proxy_middleware() -> list[Middleware]:
    """What Ray's proxy is told to load."""
    return [Middleware(ProxyGuard, max_body=int(os.environ[MAX_BODY]))]
