"""A server on a free port, what clients ask it, and how its answers are read."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from kdc_edge.serve.app import make_app
from kdc_edge.serve.body import Limits
from kdc_edge.serve.server import Server
from kdc_edge.serve.worker import Worker

URL = "/v1/images/generations"
EDITS = "/v1/images/edits"
PROMPT = "a red flower with five petals and a yellow center on a sky background"


def ask(client: TestClient | httpx.Client, **fields: Any) -> Any:
    """The response of either client: starlette's has a class of its own."""
    return client.post(URL, json={"prompt": PROMPT, "num_inference_steps": 2, "seed": 1} | fields)


def pixels(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def message(answer: Any) -> str:
    found = answer.json()["error"]["message"]
    assert isinstance(found, str)
    return found


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def base64_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@contextmanager
def listening(worker: Worker) -> Iterator[str]:
    """A real server on a free port of this machine."""
    server = Server(make_app(worker, limits=Limits(steps=1000)), worker)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
