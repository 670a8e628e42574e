"""The reward server under load: 64 clients, one request in twenty hostile, against the same requests one by one.

    python benchmarks/bench_serve.py --model runs/robust/final --seconds 120

Prints throughput, latencies and memory of the server's processes by third of the load, and checks that every request
got the answer it should, honest ones with the rewards of `Scorer.score`.
"""

import argparse
import io
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from mmrm_fast.client import image_url
from mmrm_fast.data.shapes import random_scene, render
from mmrm_fast.score.scorer import Scorer

SUBJECTS = ("a red circle", "two blue squares", "a green triangle on the left", "nothing but a yellow circle")
HOSTILE = (
    ("/score", {"json": {"queries": "a"}}, 422),
    ("/score", {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ("/score", {"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, 400),
    ("/get_reward", {"json": {"query": ["a"], "prompts": ["a"], "images": [["../../etc/passwd"]]}}, 422),
    ("/get_reward", {"json": {"query": ["a"], "prompts": ["a"], "images": [["http://127.0.0.1:1/x.png"]]}}, 422),
    ("/get_reward", {"json": {"query": ["a"], "prompts": ["a"], "images": [["data:image/png;base64,AAAA"]]}}, 422),
    ("/score", {"content": b" " * (33 << 20), "headers": {"content-type": "application/json"}}, 413),
    ("/nowhere", {"json": {}}, 404),
)


def make_requests(model: Path, count: int, seed: int = 0) -> list[tuple[dict, list[float]]]:
    """Honest requests over a few pictures and prompts, and their rewards."""
    rng = random.Random(seed)
    draw = np.random.default_rng(seed)
    pictures = [png(render(random_scene(draw), draw)) for _ in range(8)]
    records, bodies = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(pictures):
            (Path(folder) / f"{i}.png").write_bytes(content)
        for _ in range(count):
            picture, prompt = rng.randrange(8), f"What is in the picture? {rng.randrange(4)}"
            responses = [f"There is {rng.choice(SUBJECTS)}, {rng.random():.3f}." for _ in range(rng.randint(1, 4))]
            records.append({"prompt": prompt, "img_path": f"{folder}/{picture}.png", "responses": responses})
            url = {"type": "image_url", "image_url": {"url": image_url(pictures[picture])}}
            query = {"content": [url, {"type": "text", "text": prompt}]}
            bodies.append({"queries": query, "documents": responses})
        return list(zip(bodies, Scorer.from_pretrained(model).score(records), strict=True))


def png(image: Image.Image) -> bytes:
    """An image file's content."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Load:
    """Clients that ask one request after the other, and what came of them."""

    def __init__(self, url: str, requests: list, *, clients: int, hostile: float):
        self.url, self.requests, self.hostile = url, requests, hostile
        self.seconds: list[float] = []
        self.wrong: Counter = Counter()
        self.num_responses = self.num_hostile = 0
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.client, args=(seed,)) for seed in range(clients)]

    def run(self, seconds: float) -> float:
        """Load for a while; the seconds it really took."""
        started = time.perf_counter()
        for thread in self.threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in self.threads:
            thread.join()
        return time.perf_counter() - started

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.stop.is_set():
                try:
                    self.ask_hostile(client, rng) if rng.random() < self.hostile else self.ask(client, rng)
                except httpx.HTTPError as error:
                    self.note(type(error).__name__)

    def ask(self, client: httpx.Client, rng: random.Random) -> None:
        """One honest request."""
        body, expected = rng.choice(self.requests)
        started = time.perf_counter()
        answer = client.post("/score", json=body)
        took = time.perf_counter() - started
        if answer.status_code != 200:
            return self.note(f"honest {answer.status_code}")
        rewards = [item["score"] for item in answer.json()["data"]]
        if not np.allclose(rewards, expected, atol=1e-5, rtol=0):
            self.note("another reward")
        with self.lock:
            self.seconds.append(took)
            self.num_responses += len(rewards)

    def ask_hostile(self, client: httpx.Client, rng: random.Random) -> None:
        """One hostile request; a refusal may close the connection while a large body is still being sent."""
        path, request, status = rng.choice(HOSTILE)
        with self.lock:
            self.num_hostile += 1
        try:
            answer = client.post(path, **request)
        except httpx.HTTPError:
            if status != 413:
                raise
            return
        if answer.status_code not in (status, 429) or not answer.json()["error"]["message"]:
            self.note(f"hostile {path} {answer.status_code}")

    def note(self, what: str) -> None:
        with self.lock:
            self.wrong[what] += 1


ROLES = (("ray::ServeReplica", "replicas"), ("ray::ProxyActor", "proxy"), ("ray::ServeController", "controller"),
         ("raylet/raylet", "raylet"), ("gcs_server", "gcs"))  # fmt: skip


def memory(root: int) -> Counter:
    """MB resident by role in a process and all below it, shared pages counted once a process."""
    listing = subprocess.run(["ps", "-wweo", "pid=,ppid=,rss=,args="], capture_output=True, text=True, check=True)
    children, found = {}, {}
    for line in listing.stdout.splitlines():
        pid, parent, size, command = line.split(None, 3)
        children.setdefault(int(parent), []).append(int(pid))
        found[int(pid)] = int(size) / 1024, command
    below, sizes = [root], Counter()
    while below:
        pid = below.pop()
        below += children.get(pid, [])
        size, command = found.get(pid, (0.0, ""))
        role = next((role for part, role in ROLES if part in command), "others")
        sizes[role if pid != root else "driver"] += size
    return sizes


def watch(root: int, samples: list[Counter], stop: threading.Event) -> None:
    """Sample memory every five seconds."""
    while not stop.wait(5):
        samples.append(memory(root))


def growth(samples: list[Counter]) -> dict[str, str]:
    """Median MB of each role, and of all, in the first, second and last third of the load."""
    third = max(len(samples) // 3, 1)
    parts = samples[:third], samples[third : 2 * third], samples[-third:]
    rows = {role: [[sample[role] for sample in part] for part in parts] for role in sorted(samples[0])}
    rows["all"] = [[sample.total() for sample in part] for part in parts]
    return {role: " -> ".join(f"{np.median(part):.0f}" for part in row) for role, row in rows.items()}


def start(model: Path) -> tuple[subprocess.Popen, str]:
    """A server of its own, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mmrm_fast.cli", "serve", "--model", str(model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return process, url
        except httpx.HTTPError:
            assert process.poll() is None, "the server did not start"
        time.sleep(0.5)


def figures(load: Load, seconds: float) -> dict:
    """What a load came to."""
    return {
        "requests/s": round(len(load.seconds) / seconds, 1),
        "responses/s": round(load.num_responses / seconds, 1),
        "p50 ms": round(1000 * float(np.percentile(load.seconds, 50)), 1),
        "p99 ms": round(1000 * float(np.percentile(load.seconds, 99)), 1),
        "honest": len(load.seconds),
        "hostile": load.num_hostile,
        "wrong": dict(load.wrong),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a reward model")
    parser.add_argument("--seconds", type=float, default=120, help="of load")
    parser.add_argument("--clients", type=int, default=64, help="at a time")
    parser.add_argument("--hostile", type=float, default=0.05, help="share of hostile requests")
    options = parser.parse_args()
    requests = make_requests(options.model, 200)
    process, url = start(options.model)
    samples, stop = [], threading.Event()
    try:
        alone = Load(url, requests, clients=1, hostile=0.0)
        sequential = figures(alone, alone.run(min(options.seconds / 4, 30)))
        threading.Thread(target=watch, args=(process.pid, samples, stop), daemon=True).start()
        load = Load(url, requests, clients=options.clients, hostile=options.hostile)
        together = figures(load, load.run(options.seconds))
        metrics = httpx.get(f"{url}/metrics").text
    finally:
        stop.set()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    counts = [line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#")]
    tokens = {name: float(value) for name, value in counts if name.startswith("mmrm_tokens")}
    report = {
        "one by one": sequential,
        f"{options.clients} clients": together,
        "memory MB by third of the load": growth(samples),
        "tokens unshared / shared": round(tokens["mmrm_tokens_unshared_total"] / tokens["mmrm_tokens_total"], 2),
        "500s": sum(float(value) for name, value in counts if 'status="500"' in name),
    }
    print(json.dumps(report, indent=2))
    return 1 if alone.wrong or load.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
