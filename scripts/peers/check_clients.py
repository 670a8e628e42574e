"""Other programs' own reward clients against a live server: equal to scoring, or refused, never another number.

    python -m venv rl && rl/bin/pip install "torch<2.14" torchvision "transformers>=5.5.3,<5.11" "tensordict<=0.10" \
        ray omegaconf hydra-core aiohttp codetiming datasets peft accelerate torchdata orjson pylatexenc requests
    rl/bin/pip install --no-deps verl==0.9.1 openrlhf==0.11.2   # which else ask for CUDA packages
    python -m venv trl && trl/bin/pip install trl==1.16.0 "torch<2.14" torchvision requests
    python scripts/peers/check_clients.py --rl rl/bin/python --trl trl/bin/python

The status is 1 where a case is answered otherwise than its row says.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import requests
import tyro
from check_vllm import running, write_tiny
from PIL import Image

from mmrm_fast.files import write_json_lines
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.tables import print_table

ROOT = Path(__file__).resolve().parents[2]
BOUND = 1e-4
SHORT = 8000  # characters of an exchange that a test sends again
TURNS = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
ASKING = {"role": "user", "content": "What is it?"}
EMPTY = {"images": [], "labelled": [], "label": None, "cut": False, "foreign": False, "response": "Two red circles."}
SIZES = {"a.png": (56, 56), "b.png": (120, 60)}
PICTURES = list(SIZES)
SCRIPTS = {"rl": "rl_clients.py", "trl": "trl_client.py"}
TEMPLATED = ("OpenRLHF, HTTP", "OpenRLHF, file", "verl, /classify", "verl, /v1/embeddings")  # they send text
VERL = ("verl, /classify", "verl, /v1/embeddings")
CASES = {  # and which clients are refused
    "text": ({"messages": [ASKING]}, ()),
    "system": ({"messages": [{"role": "system", "content": "Be brief."}, ASKING]}, ()),
    "several turns": ({"messages": [*TURNS, ASKING]}, ()),
    "one picture": ({"messages": [ASKING], "images": PICTURES[:1], "labelled": PICTURES[:1]}, VERL),
    "picture of an id": ({"messages": [ASKING], "images": PICTURES[:1], "labelled": PICTURES[:1], "label": "17"}, VERL),
    "two pictures": ({"messages": [ASKING], "images": PICTURES, "labelled": PICTURES}, VERL),
    "picture not named": ({"messages": [ASKING], "images": PICTURES[:1]}, (*TEMPLATED, "verl, file")),
    "over-long response": ({"messages": [ASKING], "response": "two red circles " * 1000}, ()),
    "over-long prompt": (
        {"messages": [{"role": "user", "content": "What is it? " * 1500}]},
        (*TEMPLATED, "verl, file", "TRL"),
    ),
    "prompt cut on its left": ({"messages": [*TURNS, ASKING], "cut": True}, TEMPLATED[:2]),
    "malformed": ({"messages": [ASKING], "foreign": True}, (*TEMPLATED, "verl, file", "TRL")),
}


def check_clients(rl: Path | None = None, trl: Path | None = None, port: int = 8912, record: Path | None = None) -> int:
    """Ask by every client for every case.

    Args:
        rl: interpreter of an environment with OpenRLHF and verl.
        trl: and of one with TRL.
        port: that the server listens on.
        record: JSON lines for the short requests and their answers, which a test sends again.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tiny(root / "model", "")
        for name, size in SIZES.items():
            blocks(*size).save(root / name)
        write_json_lines(root / "index.jsonl", [{"id": 17, "images": PICTURES[:1]}])
        expected = {name: reward(root, {**EMPTY, **case}) for name, (case, _) in CASES.items()}
        with server(root, port) as url:
            pythons = {name: python for name, python in (("rl", rl), ("trl", trl)) if python is not None}
            with recording(url) as (recorder, exchanges):
                outcomes = {k: v for name, own in pythons.items() for k, v in asked(name, own, root, recorder).items()}
    if record is not None:
        write_json_lines(record, replayed(exchanges, root))
    rows = [
        [client, case, *judged(outcome, expected[case], client in CASES[case][1])]
        for client, own in outcomes.items()
        for case, outcome in own.items()
    ]
    print_table("Rewards that the clients end with", ["client", "case", "outcome", "as it should be"], rows, num_text=4)
    return int(any(row[-1] != "yes" for row in rows))


def blocks(width: int, height: int) -> Image.Image:
    """A picture of sixteen colours."""
    colours = np.random.default_rng(width).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours.repeat(height // 4, 0).repeat(width // 4, 1))


@contextmanager
def recording(url: str) -> Iterator[tuple[str, list[dict]]]:
    """The URL of a server that hands on to another, and what goes through it."""
    exchanges = []

    class Recorder(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer = requests.post(url + self.path, json=body)
            exchanges.append({"path": self.path, "body": body, "status": answer.status_code, "answer": answer.json()})
            self.send_response(answer.status_code)
            for name in ("content-length", "content-type"):
                self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", exchanges
        server.shutdown()


def replayed(exchanges: list[dict], root: Path) -> list[dict]:
    """The exchanges that are short, each once, with paths below the image root and without what changes."""
    texts = dict.fromkeys(json.dumps(own).replace(f"{root}/", "") for own in exchanges)
    rows = [json.loads(text) for text in texts if len(text) < SHORT]
    for row in rows:
        row["answer"] = {name: row["answer"].get(name) for name in ("rewards", "data") if name in row["answer"]}
    return list({json.dumps(row): row for row in rows}.values())


def reward(root: Path, case: dict) -> float | None:
    """What scoring gives; None where the record cannot be scored."""
    images = [str(root / name) for name in case["labelled"]]
    record = {"prompt": case["messages"], "images": images, "responses": [case["response"]]}
    try:
        return Scorer.from_pretrained(root / "model", "cpu").score([record])[0][0]
    except ValueError:
        return None


def asked(name: str, python: Path, root: Path, url: str) -> dict[str, dict]:
    """What the clients get."""
    cases = {name: {**EMPTY, **case} for name, (case, _) in CASES.items()}
    for case in cases.values():
        case["images"] = [str(root / name) for name in case["images"]]
    given = {"model": str(root / "model"), "url": url, "examples": str(ROOT / "scripts" / "examples"), "cases": cases}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "REWARD_SERVER": url, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), str(Path(__file__).with_name(SCRIPTS[name]))]
    done = subprocess.run(command, input=json.dumps(given), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the clients failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def judged(outcome: float | str, expected: float | None, refused: bool) -> tuple[str, str]:
    """An outcome in words, and whether it is right."""
    if isinstance(outcome, str):
        return outcome[:160], "yes" if refused else "NO"
    far = abs(outcome - expected) if expected is not None else float("nan")
    return f"{outcome:+.6f}, {far:.1e} from scoring", "yes" if not refused and far <= BOUND else "NO"


@contextmanager
def server(root: Path, port: int) -> Iterator[str]:
    """`mmrm-fast serve` until the end."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mmrm_fast.cli", "serve", "--model", str(root / "model"), "--port", str(port)]
    command += ["--image-root", str(root), "--image-index", str(root / "index.jsonl")]
    with running(command, f"{url}/healthz", root / "serve.log"):
        yield url


if __name__ == "__main__":
    sys.exit(tyro.cli(check_clients, description=__doc__))
