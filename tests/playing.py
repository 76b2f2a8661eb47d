"""The page of a model to play with, over HTTP."""

import base64
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from dblocks_jax.modes.serving import DemoServer


@contextmanager
def served(server: DemoServer) -> Iterator[DemoServer]:
    """A server at work in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.close()
        thread.join()


def send(server: DemoServer, body: Any, method: str = "POST", path: str = "/answer", **headers: str) -> tuple[int, str]:
    """(status, all that is answered); a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    reply = connection.getresponse()
    found = reply.status, reply.read().decode()
    connection.close()
    return found


def frames(server: DemoServer, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """An answer."""
    status, text = send(server, wanted)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def mistake(server: DemoServer, body: Any, status: int = 400, **how: str) -> str:
    """The one line that a mistake is answered with."""
    found, text = send(server, body, **how)
    assert found == status and text.count("\n") == 1 and "Traceback" not in text
    return json.loads(text)["error"]


def png(pixels: np.ndarray) -> str:
    """A PNG file in base64."""
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels_of(uri: str) -> np.ndarray:
    """The picture of a data: address."""
    return np.asarray(Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])), formats=["PNG"]))
