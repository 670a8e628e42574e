"""What stands between the network and the API: who may ask, how much, how long; one JSON reason for every refusal."""

import asyncio
import hmac
import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from mmrm_fast.serve.metrics import Metrics

OPEN_PATHS = ("/", "/health", "/healthz", "/readyz")
UNCOUNTED_PATHS = ("/docs", "/openapi.json", "/metrics")  # what a full server shows too, to those with the token
CLIENT_GONE = 499  # nginx's number for a client that hung up; it gets no answer
SITE = 64  # bits of an IPv6 address that one client has for itself


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; of one replica for `requests` and `replica_pixels`. Sizes in bytes, times in seconds."""

    connections: int = 512  # open, from all clients
    head: int = 16 << 10  # the line and headers of a request
    head_seconds: float = 20.0  # until they are complete; also that a connection may idle or leave its answer unread
    body: int = 32 << 20
    bodies: int = 256 << 20  # in memory, of all requests
    body_rate: int = 16 << 10  # bytes a second that a body arrives at, at least, after the first seconds
    body_seconds: float = 5.0
    requests: int = 256  # whose bodies are complete: waiting or being scored
    seconds: float = 60.0  # of a request, from its first byte to its answer
    responses: int = 1024  # of a request
    tokens: int = 65_536  # work of a request, in tokens after sharing
    pixels: int = 50_000_000  # of an image
    request_pixels: int = 100_000_000  # of all images of a request
    replica_pixels: int = 1_000_000_000  # of all requests at work


class Refused(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(status, message, field)
        self.status, self.message, self.field = status, message, field


def refusal(status: int, message: str, field: str | None = None) -> JSONResponse:
    """The JSON of a refusal, in the form that OpenAI's and vLLM's clients know."""
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
    message = message.encode(errors="replace").decode()  # what was sent may hold lone surrogates
    return JSONResponse({"error": {"code": status, "message": message, "param": field}}, status, headers)


class Share:
    """So much of something for all clients, and half of it for one, so that nobody is kept out by another."""

    def __init__(self, whole: int):
        self.whole, self.held = whole, Counter()

    def take(self, client: str, amount: int = 1) -> bool:
        """Whether so much was left for this client; then it has it."""
        half = (self.whole + 1) // 2
        if self.held.total() + amount > self.whole or self.held[client] + amount > half:
            return False
        self.held[client] += amount
        return True

    def give(self, client: str, amount: int = 1) -> None:
        self.held[client] -= amount
        if not self.held[client]:
            del self.held[client]


def client_of(address: tuple | None) -> str:
    """Who a socket's peer is: its IPv4 address, or the network that an IPv6 address is of."""
    if not address:
        return ""
    host = ipaddress.ip_address(address[0].partition("%")[0])
    host = getattr(host, "ipv4_mapped", None) or host
    return str(ipaddress.ip_network((host, SITE), strict=False) if host.version == 6 else host)


class Exchange:
    """One request under way: its ASGI callables, its client, its body as far as it has come and what was answered."""

    def __init__(self, scope: dict, receive: Callable, send: Callable):
        self.scope, self.receive, self.raw_send = scope, receive, send
        self.headers, self.client = Headers(scope=scope), client_of(scope.get("client"))
        self.body, self.status = bytearray(), None

    async def send(self, message: dict) -> None:
        self.status = message.get("status", self.status)
        await self.raw_send(message)

    def replay(self) -> Callable[[], Awaitable[dict]]:
        """An ASGI `receive` that gives the body, then nothing more."""
        messages = [{"type": "http.request", "body": bytes(self.body), "more_body": False}]

        async def receive() -> dict:
            return messages.pop() if messages else await asyncio.Event().wait()

        return receive

    async def finish(self, answering: Coroutine) -> None:
        """Let the app answer; it is cancelled, and `Refused` raised, when the client hangs up before."""
        work, gone = asyncio.ensure_future(answering), asyncio.ensure_future(self.receive())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and self.status is None:
                raise Refused(CLIENT_GONE, "the client hung up")
            await work
        finally:
            gone.cancel()
            work.cancel()


