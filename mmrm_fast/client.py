"""A thin client of the reward server, and reward functions for RL trainers."""

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

NUM_THREADS = 16
RETRIED = (429, 503, 504)  # the server is busy


class RewardClient:
    """Rewards from a server.

    client = RewardClient("http://127.0.0.1:8000")
    client.score("What is this?", ["A cat.", "A dog."], images=["cat.png"])

    Args:
        url: of the server.
        token: what the server's `--token-file` holds.
        timeout: seconds to wait for an answer.
        retries: times that a busy or unreachable server is asked again, waiting longer each time.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout: float = 120.0,
                 retries: int = 8):  # fmt: skip
        self.url, self.timeout = url.rstrip("/"), timeout
        retry = Retry(total=retries, backoff_factor=0.25, status_forcelist=RETRIED, allowed_methods=None)
        self.session = requests.Session()
        self.session.mount(self.url, HTTPAdapter(pool_maxsize=NUM_THREADS, max_retries=retry))
        if token is not None:
            self.session.headers["authorization"] = f"Bearer {token}"

    def post(self, path: str, body: Mapping) -> dict:
        """The server's answer. Raises `ValueError` with its reason, `requests` errors if there is none."""
        answer = self.session.post(self.url + path, json=body, timeout=self.timeout)
        if answer.ok:
            return answer.json()
        try:
            reason = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = answer.text[:200]
        raise ValueError(f"{self.url}{path} answered {answer.status_code}: {reason}")

    def score(self, prompt: str | Sequence[Mapping], responses: Sequence[str], images: Sequence = ()) -> list[float]:
        """The reward of each response.

        Args:
            prompt: text, or a conversation of `{"role", "content"}`; content is text or OpenAI-style parts, in which a
                part of type `image` is the place of the next image.
            responses: what the assistant might say next.
            images: PIL images, encoded bytes, data URLs, or paths under the server's `--image-root`.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = place_images(turns, [image_url(image) for image in images])
        if [turn["role"] for turn in turns] == ["user"]:
            body = {"queries": {"content": turns[0]["content"]}, "documents": list(responses)}
            return [item["score"] for item in self.post("/score", body)["data"]]
        chats = [{"messages": [*turns, {"role": "assistant", "content": response}]} for response in responses]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            answers = list(pool.map(lambda chat: self.post("/classify", chat), chats))
        return [answer["data"][-1]["probs"][-1] for answer in answers]

    def get_reward(self, query: Sequence[str], prompts: Sequence[str] | None = None, images: Sequence | None = None):
        """OpenRLHF's answer, `{"rewards", "scores", "extra_logs"}`, for whole decoded queries."""
        body: dict[str, Any] = {"query": list(query)}
        if prompts is not None:
            body["prompts"] = list(prompts)
        if images is not None:
            body["images"] = [[image_url(image) for image in own] for own in images]
        return self.post("/get_reward", body)

    def reward_func(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """A reward function for TRL: `GRPOTrainer(reward_funcs=client.reward_func)`.

        `columns` are the data set's; `images` (a list a prompt) or `image` (one a prompt) are sent along. Completions
        of the same prompt go in one request, so that the server reads prompt and images once.
        """
        images = columns.get("images") or [[image] if image is not None else [] for image in columns.get("image") or ()]
        images = images or [[] for _ in prompts]
        texts = [completion if isinstance(completion, str) else text_of(completion) for completion in completions]
        urls = [[image_url(image) for image in own or ()] for own in images]
        asked = list(zip(prompts, urls, strict=True))
        runs = [list(run) for _, run in groupby(range(len(asked)), key=asked.__getitem__)]
        ask = lambda run: self.score(asked[run[0]][0], [texts[i] for i in run], asked[run[0]][1])  # noqa: E731
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return [reward for rewards in pool.map(ask, runs) for reward in rewards]


def place_images(turns: Sequence[Mapping], urls: Sequence[str]) -> list[dict]:
    """The conversation with its images: at its `image` parts, else before the first user's text."""
    left = list(urls)
    placed = []
    for turn in turns:
        content = turn["content"]
        if not isinstance(content, str):
            content = [image_part(left.pop(0)) if part["type"] == "image" and left else dict(part) for part in content]
        placed.append({"role": turn["role"], "content": content})
    if left:
        first = next(turn for turn in placed if turn["role"] == "user")
        text = first["content"]
        parts = [{"type": "text", "text": text}] if isinstance(text, str) else text
        first["content"] = [*map(image_part, left), *parts]
    return placed


def image_part(url: str) -> dict:
    """An image as OpenAI's chats have it."""
    return {"type": "image_url", "image_url": {"url": url}}


def image_url(image: Any) -> str:
    """A PIL image or encoded bytes as a data URL; a string as it is."""
    if isinstance(image, str):
        return image
    if not isinstance(image, bytes):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def text_of(turns: Sequence[Mapping]) -> str:
    """The text of a completion that comes as messages."""
    content = turns[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
