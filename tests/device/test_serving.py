"""The page that answers to images: what it says, its limits, and that no other site's page gets through."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compressor import device
from compressor.device import serving
from compressor.device.__main__ import main
from compressor.device.images import load_inputs
from compressor.errors import InputError

from .conftest import PREPROCESSING, small_model, small_outputs
from .test_running import channel_bundle

Ask = Callable[..., tuple[int, dict[str, Any]]]
Serve = Callable[[Path], serving.Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server on a free port; all end with the test."""
    servers: list[serving.Server] = []

    def start(bundle: Path) -> serving.Server:
        server = serving.make_server(device.load(bundle, runtime="onnxruntime"), port=0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server: serving.Server, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
    """Status, headers and body of the answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def post(server: serving.Server, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    status, _, said = ask(server, "POST", "/answer", body, **headers)
    return status, json.loads(said)


def png(pixels: Any, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, kind)
    return file.getvalue()


def test_an_image_is_answered_as_run_answers_it(bundle: Path, serve: Serve, tmp_path: Path) -> None:
    content = png(np.random.default_rng(0).integers(0, 256, (30, 50, 3)))
    (tmp_path / "x.png").write_bytes(content)
    status, said = post(serve(bundle), content)
    row = small_outputs(small_model(), load_inputs(tmp_path / "x.png", PREPROCESSING))[0]
    assert status == 200
    assert [entry["index"] for entry in said["entries"]] == list(np.argsort(-row))
    assert said["ms"] > 0
    assert said["crop"] == {"height": 20, "width": 33, "top": 2, "left": 8, "size": [16, 16]}
    assert said["map"] is None


def test_classes_of_pixels_and_boxes_are_told(tmp_path: Path, serve: Serve) -> None:
    pixels = np.zeros((8, 8))
    pixels[:4, 4:] = 250
    _, said = post(serve(channel_bundle(tmp_path, "segmentation")), png(pixels))
    classes = np.frombuffer(base64.b64decode(said["map"]["data"]), np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(classes, pixels > 0)
    _, said = post(serve(channel_bundle(tmp_path, "detection")), png(pixels))
    assert [entry["box"] for entry in said["entries"]] == [[4.0, 0.0, 8.0, 4.0]]


def test_the_page_loads_nothing_from_elsewhere(bundle: Path, serve: Serve) -> None:
    server = serve(bundle)
    status, headers, page = ask(server, "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"http://" not in page.replace(b"http://www.w3.org", b"")
    assert b"https://" not in page
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert "Python" not in headers["Server"]
    about = json.loads(ask(server, "GET", "/about")[2])
    assert (about["name"], about["task"]) == ("small", "classification")


BAD_IMAGES = {
    "text": (b"no image", "the image can't be read as an image: it is of no format that Pillow knows"),
    "nothing": (b"", "the image can't be read as an image"),
    "truncated": (png(np.zeros((300, 300, 3)))[:200], "the image can't be read as an image: "),
    "many pixels": (png(np.zeros((8000, 8000))), "the image has 8000 x 8000 pixels, more than"),
    "16 bits": (b"P5 2 2 65535 " + b"\0" * 8, "has pixel format"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_one_line_and_the_next_is_answered(bundle: Path, serve: Serve, kind: str) -> None:
    server = serve(bundle)
    body, words = BAD_IMAGES[kind]
    status, said = post(server, body)
    assert status == 400
    assert words in said["error"]
    assert "\n" not in said["error"]
    assert post(server, png(np.zeros((20, 20, 3))))[0] == 200


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ({"Content_Length": str(1 << 26)}, 413, "more than 32 MB"),
        ({"Content_Length": "9" * 30}, 413, "more than 32 MB"),
        ({"Content_Length": "-1"}, 411, "with their length"),
        ({"Origin": "http://elsewhere.example"}, 403, "another site's page"),
        ({"Origin": "null"}, 403, "another site's page"),
        ({"Host": "rebound.example"}, 403, "for this machine alone"),
        ({"Host": "[::"}, 400, "names no address"),
    ],
)
def test_what_is_too_large_or_of_another_site_is_refused(
    bundle: Path, serve: Serve, headers: dict[str, str], status: int, words: str
) -> None:
    answered, said = post(serve(bundle), b"x", **headers)
    assert answered == status
    assert words in said["error"]


def test_there_is_nothing_elsewhere(bundle: Path, serve: Serve) -> None:
    server = serve(bundle)
    for method, path in (("GET", "/../manifest.json"), ("GET", "/answer"), ("POST", "/")):
        assert ask(server, method, path, b"" if method == "POST" else None)[0] == 404
    assert ask(server, "DELETE", "/")[0] == 501


def test_there_are_only_so_many_connections(bundle: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 2)
    server = serve(bundle)
    idle = [socket.create_connection(("127.0.0.1", server.server_address[1])) for _ in range(2)]
    while server.free._value:
        pass
    assert ask(server, "GET", "/")[0] == 503
    for connection in idle:
        connection.close()
    while not server.free._value:
        pass
    assert ask(server, "GET", "/")[0] == 200


def test_where_nothing_can_listen_or_be_shown_is_one_line(
    bundle: Path, pair_bundle: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(serve(bundle).server_address[1])
    flags = ("--serve", "--runtime", "onnxruntime")
    assert main(["run", str(bundle), *flags, "--port", port]) == 2
    assert f"can't listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
    assert main(["run", str(bundle), *flags, "--host", "no.such.host.invalid"]) == 2
    assert "can't listen on no.such.host.invalid" in capsys.readouterr().err
    with pytest.raises(InputError, match="takes no images"):
        serving.make_server(device.load(pair_bundle, runtime="onnxruntime"), port=0)


def test_serve_says_where_it_listens_and_ends_with_ctrl_c(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(server: serving.Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving.Server, "serve_forever", interrupted)
    flags = ("--serve", "--runtime", "onnxruntime", "--port", "0")
    assert main(["run", str(bundle), *flags]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("http://127.0.0.1:")
    assert main(["run", str(bundle), *flags, "--host", "0.0.0.0"]) == 0
    assert "note: whoever reaches 0.0.0.0 can send it images" in capsys.readouterr().err
