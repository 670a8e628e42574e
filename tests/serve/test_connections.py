"""Clients that hold what others need, connections, places, bytes, pixels, the model: each is bounded, others served.

What a client may keep us waiting for ends with an answer or the connection; what it has left is not computed.
"""

import asyncio
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from reward_server import data_url, picture, running
from runs import wait_until

from mmrm_fast.data.records import Group, RecordError
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.serve.batcher import AHEAD, Batcher, Waiting
from mmrm_fast.serve.command import RayReplicas
from mmrm_fast.serve.guard import Limits, client_of

LIMITS = Limits(connections=16, head_seconds=1.0, body_seconds=0.5, body_rate=1000, body=1 << 20, requests=4)
HEAD = b"POST /rerank HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
BODY = {"query": "a", "documents": ["b"]}
OTHER = "127.0.0.2"  # another client's address


@pytest.fixture(scope="module")
def url(scorer):
    with running(scorer, limits=LIMITS, hosts=["models.example"]) as url:
        yield url


@pytest.fixture(autouse=True)
def another_is_served(url):
    """Whatever one client does, another one's next request is answered."""
    yield
    assert ask(url, address=OTHER).status_code == 200


def ask(url, body=BODY, *, address="127.0.0.1", **options):
    """The answer to a request from an address of this machine."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=60) as client:
        return client.post(f"{url}/rerank", json=body, **options)


def connect(url, content=b""):
    """A connection that has sent something."""
    connection = socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=60)
    connection.sendall(content)
    return connection


def whole(body):
    """A request, to be sent on a connection that may be closed before its answer."""
    content = json.dumps(body).encode()
    return HEAD + b"content-length: %d\r\n\r\n" % len(content) + content


def rest(connection):
    """What comes until the server closes the connection."""
    received = b""
    with connection:
        try:
            while some := connection.recv(1 << 16):
                received += some
        except ConnectionError:
            pass
    return received


def metric(url, name):
    """A number of /metrics, 0 where it is not there."""
    found = re.search(rf"^mmrm_{re.escape(name)} (\S+)", httpx.get(f"{url}/metrics").text, flags=re.M)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("line", [b"x: ", b""], ids=["a header", "headers"])
def test_a_head_without_end_is_cut_off(url, line):
    connection = connect(url, HEAD)
    with pytest.raises(ConnectionError):  # at the latest when 64 MB of it were sent
        for _ in range(1024):
            connection.sendall(line + (b"a" * 65_533 if line else b"x: y\r\n" * 10_000))
    connection.close()


@pytest.mark.parametrize(
    "sent", [b"not HTTP\r\n\r\n", HEAD + b"x: " + b"a" * (20 << 10)], ids=["no HTTP", "a long head"]
)
def test_a_head_that_is_none_or_too_long_is_refused_with_a_reason(url, sent):
    answer = rest(connect(url, sent))
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n") and b"over 16384 bytes" in answer


def test_a_long_head_that_comes_at_once_is_refused_too(url):
    for path in ("/rerank", "/healthz"):
        answer = httpx.get(url + path, headers={"x": "a" * (17 << 10)})
        assert answer.status_code == 400 and "16384 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("sent", [b"", b"POST /re", HEAD], ids=["nothing", "half a line", "half a head"])
def test_a_head_that_does_not_come_in_time_ends_the_connection(url, sent):
    assert rest(connect(url, sent)) == b""


def test_answers_that_are_not_read_end_the_connection(url):
    connection = connect(url)
    with pytest.raises(ConnectionError):
        for _ in range(1 << 20):
            connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100)
    connection.close()


@pytest.mark.parametrize("framing", [b"content-length: 9999\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_bodies_that_come_too_slowly_are_refused_and_hold_no_place(url, framing):
    slow = [connect(url, HEAD + framing) for _ in range(6)]
    assert ask(url).status_code == 200
    assert all(rest(connection).startswith(b"HTTP/1.1 408 ") for connection in slow)


def test_one_address_has_half_of_the_connections(url):
    with ExitStack() as stack:
        held = [stack.enter_context(connect(url)) for _ in range(8)]
        assert rest(connect(url)).startswith(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n")
        assert ask(url, address=OTHER).status_code == 200
    assert held


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_client_is_its_address_or_its_network(address, client):
    assert client_of((address, 1)) == client


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:1", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("10.1.2.3", 200),
     ("models.example", 200), ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421),
     ("", 421), ("[localhost]", 200), ("user@localhost", 421)],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics"])
def test_a_name_that_is_not_ours_is_refused_as_it_may_be_a_page_s_in_a_browser(url, path, host, status):
    answer = httpx.get(url + path, headers={"host": host})
    assert answer.status_code == status
    if status == 421:
        assert "--allowed-host" in answer.json()["error"]["message"]


# work


class Gated:
    """A scorer whose forwards wait at a gate, and which notes what they were of."""

    def __init__(self, scorer):
        self.scorer, self.gate, self.prompts = scorer, threading.Event(), []

    def __getattr__(self, name):
        return getattr(self.scorer, name)

    def score_packed(self, packed):
        self.prompts += [sample.group.prompt for sample in packed.samples]
        assert self.gate.wait(60)
        return self.scorer.score_packed(packed)


@pytest.fixture
def gated(scorer):
    gated = Gated(scorer)
    yield gated
    gated.gate.set()


def test_the_work_of_a_client_that_hangs_up_is_not_done_and_counted_as_such(gated):
    with running(gated) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url)
        wait_until(lambda: gated.prompts, "no forward")
        with connect(url, whole({"query": "gone", "documents": ["two"]})):
            wait_until(lambda: metric(url, "requests_in_flight") == 2, "not in flight")
        wait_until(lambda: metric(url, 'requests_total{path="/rerank",status="499"}') == 1, "not counted")
        gated.gate.set()
        assert first.result().status_code == ask(url).status_code == 200
        assert (
            metric(url, "requests_in_flight") == 0 and metric(url, 'requests_total{path="/rerank",status="500"}') == 0
        )
    assert len(gated.prompts) == 2 and "gone" not in str(gated.prompts)


def test_pictures_of_a_client_that_is_gone_are_not_decoded_to_the_end(scorer):
    decoded = []

    class Preparer:
        def tiles(self, group):
            decoded.extend(group.images)
            if len(decoded) == 2:
                waiting.outcome.cancel()
            return []

    async def decode():
        nonlocal waiting
        waiting = Waiting(sample, asyncio.get_running_loop().create_future(), 1, 1)
        stub = type("Stub", (), {"preparer": Preparer(), "num_ahead": 0})
        with pytest.raises(RecordError, match="nobody waits"):
            Batcher(stub).tiles([waiting])

    waiting, sample = None, scorer.encode(Group("a", 0, None, "What?", None, (picture(),) * 5, ("two",)))
    asyncio.run(decode())
    assert len(decoded) == 2


def test_one_address_has_half_of_the_places_and_another_is_let_in(gated):
    with running(gated, limits=LIMITS) as url, ThreadPoolExecutor(4) as pool:
        own = [pool.submit(ask, url) for _ in range(3)]
        refused = wait_until(lambda: next((w.result() for w in own if w.done()), None), "none is refused")
        assert refused.status_code == 429 and "half as many of one address" in refused.json()["error"]["message"]
        other = pool.submit(ask, url, address=OTHER)
        wait_until(lambda: metric(url, "requests_in_flight") == 3, "the other is not let in")
        gated.gate.set()
        assert sorted([w.result().status_code for w in own]) == [200, 200, 429] and other.result().status_code == 200


def test_pixels_at_work_are_bounded_and_another_client_has_its_share(gated):
    limits = Limits(replica_pixels=4 * 120 * 60)
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture(i))}} for i in range(2)]
    body = {"query": {"content": parts}, "documents": ["b"]}
    with running(gated, limits=limits) as url, ThreadPoolExecutor(2) as pool:
        own = pool.submit(ask, url, body)
        wait_until(lambda: gated.prompts, "no forward")
        refused = ask(url, body)
        assert refused.status_code == 429 and "pixels" in refused.json()["error"]["message"]
        other = pool.submit(ask, url, body, address=OTHER)
        wait_until(lambda: metric(url, "requests_in_flight") == 2, "the other is not let in")
        gated.gate.set()
        assert own.result().status_code == other.result().status_code == ask(url, body).status_code == 200


def test_a_line_overtakes_what_large_requests_have_waiting(gated):
    large = [
        Group(f"{i}", i, None, f"large {i}", None, (), tuple(f"two red {i} {j}" for j in range(40))) for i in range(20)
    ]

    async def score():
        batcher = Batcher(gated)
        waiting = [asyncio.create_task(batcher.score([gated.encode(group)])) for group in large]
        while not gated.prompts:
            await asyncio.sleep(0.01)
        waiting.append(
            asyncio.create_task(batcher.score([gated.encode(Group("", 0, None, "one line", None, (), ("a",)))]))
        )
        await asyncio.sleep(0)
        gated.gate.set()
        await asyncio.gather(*waiting)

    gated.tokens_per_micro_batch = gated.cost(gated.encode(large[0]))
    asyncio.run(score())
    assert len(gated.prompts) == 21 and gated.prompts.index("one line") <= AHEAD + 1


def test_no_stream_of_lines_holds_up_a_large_request(scorer):
    def waiting(number, *responses):
        sample = scorer.encode(Group(f"{number}", number, None, f"{number}", None, (), responses))
        cost = scorer.cost(sample)
        return Waiting(sample, asyncio.Future(loop=loop), 0, cost, cost)

    loop = asyncio.new_event_loop()
    batcher = Batcher(type("Stub", (), {"tokens_per_micro_batch": 1, "num_ahead": 0}))
    large = waiting(0, *(f"two red {i}" for i in range(40)))
    batcher.queue += [waiting(1, "a"), waiting(2, "a"), large]
    turns = 0
    while large in batcher.queue:
        batcher.queue.append(waiting(3, "a"))
        batcher.take()
        turns += 1
    loop.close()
    assert turns == 3  # as two lines were there before


def test_beside_small_requests_a_large_one_has_a_piece_in_every_other_batch_and_all_of_one_alone(scorer):
    class Cheap:
        """A response costs a token."""

        tokens_per_micro_batch, num_ahead, split = 80, 0, Scorer.split

        def cost(self, sample):
            return len(sample.main.sequences)

        def shared_cost(self, sample):
            return 0

    def waiting(name, responses, whole):
        sample = scorer.encode(Group(name, 0, None, name, None, (), tuple(map(str, range(responses)))))
        cost = batcher.scorer.cost
        return [Waiting(part, asyncio.Future(loop=loop), 0, cost(part), whole) for part in batcher.pieces(sample)]

    def taken():
        return [(merged[0].sample.group.source, len(merged)) for merged in batcher.take()]

    loop, batcher = asyncio.new_event_loop(), Batcher(Cheap())
    large = waiting("large", 40, 40)
    assert [len(entry.sample.main.sequences) for entry in large] == [10, 10, 10, 10]
    batcher.queue += large
    for expected in ([("large", 1), ("small", 1)], [("small", 1)], [("large", 1), ("small", 1)]):
        batcher.queue += waiting("small", 1, 1)
        assert taken() == expected
    assert taken() == [("large", 2)] and not batcher.queue
    loop.close()


def test_pictures_of_many_pixels_are_decoded_before_they_queue_one_at_a_time(scorer, monkeypatch):
    monkeypatch.setattr("mmrm_fast.serve.batcher.LARGE_PIXELS", 2 * 120 * 60)
    group = Group("a", 0, None, "What?", None, (picture(), picture(1)), ("two",))
    sample, (alone,) = scorer.encode(group), scorer.score_groups([group])

    async def score():
        batcher = Batcher(scorer)
        assert await batcher.decoded(sample, 2 * 120 * 60 - 1) is None
        tiles = await batcher.decoded(sample, 2 * 120 * 60)
        monkeypatch.setattr(type(scorer.preparer), "tiles", None)
        return await batcher.score([sample], [2 * 120 * 60], [tiles])

    (outcome,) = asyncio.run(score())
    assert outcome.rewards == pytest.approx(alone.rewards, abs=1e-5)


# replicas that do not answer


class Handle:
    """A Ray handle whose calls end in an error, or never."""

    def __init__(self, error=None):
        self.error, self.cancelled, self.score, self.say_precision = error, 0, self, self

    def remote(self, *_):
        return self

    def __await__(self):
        if self.error:
            raise self.error
        return asyncio.Event().wait().__await__()

    def cancel(self):
        self.cancelled += 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ActorDiedError(), "no replica answered"),
        (DeploymentUnavailableError("reward"), "no replica answered"),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), "all busy"),
    ],
    ids=["a dead replica", "no replica", "a full queue"],
)
def test_ray_s_own_refusals_become_json(scorer, error, reason):
    with running(scorer, replicas=RayReplicas(Handle(error))) as url:
        answers = [ask(url), httpx.get(f"{url}/readyz")]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert reason in answers[0].json()["error"]["message"] and answers[0].headers["retry-after"] == "1"


def test_a_replica_is_told_when_its_client_is_gone_or_its_time_is_over_and_health_waits_for_none(scorer):
    handle = Handle()
    with running(scorer, replicas=RayReplicas(handle), limits=Limits(seconds=2.0)) as url:
        with connect(url, whole(BODY)):
            wait_until(lambda: metric(url, "requests_in_flight") == 1, "not in flight")
            assert httpx.get(f"{url}/healthz").status_code == 200
        wait_until(lambda: handle.cancelled == 1, "not told")
        assert ask(url).status_code == 504 and handle.cancelled == 2
