"""A thin client of the reward server, and reward functions for RL trainers."""

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, groupby
from os import PathLike
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

NUM_THREADS = 16
RETRIED = (429, 503, 504)  # the server is busy
RESPONSES_AT_ONCE = 512  # half of what a server takes in one request
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


class RewardClient:
    """Rewards from a server, or from the first of several that answers.

    client = RewardClient("http://127.0.0.1:8000")
    client.score("What is this?", ["A cat.", "A dog."], images=["cat.png"])

    It may be used from many threads; `await asyncio.to_thread(client.score, ...)` does from a coroutine.

    Args:
        url: of the server; of several with the same model, one request after another goes to the next, and to those
            behind it where it cannot be reached.
        token: what the servers' `--token-file` holds.
        timeout: seconds to wait for an answer.
        retries: times that a busy or unreachable server is asked again, waiting longer each time; of several, the last
            one that is asked.
    """

    def __init__(self, url: str | Sequence[str] = "http://127.0.0.1:8000", *, token: str | None = None,
                 timeout: float = 120.0, retries: int = 8):  # fmt: skip
        self.urls = [each.rstrip("/") for each in ([url] if isinstance(url, str) else url)]
        self.timeout, self.turn = timeout, count()
        self.patient, self.hasty = self.session(retries, token), self.session(0, token)

    def session(self, retries: int, token: str | None) -> requests.Session:
        """Connections whose requests are sent again so many times."""
        retry = Retry(total=retries, backoff_factor=0.25, status_forcelist=RETRIED, allowed_methods=None)
        session = requests.Session()
        for url in self.urls:
            session.mount(url, HTTPAdapter(pool_maxsize=NUM_THREADS, max_retries=retry))
        if token is not None:
            session.headers["authorization"] = f"Bearer {token}"
        return session

    def post(self, path: str, body: Mapping) -> dict:
        """A server's answer. Raises `ValueError` with its reason, `requests` errors if there is none."""
        first = next(self.turn)
        *others, last = (self.urls[(first + place) % len(self.urls)] for place in range(len(self.urls)))
        for url in others:
            with suppress(requests.ConnectionError, requests.exceptions.RetryError):
                return self.answer(self.hasty, url + path, body)
        return self.answer(self.patient, last + path, body)

    def answer(self, session: requests.Session, url: str, body: Mapping) -> dict:
        """One server's answer. Raises as `post`."""
        answer = session.post(url, json=body, timeout=self.timeout)
        if answer.ok:
            return answer.json()
        try:
            reason = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = answer.text[:200]
        raise ValueError(f"{url} answered {answer.status_code}: {reason}")

    def score(self, prompt: str | Sequence[Mapping], responses: Sequence[str], images: Sequence = ()) -> list[float]:
        """The reward of each response.

        Args:
            prompt: text, or a conversation of `{"role", "content"}`; content is text or OpenAI-style parts. A part of
                type `image` holds a picture, or is the place of the next of `images`.
            responses: what the assistant might say next.
            images: pictures as PIL images, encoded bytes, `{"bytes", "path"}` of Hugging Face datasets, data URLs, or
                paths under the server's `--image-root`.

        Raises:
            ValueError: what the server refuses, with its reason; content that is neither text nor parts.
        """
        turns = place_images(turns_of(prompt), [image_url(image) for image in images])
        if [turn["role"] for turn in turns] == ["user"]:
            lots = (
                responses[first : first + RESPONSES_AT_ONCE] for first in range(0, len(responses), RESPONSES_AT_ONCE)
            )
            bodies = [{"queries": {"content": turns[0]["content"]}, "documents": list(lot)} for lot in lots]
            ask = lambda body: [item["score"] for item in self.post("/score", body)["data"]]  # noqa: E731
        else:
            bodies = [{"messages": [*turns, {"role": "assistant", "content": response}]} for response in responses]
            ask = lambda body: self.post("/classify", body)["data"][-1]["probs"][-1:]  # noqa: E731
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return [reward for rewards in pool.map(ask, bodies) for reward in rewards]

    def get_reward(self, query: Sequence[str], prompts: Sequence[str] | None = None, images: Sequence | None = None,
                   labels: Sequence | None = None) -> dict:  # fmt: skip
        """OpenRLHF's answer, `{"rewards", "scores", "extra_logs"}`, for whole decoded queries.

        Labels may name the pictures of a prompt: `{"images": ["cat.png"]}` or its JSON.
        """
        body: dict[str, Any] = {"query": list(query)}
        if prompts is not None:
            body["prompts"] = list(prompts)
        if images is not None:
            body["images"] = [[image_url(image) for image in own] for own in images]
        if labels is not None:
            body["labels"] = list(labels)
        return self.post("/get_reward", body)

    def reward_func(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """A reward function for TRL: `GRPOTrainer(reward_funcs=client.reward_func)`.

        `columns` are the data set's; `images` (a list a prompt) or `image` (one a prompt) are sent along. Completions
        of the same prompt go in one request, so that the server reads prompt and images once.
        """
        images = columns.get("images") or [[image] if image is not None else [] for image in columns.get("image") or ()]
        images = images or [[] for _ in prompts]
        said = [*map(with_turns, prompts, completions)]
        asked = [  # TRL has put a prompt's pictures into its messages already
            (turns, [] if holds_pictures(turns) else [*map(image_url, own or ())])
            for (turns, _), own in zip(said, images, strict=True)
        ]
        runs = [list(run) for _, run in groupby(range(len(asked)), key=asked.__getitem__)]
        ask = lambda run: self.score(asked[run[0]][0], [said[i][1] for i in run], asked[run[0]][1])  # noqa: E731
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return [reward for rewards in pool.map(ask, runs) for reward in rewards]


def turns_of(prompt: str | Sequence[Mapping]) -> list[Mapping]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def with_turns(prompt: str | Sequence[Mapping], completion: str | Sequence[Mapping]) -> tuple[list[Mapping], str]:
    """The conversation and the response of a completion, whose messages but the last, such as calls, are turns."""
    if isinstance(completion, str):
        return turns_of(prompt), completion
    *between, last = completion
    content = last.get("content")
    if isinstance(content, Sequence) and all(type_of(part) == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if last.get("tool_calls") or not isinstance(content, str):
        raise ValueError(f"a completion must end in text, got {last}")
    return [*turns_of(prompt), *between], content


def parts_of(turns: Sequence[Mapping]) -> list:
    """The parts of all turns that have any."""
    contents = (turn.get("content") for turn in turns)
    return [part for content in contents if not isinstance(content, str) for part in content or ()]


def holds_pictures(turns: Sequence[Mapping]) -> bool:
    """Whether image parts of a conversation hold their pictures."""
    return any(type_of(part) == "image" and own_picture(part) is not None for part in parts_of(turns))


def type_of(part: Any) -> Any:
    """The type of a message's part; None of what is none."""
    return part.get("type") if isinstance(part, Mapping) else None


def own_picture(part: Mapping) -> Any:
    """The picture that an image part holds, if any."""
    return next((part[key] for key in ("image", "url", "path") if part.get(key) is not None), None)


def place_images(turns: Sequence[Mapping], urls: Sequence[str]) -> list[dict]:
    """The conversation with its images: at its empty `image` parts, where it has none before the first user's text."""
    left = list(urls)
    placed = [{**turn, "content": placed_content(turn, left, i)} for i, turn in enumerate(turns)]
    if not left:
        return placed
    first = next((turn for turn in placed if turn["role"] == "user"), None)
    if first is None or "image_url" in map(type_of, parts_of(placed)):
        raise ValueError(f"the messages have no place for {len(left)} of the images, add a part of type image for each")
    text = first["content"]
    parts = [{"type": "text", "text": text}] if isinstance(text, str) else text
    first["content"] = [*map(image_part, left), *parts]
    return placed


def placed_content(turn: Mapping, left: list[str], number: int) -> str | list[dict] | None:
    """A turn's content with pictures in its `image` parts: their own, else the next that are `left`."""
    content = turn.get("content")
    if isinstance(content, str) or (content is None and turn.get("tool_calls")):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"messages[{number}].content is {content!r}; expected text or a list of parts")
    parts = []
    for part in content:
        if type_of(part) not in ("text", "image", "image_url"):
            raise ValueError(
                f"messages[{number}].content has {part!r}; expected parts of type text, image or image_url"
            )
        if type_of(part) == "image":
            own = own_picture(part)
            if own is None and not left:
                raise ValueError(f"messages[{number}].content has an image part without a picture")
            part = image_part(left.pop(0) if own is None else image_url(own))
        parts.append(dict(part))
    return parts


def image_part(url: str) -> dict:
    """An image as OpenAI's chats have it."""
    return {"type": "image_url", "image_url": {"url": url}}


def image_url(image: Any) -> str:
    """A PIL image or encoded bytes as a data URL; a string as it is."""
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (str, PathLike)):
        return str(image)
    if not isinstance(image, bytes):
        if not hasattr(image, "mode"):
            raise ValueError(
                f"{image!r} is no picture: expected a PIL image, bytes, a path or a URL, or a dict of them"
            )
        from PIL import ImageOps

        upright, file = ImageOps.exif_transpose(image), io.BytesIO()
        (upright if upright.mode in PNG_MODES else upright.convert("RGB")).save(file, "PNG", compress_level=1)
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()
