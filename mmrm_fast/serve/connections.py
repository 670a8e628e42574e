"""The HTTP server: uvicorn's, with limits on open connections and on how long each may keep us waiting."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmrm_fast.serve.guard import Limits, Share, client_of, refusal

CHECKS = 8  # a connection is looked at so often within the time that it may keep us waiting


class Connection(H11Protocol):
    """A connection that is closed where a request's head does not come, or its answer is not taken, in time.

    uvicorn bounds neither; what it idles between two requests is bounded so as well.
    """

    def __init__(self, share: Share, seconds: float, **options):
        super().__init__(**options)
        self.share, self.seconds, self.is_counted = share, seconds, False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.since, self.watching = self.loop.time(), None
        self.is_counted = self.share.take(client_of(self.client))
        if self.is_counted:
            self.watch()
        else:
            self.refuse(503, "too many connections are open; try again later")

    def refuse(self, status: int, reason: str) -> None:
        """Answer without a request, and close."""
        answer = refusal(status, reason)
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nconnection: close\r\n".encode()
        headers = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
        self.transport.write(head + headers + b"\r\n" + answer.body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, f"not an HTTP request, or its head is over {self.config.h11_max_incomplete_event_size} bytes")

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.is_counted:
            self.share.give(client_of(self.client))
        if self.watching is not None:
            self.watching.cancel()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def watch(self) -> None:
        """Cut it off where the client has kept us waiting for too long."""
        done = self.cycle is None or self.cycle.response_complete or self.transport.is_closing()
        if (done or self.flow.write_paused) and self.loop.time() - self.since > self.seconds:
            return self.transport.abort()
        self.watching = self.loop.call_later(self.seconds / CHECKS, self.watch)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening. Raises `ValueError` where that cannot be."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}; choose others") from None
    return bound


@contextmanager
def serving(app: Callable, bound: socket.socket, limits: Limits, on_end: Callable = lambda: None) -> Iterator[None]:
    """Serve an app on a bound socket, from a thread; at the end, requests under way are answered first.

    `on_end` is called when the server ends, whatever ended it.
    """
    config = uvicorn.Config(
        app,
        http=partial(Connection, Share(limits.connections), limits.head_seconds),
        ws="none",
        h11_max_incomplete_event_size=limits.head,
        timeout_keep_alive=limits.head_seconds,
        timeout_graceful_shutdown=limits.seconds,
        proxy_headers=False,  # they would let a client choose its address
        server_header=False,
        access_log=False,
        log_config=None,
        log_level="critical",  # what Guard has not logged is what clients did
    )
    server = uvicorn.Server(config)

    def run() -> None:
        try:
            server.run(sockets=[bound])
        finally:
            on_end()

    thread = threading.Thread(target=run, name="http")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
