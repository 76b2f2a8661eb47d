"""A page and its answers over HTTP, for the browsers of this machine alone. It knows no task.

Pages of other sites run in the same browser: what they send is refused. They may name this machine by a name of their
own (DNS rebinding), so `Host` must be ours; they may post what a form can hold, so a body must be JSON, which a browser
sends elsewhere only after asking; and where a browser says whose page is asking (`Origin`), it must be ours.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from absl import logging

from dblocks_jax.run.errors import Diverged, UserError, brief
from dblocks_jax.run.naming import shown_lines

HERE = "127.0.0.1"
MOST_BYTES = 16 * 2**20  # of a request
IDLE_SECONDS = 30  # until a connection is given up
LINGER_SECONDS = 1.0  # in all, for what a refused request still sends
CHUNK = 2**16
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Of a page: nothing is loaded from anywhere, and only the script that has this page's nonce runs.
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Answer = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]  # a request -> frames, for JSON


class Refused(Exception):
    """A request that is not taken: (status, why)."""


class DemoServer(ThreadingHTTPServer):
    """Serves `page` at / and the frames of an answer, a line of JSON each, at /answer: one request at a time.

    A frame {"error": ...} is the last one. An error before the first frame has the status 400, or 500 if it is not the
    user's.

    Raises:
      UserError: the port cannot be had.
    """

    daemon_threads = True  # a connection that a browser keeps open must not keep the program alive

    def __init__(self, port: int, page: str, nonce: str, answer: Answer):
        self.page, self.policy, self.answer = page.encode(), POLICY.format(nonce=nonce), answer
        self.lock, self.is_closing = threading.Lock(), False
        try:
            super().__init__((HERE, port), _Handler)
        except OSError as error:
            raise UserError(
                f"--port={port} cannot be had ({error.strerror}): choose another, or 0 for a free one"
            ) from error

    def server_bind(self) -> None:
        """Not that of HTTPServer, which asks the network for this machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HERE, self.server_address[1]

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HERE}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a browser calls us."""
        names = HERE, "localhost"
        return (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == 80 else ()))

    def close(self) -> None:
        """End, when the answer that is being given has ended, which is told to at its next frame."""
        self.is_closing = True
        with self.lock:
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What went wrong is told where it did."""


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = IDLE_SECONDS
    server_version, sys_version = "dblocks_jax", ""

    def do_GET(self) -> None:
        try:
            self._check_host()
            if self.path.split("?")[0] != "/":
                raise Refused(404, "there is nothing but /")
        except Refused as why:
            self._refuse(*why.args)
            return
        self._begin(200, "text/html; charset=utf-8", len(self.server.page))
        self.wfile.write(self.server.page)

    def do_POST(self) -> None:
        try:
            self._check_host()
            wanted = self._read()
        except Refused as why:
            self._refuse(*why.args)
            return
        refused = None
        with suppress(OSError), self.server.lock:  # whoever asked may have gone
            refused = self._answer(wanted)
        if refused is not None:  # after the lock is free: a client may take its time to listen
            self._refuse(*refused)

    def _check_host(self) -> None:
        if self.headers.get_all("Host") not in [[host] for host in self.server.hosts]:
            raise Refused(403, f"this is {self.server.address}, and has no other name")
        if self.headers.get("Origin", "") not in ("", *(f"http://{host}" for host in self.server.hosts)):
            raise Refused(403, "pages of others have no answer here")

    def _read(self) -> dict[str, Any]:
        """The request."""
        if self.path != "/answer":
            raise Refused(404, "there is nothing but /answer")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a request is application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 20:
            raise Refused(411, "a request says its Content-Length")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"that is too large: at most {MOST_BYTES // 2**20} MiB are read")
        try:
            body = self.rfile.read(int(length))
            wanted = json.loads(body.decode(), parse_constant=_no_number)
        except (OSError, ValueError, RecursionError) as error:
            raise Refused(400, f"the request is no JSON ({brief(error)})") from error
        if not isinstance(wanted, dict):
            raise Refused(400, "the request is no object")
        return wanted

    def _answer(self, wanted: dict[str, Any]) -> tuple[int, str] | None:
        """Give an answer; or, before it has begun, say the status and why there is none."""
        if self.server.is_closing:
            return 503, "the program is ending"
        has_begun = False
        try:
            for frame in self.server.answer(wanted):
                line = json.dumps(frame, allow_nan=False).encode() + b"\n"
                if not has_begun:
                    self._begin(200, "application/x-ndjson")
                    has_begun = True
                self.wfile.write(line)
                if self.server.is_closing:
                    break
        except OSError:
            raise
        except Exception as error:
            is_ours = not isinstance(error, UserError | Diverged)
            if is_ours:
                logging.exception("a request was not answered")
            why = f"the program failed: {brief(error)}" if is_ours else str(error)
            if not has_begun:
                return 400 if isinstance(error, UserError) else 500, why
            self.wfile.write(_line(why))
        return None

    def _begin(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        of_page = {"Content-Security-Policy": self.server.policy} if kind.startswith("text/html") else {}
        sized = {} if length is None else {"Content-Length": str(length)}
        for name, value in ({"Content-Type": kind} | HEADERS | of_page | sized).items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: int, why: str) -> None:
        """One line about it, and what was not read is thrown away: else the line would be lost with the connection."""
        line = _line(why)
        with suppress(OSError):
            self._begin(status, "application/x-ndjson", len(line))
            self.wfile.write(line)
            until = time.monotonic() + LINGER_SECONDS
            while (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.rfile.read1(CHUNK):
                    break

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses, as we say it."""
        del explain
        self.close_connection = True
        if not hasattr(self, "headers"):  # it was no HTTP
            self.request_version = "HTTP/1.0"
        self._refuse(code, message or "the request cannot be read")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what matters."""


def _line(why: str) -> bytes:
    return json.dumps({"error": " ".join(shown_lines(why).split())}).encode() + b"\n"


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
