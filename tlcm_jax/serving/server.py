"""The page's server: the standard library's, for this machine alone.

It listens on the loopback address, answers only requests that name it as their host (so that no
other site's name can be pointed at it), takes JSON alone (which other sites' pages cannot send
without being asked about), and of limited size. It runs nothing that it is sent.
"""

import base64
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from absl import logging

from tlcm_jax.serving.studio import Request, Studio

HOST = "127.0.0.1"
MOST_BYTES = 16 * 2**20  # of a request: a picture and a mask, as base64
_PAGE = Path(__file__).parent / "templates" / "page.html"
_SECONDS = 30  # that a request may take to arrive


class Server(ThreadingHTTPServer):
    """Serves a studio's page on the loopback address."""

    daemon_threads = True

    def __init__(self, studio: Studio, port: int, most_bytes: int = MOST_BYTES):
        """Listens.

        Args:
          studio: what draws.
          port: 0 takes a free one.
          most_bytes: of a request.

        Raises:
          OSError: the port is taken.
        """
        super().__init__((HOST, port), _Handler)
        self.studio, self.most_bytes = studio, most_bytes
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        settings = {"steps": studio.most_steps, "teacher": studio.teacher is not None}
        self.page = _PAGE.read_text(encoding="utf-8").replace(
            "__SETTINGS__", json.dumps(settings).replace("<", "\\u003c")
        )

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://{HOST}:{self.server_port}/"


class _Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _SECONDS
    server_version, sys_version = "tlcm_jax", ""

    def do_GET(self) -> None:
        """The page, and nothing else."""
        if not self._is_for_us():
            return
        if self.path != "/":
            self._send(404, "text/plain", b"not found\n")
            return
        self._send(200, "text/html; charset=utf-8", self.server.page.encode())

    def do_POST(self) -> None:
        """`/draw`: a `Request` to `{image, said, seconds}`, or `{error}`."""
        if not self._is_for_us():
            return
        try:
            if self.path != "/draw":
                raise _Refused(404, "not found")
            request = Request.read(self._body())
            started = time.monotonic()
            png, said = self.server.studio.draw(request)
        except _Refused as refused:
            self._answer(refused.status, {"error": str(refused)})
        except ValueError as error:
            self._answer(400, {"error": str(error)})
        except Exception:  # of the model's: told here, not to the page
            logging.exception("drawing failed")
            self._answer(500, {"error": "drawing failed; the terminal says why"})
        else:
            image = "data:image/png;base64," + base64.b64encode(png).decode()
            seconds = round(time.monotonic() - started, 3)
            self._answer(200, {"image": image, "said": said, "seconds": seconds})

    def _is_for_us(self) -> bool:
        if self.headers.get("Host") in self.server.hosts:
            return True
        self._send(403, "text/plain", f"open {self.server.url}\n".encode())
        return False

    def _body(self) -> Any:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "send JSON")
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise _Refused(411, "say how long the request is") from None
        if not 0 <= size <= self.server.most_bytes:
            self.close_connection = True
            raise _Refused(
                413, f"the request has {size} bytes, over {self.server.most_bytes}: send a "
                "smaller picture",
            )  # fmt: skip
        try:
            return json.loads(self.rfile.read(size))
        except (ValueError, RecursionError):
            raise _Refused(400, "this is no JSON") from None

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        try:
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):  # the page has gone on
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: prompts are the user's own business."""
