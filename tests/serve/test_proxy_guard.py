"""What a client gets from Ray's proxy where no replica answers: our JSON, whatever Ray would have said."""

import asyncio

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from mmrm_fast.serve import guard
from mmrm_fast.serve.guard import ProxyGuard


def ask(app, path="/score", body=b""):
    """The answer of an ASGI app behind the middleware."""

    async def get():
        transport = httpx.ASGITransport(ProxyGuard(app, max_body=100))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=body)

    return asyncio.run(get())


async def silent(scope, receive, send):
    """Ray, when the replica that had the request died."""


async def waiting(scope, receive, send):
    """Ray, while no replica is ready."""
    await asyncio.Event().wait()


async def reading(scope, receive, send):
    """Ray, which takes a body in before it has a replica for it, and drops it when the client is gone."""
    while (message := await receive())["type"] != "http.disconnect" and message["more_body"]:
        pass
    gone = message["type"] == "http.disconnect"
    await PlainTextResponse("cancelled" if gone else "taken", 499 if gone else 200)(scope, receive, send)


def test_a_body_is_cut_off_at_the_limit_before_any_replica_has_it():
    async def chunks(count):
        for _ in range(count):
            yield b"x" * 50

    assert ask(reading, body=chunks(2)).text == "taken"
    answer = ask(reading, body=chunks(1000))
    assert answer.status_code == 413 and "over 100 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("app", "status", "reason"),
    [
        (silent, 503, "no replica answered"),
        (PlainTextResponse("Request dropped due to backpressure", 503), 503, "all busy"),
        (PlainTextResponse("Path '/score' not found.", 404), 503, "none is ready"),
        (PlainTextResponse("Request timed out", 408), 504, "in time"),
    ],
    ids=["a dead replica", "a full queue", "no application", "a time limit"],
)
def test_ray_s_own_refusals_become_json(app, status, reason):
    answer = ask(app)
    assert answer.status_code == answer.json()["error"]["code"] == status
    assert reason in answer.json()["error"]["message"]
    assert ("retry-after" in answer.headers) == (status == 503)


@pytest.mark.parametrize(
    "response", [JSONResponse({"a": 1}), JSONResponse({"error": {}}, 404), PlainTextResponse("metrics")]
)
def test_a_replica_s_answer_is_passed_on_as_it_is(response):
    answer = ask(response)
    assert (answer.status_code, answer.content) == (response.status_code, response.body)


def test_a_probe_does_not_wait_for_a_replica(monkeypatch):
    monkeypatch.setattr(guard, "PROBE_SECONDS", 0.01)
    assert ask(waiting, "/readyz").status_code == 503
