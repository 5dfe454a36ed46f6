"""A loaded bundle in, a page that answers to images dropped on it out: HTTP from the standard library, one machine's.

On loopback unless told otherwise, without passwords or encryption: for looking at a model, not for the open network.
`GET /` is the page, `GET /about` the model, `POST /answer` takes an image's bytes; the latter two answer in JSON.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..errors import CompressorError, InputError
from .answering import require_answer
from .answers import Answer, answers_of
from .fields import printable
from .folders import reason_of
from .images import MOST_PIXELS, crop_for, decoded_picture, picture_inputs
from .loading import Loaded
from .summaries import entries_of

HOST, PORT = "127.0.0.1", 8765
MOST_UPLOAD_BYTES = 1 << 25
MOST_CONNECTIONS = 16
_IDLE_S = 20.0  # of a connection that sends nothing
_PAGE = "page.html"
_MOST_CLASSES = 256  # of a map of classes that a byte a pixel holds


def make_server(model: Loaded, *, host: str = HOST, port: int = PORT, top: int = 5) -> Server:
    """A server that listens and whose `serve_forever` answers; port 0 takes any that is free.

    Raises InputError for a model that takes no images, and for an address that can't be had.
    """
    if model.manifest.preprocessing is None:
        raise InputError("the bundle's model takes no images, so that there is nothing to drop on a page; give inputs")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return Server(model, (host, port), family, top)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"can't listen on {host} port {port}: {reason_of(error)}; give another --host or --port"
        ) from error


def serve(model: Loaded, *, host: str, port: int, top: int) -> None:
    """Answers until Ctrl-C."""
    with make_server(model, host=host, port=port, top=top) as server:
        print(printable(f"runs {model.choice}"), file=sys.stderr)
        if not server.is_local:
            print(f"note: whoever reaches {host} can send it images, without a password", file=sys.stderr)
        print(f"{server.url} answers; Ctrl-C ends it", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)


class Server(ThreadingHTTPServer):
    """A thread a connection, at most some; one answer at a time, as the runtime's threads share the cores anyway."""

    daemon_threads = True

    def __init__(self, model: Loaded, address: tuple[str, int], family: int, top: int) -> None:
        self.address_family = socket.AddressFamily(family)
        self.model, self.top = model, top
        self.page = Path(__file__).with_name(_PAGE).read_bytes()
        self.lock = threading.Lock()
        self.free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.is_local = _is_loopback(address[0])
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Refuses a connection where there are as many as may be."""
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, whatever becomes of it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is nobody's fault; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(printable(f"error: a request failed: {error!r}"[:300]), file=sys.stderr)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Refused(Exception):
    """A request that is not answered, and the line that says why."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "compressor", ""
    timeout = _IDLE_S

    def do_GET(self) -> None:
        """The page, or what the model is."""
        self._answer({"/": self._page, "/about": self._about})

    def do_POST(self) -> None:
        """An image's answer."""
        self._answer({"/answer": self._image})

    def _answer(self, places: Mapping[str, Any]) -> None:
        try:
            self._require_own_page()
            place = places.get(urlsplit(self.path).path)
            if place is None:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here; the page is at /")
            content_type, body = place()
            self._send(HTTPStatus.OK, content_type, body)
        except _Refused as refusal:
            self._say(refusal.status, str(refusal))
        except CompressorError as error:
            self._say(HTTPStatus.BAD_REQUEST, str(error))
        except MemoryError:
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "there is not memory enough for this image; make it smaller")

    def _require_own_page(self) -> None:
        """Another site's page, open in the same browser, may neither read nor send here under a name of its own."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            urlsplit(self.path), urlsplit(self.headers.get("Origin", ""))
        except ValueError as error:  # brackets that hold no address
            raise _Refused(HTTPStatus.BAD_REQUEST, "the request names no address; open the page anew") from error
        if self.server.is_local and not _is_loopback(host):
            raise _Refused(HTTPStatus.FORBIDDEN, "this address is for this machine alone; open it as 127.0.0.1")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise _Refused(HTTPStatus.FORBIDDEN, "another site's page asked for this; open the page here")

    def _page(self) -> tuple[str, bytes]:
        return "text/html; charset=utf-8", self.server.page

    def _about(self) -> tuple[str, bytes]:
        model = self.server.model
        return _json(
            {
                "name": model.manifest.name,
                "task": model.manifest.task,
                "choice": model.choice,
                "most_bytes": MOST_UPLOAD_BYTES,
                "labels": model.manifest.labels,
            }
        )

    def _image(self) -> tuple[str, bytes]:
        content = self._body()
        return _json(answer_to(self.server.model, content, lock=self.server.lock, top=self.server.top))

    def _body(self) -> bytes:
        """What was sent, of a length that was said and is allowed."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]+", length):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "send the image's bytes with their length")
        if len(length) > 12 or int(length) > MOST_UPLOAD_BYTES:
            line = f"the image has more than {MOST_UPLOAD_BYTES >> 20} MB; make it smaller"
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, line)
        content = self.rfile.read(int(length))
        if len(content) != int(length):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the image did not arrive whole; send it again")
        return content

    def _say(self, status: HTTPStatus, line: str) -> None:
        content_type, body = _json({"error": printable(line)})
        self.close_connection = True  # what was sent may not have been read
        self._send(status, content_type, body)

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _policy(self.server.page))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: answers are on the page."""


def answer_to(model: Loaded, content: bytes, *, lock: threading.Lock, top: int = 5) -> dict[str, Any]:
    """What is said of an image's bytes: `entries` as `run` says them, `ms`, where the crop lies, and a map of classes.

    Raises DataError for what is no image, or too large a one.
    """
    preprocessing = model.manifest.preprocessing
    assert preprocessing is not None
    where = "the image"
    picture = decoded_picture(content, where, most_pixels=MOST_PIXELS)
    inputs = picture_inputs(picture, preprocessing, where)
    with lock:
        start_s = time.perf_counter()
        outputs = model.session.run(inputs)
        ms = 1e3 * (time.perf_counter() - start_s)
    (answer,) = answers_of(model.manifest, require_answer(outputs, inputs, model.manifest, where), top=top)
    return {
        "entries": entries_of(answer, model.manifest.labels),
        "outputs": {name: list(array.shape) for name, array in answer.outputs.items()},
        "ms": ms,
        "crop": asdict(crop_for(picture, preprocessing)),
        "map": _map_of(answer),
    }


def _map_of(answer: Answer) -> dict[str, Any] | None:
    """The class of each pixel, a byte each; None where there is none, or more classes than a byte tells."""
    if answer.mask is None or answer.mask.max(initial=0) >= _MOST_CLASSES:
        return None
    height, width = answer.mask.shape
    return {"height": height, "width": width, "data": base64.b64encode(answer.mask.astype(np.uint8).tobytes()).decode()}


def _json(value: Mapping[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(value, allow_nan=False).encode()


def _policy(page: bytes) -> str:
    """The page's own script and style run, nothing else loads: by their hashes, so that no other can be slipped in."""
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text).digest()).decode()
        for kind, text in re.findall(rb"<(script|style)>(.*?)</", page, re.DOTALL)
    }
    script, style = hashes[b"script"], hashes[b"style"]
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
