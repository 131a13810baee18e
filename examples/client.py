"""Images from `kdc-edge serve` over HTTP, with the standard library alone.

The request has the shape of OpenAI's images interface, so that its client libraries work too.

kdc-edge serve --bundle bundles/onnx-fp16
python examples/client.py http://127.0.0.1:8000 "a red flower" 2
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TRIES = 5


def ask(server: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The images of a request; waits as long as a full server says. Raises urllib.error.HTTPError."""
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("KDC_EDGE_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"{server}/v1/images/generations", json.dumps(body).encode(), headers)
    for _ in range(TRIES - 1):
        try:
            return _images(request)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(int(error.headers.get("Retry-After", 5)))
            error.close()
    return _images(request)


def _images(request: urllib.request.Request) -> list[dict[str, Any]]:
    with urllib.request.urlopen(request) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]
    return found


def main(server: str, prompt: str, count: str = "1") -> None:
    try:
        images = ask(server, {"prompt": prompt, "n": int(count), "response_format": "b64_json"})
    except urllib.error.HTTPError as error:
        with error:
            sys.exit(json.load(error)["error"]["message"])
    for image in images:
        out = Path(f"image-{image['seed']}.png")
        out.write_bytes(base64.b64decode(image["b64_json"]))
        print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
