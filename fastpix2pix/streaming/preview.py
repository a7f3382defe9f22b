"""A page on this machine that shows input | output live: plain HTTP, a page, JPEGs one after the other, figures."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import av
import numpy as np
from PIL import Image

from ..errors import EnvironmentFailed
from .picture import Media, Planes, new_frame, planes_of, to_format

_HOST = "127.0.0.1"
_MOST_FPS = 20  # pictures a second that are made into JPEG
_MOST_SIDE = 960  # pixels of one half
_BOUNDARY = "frame"
_PAGE = Path(__file__).with_name("preview.html")
_POLICY = (
    "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


class Pane:
    """What the page shows of one stream. A picture is taken only where someone looks, at most _MOST_FPS a second."""

    def __init__(self, name: str, figures: Callable[[], dict[str, Any]] = dict) -> None:
        self.name, self.figures = name, figures
        self.viewers = 0
        self.closed = False
        self._pair: tuple[av.VideoFrame, av.VideoFrame, int] | None = None  # input, output, degrees to turn the input
        self._number = 0
        self._next = 0.0
        self._changed = threading.Condition()

    def wanted(self) -> bool:
        """Whether the next picture is to be kept for `show`."""
        return self.viewers > 0 and time.monotonic() >= self._next

    def show(self, input: av.VideoFrame, output: Planes, media: Media) -> None:
        """Take a pair; the output is copied, so that its memory is free again."""
        self._next = time.monotonic() + 1 / _MOST_FPS
        copy = new_frame(media)
        for to, plane in zip(planes_of(copy), output, strict=True):
            to[:] = plane
        with self._changed:
            self._pair, self._number = (input, copy, media.turned), self._number + 1
            self._changed.notify_all()

    def jpeg(self, after: int, timeout: float) -> tuple[int, bytes | None]:
        """The newest pair side by side, once there is one after number `after`."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > after or self.closed, timeout)
            number, pair = self._number, self._pair
        if number <= after or pair is None:
            return after, None
        input, output, turned = pair
        height, width = _half(output.height, output.width)
        right = to_format(output, "rgb", height, width).to_ndarray()
        left = np.rot90(to_format(input, "rgb", input.height, input.width).to_ndarray(), turned // 90)
        shown = Image.fromarray(left).resize((max(1, round(height * left.shape[1] / left.shape[0])), height))
        memory = BytesIO()
        Image.fromarray(np.concatenate([np.asarray(shown), right], axis=1)).save(memory, "JPEG", quality=85)
        return number, memory.getvalue()

    def close(self) -> None:
        """Let those who wait go."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class Preview:
    """The server, in threads of its own. `url` holds a token without which nothing is answered."""

    def __init__(self, port: int, panes: list[Pane]) -> None:
        self.token = secrets.token_urlsafe(16)
        handler = type("Handler", (_Handler,), {"panes": panes, "token": self.token})
        try:
            self._server = ThreadingHTTPServer((_HOST, port), handler)
        except OSError as error:
            raise EnvironmentFailed(f"preview = {port}: {error.strerror}; give another port, or 0 for any") from None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        handler.hosts = {f"{name}:{self.port}" for name in (_HOST, "localhost")}  # type: ignore[attr-defined]
        self.url = f"http://{_HOST}:{self.port}/?token={self.token}"
        self._panes = panes
        threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        for pane in self._panes:
            pane.close()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    panes: list[Pane]
    token: str
    hosts: set[str]
    timeout = 10

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(asked.query).items()}
        if self.headers.get("Host") not in self.hosts:  # a page elsewhere whose name leads here
            return self._refuse(403, "this page is at 127.0.0.1 only")
        if not hmac.compare_digest(query.get("token", "").encode(), self.token.encode()):
            return self._refuse(403, "the address needs the token that the command printed")
        if asked.path == "/":
            names = json.dumps([pane.name for pane in self.panes]).replace("<", "\\u003c")
            page = _PAGE.read_text(encoding="utf-8").replace("/*NAMES*/[]", names)
            return self._answer("text/html; charset=utf-8", page.encode())
        if asked.path == "/figures":
            figures = [pane.figures() for pane in self.panes]
            return self._answer("application/json", json.dumps(figures).encode())
        number = query.get("stream", "0")
        if asked.path == "/pictures" and number.isdecimal() and int(number) < len(self.panes):
            return self._pictures(self.panes[int(number)])
        self._refuse(404, "there is /, /pictures and /figures")

    def _pictures(self, pane: Pane) -> None:
        self.send_response(200)
        self._headers(f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
        pane.viewers += 1
        shown = 0
        try:
            while not pane.closed:
                shown, jpeg = pane.jpeg(shown, 0.5)
                if jpeg is not None:
                    head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    self.wfile.write(head.encode() + jpeg + b"\r\n")
            self.wfile.write(f"--{_BOUNDARY}--\r\n".encode())
        except OSError:  # the page was closed
            pass
        finally:
            pane.viewers -= 1
            self.close_connection = True

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self._headers(kind)
        self.wfile.write(body)

    def _headers(self, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")  # the token is in the address
        self.end_headers()

    def _refuse(self, code: int, why: str) -> None:
        body = why.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self._headers("text/plain; charset=utf-8")
        self.wfile.write(body)

    def log_message(self, *rest: Any) -> None:
        """Not on the command's stderr."""


def _half(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, _MOST_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
