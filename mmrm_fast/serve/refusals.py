"""One JSON reason for every refusal: the API's own, and those of Ray's proxy in front of the replicas."""

import asyncio
import os
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

PROBES = ("/healthz", "/readyz")
PROBE_SECONDS = 5.0  # without a replica that is ready, Ray lets requests wait
RAYS_TIMEOUT = 408
MAX_BODY = "MMRM_MAX_BODY"  # variable: bytes of a body, which Ray's proxy would hold before any replica counts them


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


class ProxyRefusals:
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
        if size > self.max_body and (status is None or is_rays):
            await refusal(413, f"a body of over {self.max_body} bytes is over the limit")(scope, receive, send)
        elif status is None:
            await refusal(503, "no replica answered: it ended, or none is ready yet; try again")(scope, receive, send)
        elif is_rays and status == RAYS_TIMEOUT:
            await refusal(504, "no replica answered in time; try again later")(scope, receive, send)
        elif is_rays:
            await refusal(503, "the replicas are all busy, or none is ready; try again later")(scope, receive, send)


def proxy_middleware() -> list[Middleware]:
    """What Ray's proxy is told to load."""
    return [Middleware(ProxyRefusals, max_body=int(os.environ[MAX_BODY]))]