class Guard:
    """ASGI middleware: host, token, size and rate of bodies, requests at work and their time, before any parsing.

    A body is counted while it arrives and refused at the first byte over the limit; it takes one of the places of
    requests only when it is complete. A fault of ours is logged, once.

    Args:
        app: what answers the requests that pass.
        token: what `Authorization: Bearer` must carry, None for no token.
        hosts: names that clients may know this machine by, beside `localhost` and any IP address.
        paths: paths that metrics name; any other is "other".
    """

    def __init__(
        self, app: Callable, *, limits: Limits, metrics: Metrics, token: str | None, hosts: Iterable[str],
        paths: frozenset[str],
    ):  # fmt: skip
        self.app, self.limits, self.metrics, self.token, self.paths = app, limits, metrics, token, paths
        self.hosts = frozenset({"localhost", *map(str.lower, hosts)})
        self.requests, self.bodies = Share(limits.requests), Share(limits.bodies)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"
        started, exchange = time.perf_counter(), Exchange(scope, receive, send)
        try:
            await self.answer(exchange)
        except Refused as refused:
            if refused.status == CLIENT_GONE or exchange.status is not None:  # nobody to tell, or too late to
                exchange.status = refused.status
            else:
                answer = refusal(refused.status, refused.message, refused.field)
                await answer(scope, receive, exchange.send)
        except Exception:
            if exchange.status is not None:
                raise
            logging.getLogger(__name__).exception("%s failed", path)
            await refusal(500, "the server failed; its log says why")(scope, receive, exchange.send)
        finally:
            self.metrics.requests.labels(path, str(exchange.status or 500)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def answer(self, exchange: Exchange) -> None:
        path = exchange.scope["path"]
        if sum(len(name) + len(value) for name, value in exchange.scope["headers"]) > self.limits.head:
            raise Refused(400, f"headers of over {self.limits.head} bytes")
        self.check_host(exchange.headers.get("host", ""))
        if path not in OPEN_PATHS:
            self.check_token(exchange.headers)
        if path in OPEN_PATHS or path in UNCOUNTED_PATHS:
            return await self.app(exchange.scope, exchange.receive, exchange.send)
        try:
            await asyncio.wait_for(self.admit(exchange), self.limits.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refused(504, f"no answer within {self.limits.seconds:g} seconds") from None
        finally:
            self.bodies.give(exchange.client, len(exchange.body))

    def check_host(self, host: str) -> None:
        """Raise `Refused` for a name that is not ours: a page of that name would read our answers in a browser.

        Such a page has a name that its owner lets point to this machine (DNS rebinding), never an IP address.
        """
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            if name not in self.hosts:
                raise Refused(421, "this server does not go by that name; see --allowed-host", "host") from None

    def check_token(self, headers: Headers) -> None:
        """Raise `Refused` unless the request carries the token; the comparison takes the same time for any guess."""
        if self.token is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.token.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refused(401, "this server needs its token: send `Authorization: Bearer TOKEN`")

    async def admit(self, exchange: Exchange) -> None:
        """Take the body in, then let the app answer while there is place for the request."""
        await self.read(exchange)
        if not self.requests.take(exchange.client):
            limit = self.limits.requests
            raise Refused(429, f"{limit} requests, or half as many of one address, are waiting; try again later")
        self.metrics.in_flight.inc()
        try:
            await exchange.finish(self.app(exchange.scope, exchange.replay(), exchange.send))
        finally:
            self.metrics.in_flight.dec()
            self.requests.give(exchange.client)

    async def read(self, exchange: Exchange) -> None:
        """Read the body within its limits of size and rate."""
        declared, body = exchange.headers.get("content-length", "0"), exchange.body
        if not declared.isdecimal() or int(declared) > self.limits.body:
            raise Refused(413, f"a body of {declared[:20]} bytes is over the limit of {self.limits.body}")
        started, more = time.monotonic(), True
        while more:
            patience = started + self.limits.body_seconds + len(body) / self.limits.body_rate - time.monotonic()
            try:
                message = await asyncio.wait_for(exchange.receive(), max(patience, 0))
            except (TimeoutError, asyncio.TimeoutError):
                raise Refused(408, f"a body of under {self.limits.body_rate} bytes a second") from None
            if message["type"] == "http.disconnect":
                raise Refused(CLIENT_GONE, "the client hung up")
            chunk, more = message.get("body", b""), message.get("more_body", False)
            if len(body) + len(chunk) > self.limits.body:
                raise Refused(413, f"a body of over {self.limits.body} bytes is over the limit")
            if not self.bodies.take(exchange.client, len(chunk)):
                raise Refused(429, "too many large requests are waiting already; try again later")
            body += chunk
