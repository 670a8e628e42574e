"""A reward server for tests: the API on a real socket, in a thread, around a tiny random model."""

import base64
import io
from contextlib import contextmanager

import httpx
import numpy as np
from PIL import Image
from runs import wait_until

from mmrm_fast.serve.api import Front, make_app
from mmrm_fast.serve.connections import listen, serving
from mmrm_fast.serve.conversation import ConversationReader
from mmrm_fast.serve.guard import Limits
from mmrm_fast.serve.service import RewardService


class Here:
    """One replica in this process."""

    def __init__(self, service):
        self.score = service.score

    async def ready(self):
        return None


@contextmanager
def running(scorer, *, limits: Limits | None = None, image_root=None, token=None, hosts=(), replicas=None, index=None):
    """The base URL of a server around `scorer`, or around `replicas`."""
    limits = limits or Limits()
    replicas = replicas or Here(RewardService(scorer, limits=limits, image_root=image_root))
    reader = ConversationReader(scorer.checkpoint.prompt_encoder().chat, scorer.checkpoint.tokenizer)
    bound = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    with serving(
        make_app(Front(replicas, reader, "tiny", index or {}), limits=limits, token=token, hosts=hosts), bound, limits
    ):
        wait_until(lambda: answers(url), "the server does not start", seconds=60)
        yield url


def answers(url):
    """Whether a server is there."""
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.ConnectError:
        return False


def picture(seed: int = 0, size: tuple[int, int] = (120, 60)) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
