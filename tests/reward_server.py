"""A reward server for tests: the API on a real socket, in a thread, around a tiny random model."""

import base64
import io
import threading
from contextlib import contextmanager

import numpy as np
import uvicorn
from PIL import Image
from runs import wait_until

from mmrm_fast.serve.api import RewardService, make_app
from mmrm_fast.serve.guard import Limits


@contextmanager
def running(scorer, *, limits: Limits | None = None, image_root=None, token=None):
    """The base URL of a server around `scorer`."""
    service = RewardService(scorer, "tiny", limits=limits or Limits(), image_root=image_root)
    app = make_app(service, token)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), "the server does not start")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def picture(seed: int = 0, size: tuple[int, int] = (120, 60)) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
