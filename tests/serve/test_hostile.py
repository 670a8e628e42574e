"""Requests that mean harm, or none: each gets a status and a JSON reason, none gets a 500, a file or a fetch.

The table is the documentation: request, answer.
"""

import json
import os
import socket
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from reward_server import data_url, picture, running

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.serve.guard import Limits

LIMITS = Limits(body=1 << 20, responses=64, tokens=4096, pixels=1_000_000, request_pixels=1_500_000)
TOKEN = "a-token"


def raw_request(client, header: str) -> socket.socket:
    """A connection that has sent the head of a request and none of its body."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)
    head = f"POST /rerank HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: text/json\r\n"
    connection.sendall(f"{head}{header}\r\n\r\n".encode())
    return connection


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of one bit a pixel, all black, with extra chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes(((width + 7) // 8 + 1) * min(height, 64)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_chunk(at: int, extra: bytes) -> bytes:
    """A good PNG with one more chunk: at 33 before its pixels, at -12 after them."""
    return picture()[:at] + extra + picture()[at:]


def compressed_zeros(mebibytes: int) -> bytes:
    """Made of one mebibyte, packed on its own, again and again."""
    packer = zlib.compressobj(9)
    once = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler32 = (mebibytes << 20) % 65521 << 16 | 1
    return once + once[2:] * (mebibytes - 1) + b"\x03\0" + adler32.to_bytes(4, "big")


BOMB = compressed_zeros(300)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
IMAGES = {
    "a path with dots": "../secret.png",
    "an absolute path outside": "/etc/passwd",
    "a file URL outside": "file:///etc/passwd",
    "a file URL of another host": "file://elsewhere/x.png",
    "a symbolic link outside": "link.png",
    "a symbolic link to a folder outside": "folder/secret.png",
    "dots through a link": "folder/../secret.png",
    "a NUL in a path": "wide.png\0.txt",
    "a path too long": "a" * 100_000,
    "no such file": "missing.png",
    "a folder": ".",
    "a named pipe": "pipe",
    "the web": "http://127.0.0.1:{port}/x.png",
    "the web, encrypted": "https://127.0.0.1:{port}/x.png",
    "the web, shouted": "HTTP://127.0.0.1:{port}/x.png",
    "the cloud's metadata": "http://169.254.169.254/latest/meta-data/",
    "another scheme": "gopher://127.0.0.1:{port}/x",
    "ftp": "ftp://127.0.0.1:{port}/x.png",
    "a page": "data:text/html;base64,PGI+",
    "a drawing": "data:image/svg+xml;base64," + "PHN2Zy8+",
    "not base64": "data:image/png;base64,%%%",
    "no picture": "data:image/png;base64,AAAA",
    "an empty URL": "data:image/png;base64,",
    "PostScript": data_url(POSTSCRIPT),
    "JPEG 2000": data_url(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(800)),
    "a gigapixel": data_url(png(32_768, 32_768)),
    "over the pixel limit": data_url(png(1_001, 1_000)),
    "a zip bomb in a text chunk": data_url(png(8, 8, chunk(b"zTXt", b"a\0\0" + BOMB))),
    "a zip bomb in a colour profile": data_url(png(8, 8, chunk(b"iCCP", b"a\0\0" + BOMB))),
    "a picture cut short": data_url(picture()[:-900]),
    "a text chunk that reads as transparency": data_url(with_chunk(33, chunk(b"tEXt", b"transparency\0foo"))),
    "an empty colour profile after the pixels": data_url(with_chunk(-12, chunk(b"iCCP", b""))),
    "a lone surrogate": "\ud800.png",
}


@pytest.fixture(scope="module")
def canary():
    """A web server that notes every request; nothing may ever ask it."""
    asked = []

    class Note(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Note)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    server.shutdown()


@pytest.fixture(scope="module")
def url(make_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    save_checkpoint(folder / "model", make_checkpoint(max_length=256))
    root, outside = folder / "root", folder / "outside"
    root.mkdir()
    outside.mkdir()
    for path in (root / "wide.png", folder / "secret.png", outside / "secret.png"):
        path.write_bytes(picture())
    (root / "link.png").symlink_to(folder / "secret.png")
    (root / "folder").symlink_to(outside)
    os.mkfifo(root / "pipe")
    scorer = Scorer.from_pretrained(folder / "model", "cpu")
    with running(scorer, limits=LIMITS, image_root=root, token=TOKEN) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=20, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        yield client


@pytest.fixture(autouse=True)
def still_serving(client):
    """Whatever was sent, the next honest request is answered."""
    yield
    assert client.post("/rerank", json={"query": "a", "documents": ["b"]}).status_code == 200


def refused(answer, status):
    """The reason of a refusal."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status and error["message"]
    return error


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("path", ["/get_reward", "/score"])
def test_a_hostile_image_is_refused_with_a_reason(client, canary, path, name):
    port, asked = canary
    image = IMAGES[name].replace("{port}", str(port))
    body = {"query": ["a b"], "prompts": ["a"], "images": [[image]]}
    if path == "/score":
        body = {"queries": {"content": [{"type": "image_url", "image_url": {"url": image}}]}, "documents": ["b"]}
    error = refused(client.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), 422)
    assert "secret" not in error["message"] and "pytest" not in error["message"] and not asked


IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
LARGE_PART = {"type": "image_url", "image_url": {"url": data_url(png(1000, 1000))}}
BODIES = {
    "not JSON": (b"{", 400),
    "nothing": (b"", 422),
    "invalid UTF-8": (b'{"query": "\xff\xfe", "documents": ["b"]}', 400),
    "a lone surrogate": (b'{"query": "\\ud800", "documents": ["b"]}', 422),
    "nested too deep": (b"[" * 100_000, 400),
    "a list": (b"[]", 422),
    "null": (b"null", 422),
    "NaN for a number": (b'{"query": "a", "documents": ["b"], "top_n": NaN}', 422),
    "infinity for a number": (b'{"query": "a", "documents": ["b"], "top_n": Infinity}', 422),
    "a fraction for a number": (b'{"query": "a", "documents": ["b"], "top_n": 1.5}', 422),
    "text for a number": (b'{"query": "a", "documents": ["b"], "top_n": "1"}', 422),
    "NaN for text": (b'{"query": NaN, "documents": ["b"]}', 422),
    "NaN for a flag": (b'{"query": "a", "documents": ["b"], "use_activation": NaN}', 422),
    "a number of many digits": (b'{"query": "a", "documents": ["b"], "top_n": ' + b"9" * 5000 + b"}", 400),
    "no documents": (b'{"query": "a", "documents": []}', 422),
    "too many responses": (json.dumps({"query": "a", "documents": ["b"] * 65}).encode(), 422),
    "too many tokens": (json.dumps({"query": "a", "documents": ["two red " * 60] * 60}).encode(), 422),
    "too much text": (json.dumps({"query": "a", "documents": ["b" * 40_000]}).encode(), 422),
    "too many images": (json.dumps({"query": {"content": [IMAGE_PART] * 1025}, "documents": ["b"]}).encode(), 422),
    "too many empty responses": (b'{"query": "a", "documents": [' + b'"", ' * 40_000 + b'""]}', 422),
    "a prompt over the length": (json.dumps({"query": "two " * 400, "documents": ["b"]}).encode(), 422),
    "too many pixels": (json.dumps({"query": {"content": [LARGE_PART] * 2}, "documents": ["b"]}).encode(), 422),
    "too large": (b" " * ((1 << 20) + 1), 413),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused_with_a_reason(client, name):
    body, status = BODIES[name]
    refused(client.post("/rerank", content=body, headers={"content-type": "application/json"}), status)


def test_a_body_without_end_is_refused_while_it_arrives(client):
    with raw_request(client, "transfer-encoding: chunked") as connection:
        for _ in range(2):
            connection.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_announces_too_much_is_refused_before_it_comes(client):
    with raw_request(client, "content-length: 104857600") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", "Basic a-token", "Bearer a-tokenx", "a-token", "Bearer ÿ"]
)
@pytest.mark.parametrize("path", ["/get_reward", "/metrics", "/docs", "/openapi.json", "/nowhere"])
def test_without_the_token_nothing_is_answered(url, path, given):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    answer = httpx.request("POST" if path == "/get_reward" else "GET", url + path, headers=headers, content=b"{}")
    assert "TOKEN" in refused(answer, 401)["message"] and answer.headers["www-authenticate"] == "Bearer"


def test_health_and_the_page_need_no_token(url):
    assert [httpx.get(url + path).status_code for path in ("/", "/healthz", "/readyz")] == [200] * 3


def test_another_content_type_is_not_read_as_json(client):
    answer = client.post(
        "/rerank", content=b'{"query": "a", "documents": ["b"]}', headers={"content-type": "text/plain"}
    )
    refused(answer, 422)


def test_what_was_sent_is_not_repeated(client):
    answer = client.post("/rerank", json={"query": "<script>alert(1)</script>", "documents": 5})
    assert "script" not in answer.text


# every endpoint's schema, fuzzed


@pytest.fixture(scope="module")
def api(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json", headers={"authorization": f"Bearer {TOKEN}"})


@pytest.mark.parametrize("path", ["/get_reward", "/classify", "/pooling", "/score", "/rerank"])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_no_request_around_the_schema_breaks_the_server(api, client, path, mode):
    @given(case=api[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def ask(case):
        request = case.as_transport_kwargs(base_url=str(client.base_url))
        answer = client.request(**{name: value for name, value in request.items() if name != "cookies"})
        assert answer.status_code in {200, 400, 405, 413, 422}, answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    ask()
