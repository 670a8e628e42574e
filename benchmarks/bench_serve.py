"""The reward server under load: 64 clients, one request in twenty hostile, against the same requests one by one.

Every request must get the answer that it should: honest ones the rewards of `Scorer.score`, hostile ones a refusal
with a reason. Details: throughput and latencies, also without the hostile ones; the memory of all the server's
processes by third of the load; the CPU time of a request in the process that speaks HTTP, in the replica with the model
and in Ray's others, and in a scorer that is handed the same records one by one; the same of requests that are empty:
`/healthz`, which HTTP answers, and `/readyz`, which a replica answers at once.
"""

import base64
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.bench_end_to_end import train_run
from benchmarks.harness import Case, Options, Row
from benchmarks.models import encoded_image
from mmrm_fast.client import RewardClient, image_url
from mmrm_fast.data.scenes import random_scene, render
from mmrm_fast.score.scorer import Scorer

CLIENTS, HOSTILE_SHARE, NUM_REQUESTS = 64, 0.05, 200
SUBJECTS = ("a red circle", "two blue squares", "a green triangle on the left", "nothing but a yellow circle")
JSON = {"content-type": "application/json"}
RARE = "data:image/png;base64," + base64.b64encode(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(800)).decode()  # JPEG 2000


def large(count: int) -> dict:
    """A request with pictures of 49 Mpx each, all black, of a few KB."""
    url = {"url": image_url(encoded_image(Image.new("1", (7000, 7000)), "PNG"))}
    return {"queries": {"content": [{"type": "image_url", "image_url": url}] * count}, "documents": ["b"]}


def slowly() -> Iterator[bytes]:
    """A body that takes eight seconds."""
    for _ in range(8):
        yield b" "
        time.sleep(1)


HOSTILE = (
    ("/score", {"json": {"queries": "a"}}, 422),
    ("/score", {"content": b"{", "headers": JSON}, 400),
    ("/score", {"content": b"\xff\xfe", "headers": JSON}, 400),
    ("/get_reward", {"json": {"query": ["a"], "prompts": ["a"], "images": [["../../etc/passwd"]]}}, 422),
    ("/get_reward", {"json": {"query": ["a"], "prompts": ["a"], "images": [["http://127.0.0.1:1/x.png"]]}}, 422),
    ("/get_reward", {"json": {"query": ["a"], "prompts": ["a"], "images": [["data:image/png;base64,AAAA"]]}}, 422),
    ("/score", {"content": b" " * (33 << 20), "headers": JSON}, 413),
    ("/nowhere", {"json": {}}, 404),
    ("/get_reward", {"json": {"query": ["a"], "prompts": ["a"], "images": [[RARE] * 42]}}, 422),
    ("/score", {"json": large(3)}, 422),
    ("/score", {"json": large(1)}, 200),
    ("/rerank", {"json": {"query": "a", "documents": [f"{i} red circles" for i in range(1000)]}}, 200),
    ("/score", {"content": slowly, "headers": JSON}, 408),
    ("/score", {"json": {}, "headers": {"x": "a" * (32 << 10)}}, 400),
    ("/score", {"json": {}, "headers": {"host": "evil.example"}}, 421),
)


def cases(options: Options) -> Iterator[Case]:
    """One case."""
    yield Case(f"{CLIENTS} clients", partial(rows, options))


