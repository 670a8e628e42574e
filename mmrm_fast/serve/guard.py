"""What stands between the network and the API: who may ask, how much, how long; one JSON reason for every refusal."""

import asyncio
import hmac
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess, values
from starlette.datastructures import Headers

from mmrm_fast.data.packing import PackedBatch
from mmrm_fast.serve.refusals import Refused, refusal

OPEN_PATHS = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")
BODIES_IN_FLIGHT = 8  # full-size bodies that all requests together may hold in memory


@dataclass(frozen=True)
class Limits:
    """Bounds of one replica. Sizes in bytes, times in seconds."""

    body: int = 32 << 20
    requests: int = 256  # in flight: read, waiting or being scored
    seconds: float = 60.0  # of a request, from its first byte to its answer
    responses: int = 1024  # of a request
    tokens: int = 65_536  # work of a request, in tokens after sharing
    pixels: int = 50_000_000  # of an image


class Metrics:
    """Prometheus metrics; with `PROMETHEUS_MULTIPROC_DIR` they are those of all replicas on the machine."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "mmrm"}
        self.requests = Counter("requests", "Requests by path and status.", ("path", "status"), **own)
        self.seconds = Histogram("request_seconds", "Time from request to answer.", ("path",), **own)
        self.in_flight = Gauge("requests_in_flight", "Requests at work.", multiprocess_mode="livesum", **own)
        self.responses = Counter("responses", "Responses that got a reward.", **own)
        self.tokens = Counter("tokens", "Tokens that went through the model.", **own)
        self.tokens_unshared = Counter("tokens_unshared", "Tokens as if no prefix were shared.", **own)
        self.batches = Counter("batches", "Forwards of the model.", **own)

    def count_batch(self, batch: PackedBatch) -> None:
        """Count one forward."""
        self.batches.inc()
        self.tokens.inc(len(batch.main.source_T))
        self.tokens_unshared.inc(batch.main.num_tokens_unshared)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        registry = self.registry
        if values.ValueClass is not values.MutexValue:
            registry = CollectorRegistry()
            forget_dead(os.environ["PROMETHEUS_MULTIPROC_DIR"])
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


def forget_dead(folder: str) -> None:
    """Drop the gauges of replicas that were killed: what they had at work is no longer."""
    for path in Path(folder).glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            multiprocess.mark_process_dead(pid, folder)


class Guard:
    """ASGI middleware: token, requests in flight, size and time of a body, before anything parses it.

    A body is counted while it arrives and refused at the first byte over the limit.

    Args:
        app: what answers the requests that pass.
        token: what `Authorization: Bearer` must carry, None for no token.
        paths: paths that metrics name; any other is "other".
    """

    def __init__(self, app: Callable, *, limits: Limits, metrics: Metrics, token: str | None, paths: frozenset[str]):
        self.app, self.limits, self.metrics, self.token, self.paths = app, limits, metrics, token, paths
        self.num_requests = self.num_bytes = 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"
        started, status = time.perf_counter(), 500

        async def send_noting_status(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.answer(scope, receive, send_noting_status)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def answer(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Let the request through, or send the refusal."""
        try:
            if scope["path"] in OPEN_PATHS:
                return await self.app(scope, receive, send)
            self.check_token(Headers(scope=scope))
            await self.admit(scope, receive, send)
        except Refused as refused:
            await refusal(refused.status, refused.message, refused.field)(scope, receive, send)

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
        held = [0]
        try:
            await asyncio.wait_for(self.read_and_answer(scope, receive, send, held), self.limits.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refused(504, f"no answer within {self.limits.seconds:g} seconds") from None
        finally:
            self.num_bytes -= held[0]
            self.num_requests -= 1
            self.metrics.in_flight.dec()

    async def read_and_answer(self, scope: dict, receive: Callable, send: Callable, held: list[int]) -> None:
        """Read the body within its limits, then let the app answer."""
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self.limits.body:
            raise Refused(413, f"a body of {declared[:20]} bytes is over the limit of {self.limits.body}")
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk, more = message.get("body", b""), message.get("more_body", False)
            self.hold(len(chunk), len(body), held)
            body += chunk
        await self.app(scope, replay(bytes(body), receive), send)

    def hold(self, size: int, before: int, held: list[int]) -> None:
        """Account for `size` more bytes of a body. Raises `Refused` over a limit."""
        if before + size > self.limits.body:
            raise Refused(413, f"a body of over {self.limits.body} bytes is over the limit")
        if self.num_bytes + size > BODIES_IN_FLIGHT * self.limits.body:
            raise Refused(429, "too many large requests are waiting already; try again later")
        self.num_bytes += size
        held[0] += size


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