def rows(options: Options) -> Iterator[Row]:
    """Load a server with the robust model of a short training, or with the one that is given."""
    seconds = 10 if options.quick else 240 if options.full else 60
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            train_run(Path(folder) / "run", options)
        model = options.model or Path(folder) / "run" / "final"
        requests, scorer_ms = make_requests(model, NUM_REQUESTS)
        with server(model) as (url, pid):
            alone = load(url, pid, requests, clients=1, hostile=0.0, seconds=min(seconds / 4, 30))
            empty = {path: cpu_ms_of_empty(f"{url}{path}", pid) for path in ("/healthz", "/readyz")}
            calm = load(url, pid, requests, clients=CLIENTS, hostile=0.0, seconds=seconds / 2)
            together = load(url, pid, requests, clients=CLIENTS, hostile=HOSTILE_SHARE, seconds=seconds)
            lines = [line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#"]
    metrics = {name: float(value) for name, value in lines}
    failed = Counter({name: value for name, value in metrics.items() if 'status="500"' in name and value})
    wrong = alone.wrong + calm.wrong + together.wrong + failed
    memory = [np.median(part) for part in np.array_split(together.memory, 3) if len(part)]
    p50, p99 = np.percentile(together.seconds, [50, 99])
    details = {
        "p99 seconds without hostile ones": np.percentile(calm.seconds, 99),
        "requests/s": together.rate, "p50 seconds": p50, "p99 seconds": p99, "requests": len(together.seconds),
        "MB of all processes by third": " -> ".join(f"{mb:,.0f}" for mb in memory),
        "tokens unshared / shared": metrics["mmrm_tokens_unshared_total"] / metrics["mmrm_tokens_total"],
        "CPU ms of a request, one by one": alone.cpu_ms, f"of {CLIENTS} clients": calm.cpu_ms,
        "of the scorer, one by one": scorer_ms, **{f"of {path}": ms for path, ms in empty.items()},
        "wrong": str(dict(wrong)),
    }  # fmt: skip
    yield Row(
        "serve", f"serve {CLIENTS} clients", options.device.type, "float32", 1 / together.rate, "one by one",
        1 / alone.rate, together.rate / alone.rate, verified=not wrong, details=details,
    )  # fmt: skip


def make_requests(model: Path, count: int) -> tuple[list[tuple[str, dict, list[float]]], float]:
    """Honest requests over a few pictures and prompts with their rewards, and the scorer's CPU time of one, in ms."""
    rng, draw = random.Random(0), np.random.default_rng(0)
    pictures = [encoded_image(render(random_scene(draw), draw), "PNG") for _ in range(8)]
    records, requests = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(pictures):
            (Path(folder) / f"{i}.png").write_bytes(content)
        for _ in range(count):
            picture, prompt = rng.randrange(8), f"What is in the picture? {rng.randrange(4)}"
            responses = [f"There is {rng.choice(SUBJECTS)}, {rng.random():.3f}." for _ in range(rng.randint(1, 4))]
            records.append({"prompt": prompt, "img_path": f"{folder}/{picture}.png", "responses": responses})
            url = {"type": "image_url", "image_url": {"url": image_url(pictures[picture])}}
            body = {"queries": {"content": [url, {"type": "text", "text": prompt}]}, "documents": responses}
            requests.append(("/score", {"json": body}))
        scorer = Scorer.from_pretrained(model)
        rewards, started = scorer.score(records), time.process_time()
        for record in records:
            scorer.score([record])
        seconds = time.process_time() - started
    return [(*request, own) for request, own in zip(requests, rewards, strict=True)], 1e3 * seconds / count


@contextmanager
def server(model: Path) -> Iterator[tuple[str, int]]:
    """A server of its own, ready: its URL and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "mmrm_fast.cli", "serve", "--model", str(model), "--port", url.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        RewardClient(url, retries=9).patient.get(f"{url}/readyz").raise_for_status()  # asked again for two minutes
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


@dataclass
class Load:
    """What came of honest requests, and every answer that should not have been."""

    seconds: list[float] = field(default_factory=list)  # of each honest request
    wrong: Counter = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)  # MB of the server's processes, every five seconds
    took: float = 0.0  # seconds of the whole load
    cpu: Counter = field(default_factory=Counter)  # seconds of the server's processes

    @property
    def rate(self) -> float:
        """Honest requests a second."""
        return len(self.seconds) / self.took

    @property
    def cpu_ms(self) -> str:
        """Of an honest request, by process."""
        return by_process(self.cpu, len(self.seconds))


def by_process(cpu: Counter, count: int) -> str:
    """Milliseconds of one of so many."""
    return ", ".join(f"{name} {1e3 * seconds / count:.1f}" for name, seconds in cpu.items())


def load(url: str, pid: int, requests: list, *, clients: int, hostile: float, seconds: float) -> Load:
    """Clients that ask one request after the other for a while."""
    started, result, before = time.perf_counter(), Load(), cpu_seconds(pid)
    with ThreadPoolExecutor(clients) as pool:
        asking = [
            pool.submit(client, url, requests, hostile, started + seconds, seed, result) for seed in range(clients)
        ]
        while wait(asking, timeout=5).not_done:
            result.memory.append(resident_megabytes(pid))
    for each in asking:
        result.wrong += each.result()
    result.took, result.cpu = time.perf_counter() - started, cpu_seconds(pid, before)
    return result


def cpu_ms_of_empty(url: str, pid: int, count: int = 500) -> str:
    """Of a request without a body, one by one, by process."""
    before = cpu_seconds(pid)
    with httpx.Client() as client:
        for _ in range(count):
            client.get(url).raise_for_status()
    return by_process(cpu_seconds(pid, before), count)


def client(url: str, requests: list, hostile: float, deadline: float, seed: int, result: Load) -> Counter:
    """One client, which adds its honest requests' seconds; what was wrong."""
    rng, wrong = random.Random(seed), Counter()
    with httpx.Client(base_url=url, timeout=120, verify=False) as client:
        while (started := time.perf_counter()) < deadline:
            is_hostile = rng.random() < hostile
            problem = ask(client, *rng.choice(HOSTILE if is_hostile else requests))
            if problem:
                wrong[problem] += 1
            elif not is_hostile:
                result.seconds.append(time.perf_counter() - started)
    return wrong


def ask(client: httpx.Client, path: str, request: dict, expected: int | list[float]) -> str | None:
    """One request; what is wrong with its answer, which should be these rewards or a reason with this status."""
    if callable(request.get("content")):
        request = {**request, "content": request["content"]()}
    try:
        answer = client.post(path, **request)
    except httpx.HTTPError as error:  # a refusal may close the connection while a large body is still being sent
        return None if expected in (400, 408, 413) else type(error).__name__
    if isinstance(expected, int):
        is_right = answer.status_code in (expected, 429) and (expected == 200 or answer.json()["error"]["message"])
    else:
        rewards = [item["score"] for item in answer.json()["data"]] if answer.status_code == 200 else []
        is_right = len(rewards) == len(expected) and np.allclose(rewards, expected, atol=1e-5, rtol=0)
    return None if is_right else f"{path} answered {answer.status_code}"


def resident_megabytes(pid: int) -> float:
    """Of a process and all below it, shared pages counted once a process."""
    server, total = psutil.Process(pid), 0
    for process in (server, *server.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def cpu_seconds(pid: int, before: Counter | None = None) -> Counter:
    """Of a server's process, of its replicas, and of all else below it, so far or since `before`."""
    server, seconds = psutil.Process(pid), Counter(HTTP=0.0, replica=0.0, Ray=0.0)
    for process in (server, *server.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            is_replica = "ServeReplica" in " ".join(process.cmdline())
            times = process.cpu_times()
            seconds["HTTP" if process == server else "replica" if is_replica else "Ray"] += times.user + times.system
    seconds.subtract(before or {})
    return seconds
