"""Images a second while a prompt is typed into the page of `kdc-edge serve`, in a headless Chromium.

    PYTHONPATH=. python benchmarks/serve_typing.py bundles/onnx-w8 --keys-per-sec 5

Run from the repository's root. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from serve_load import start

from tests.report.browser import Browser

PROMPT = "a yellow flower with five petals and a red center"
COUNT = "window.made = 0; const finished = finish; finish = (...a) => { window.made += 1; finished(...a) }; 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--keys-per-sec", type=float, default=5.0)
    args = parser.parse_args()
    server, port = start(args.bundle)
    browser = Browser()
    try:
        browser.send("Page.navigate", url=f"http://127.0.0.1:{port}/")
        while not browser.evaluate("document.readyState === 'complete' && location.port !== ''"):
            time.sleep(0.1)
        browser.evaluate(COUNT)
        browser.evaluate("at('prompt').focus(); at('live').checked = true; decided = true; 0")
        began = time.perf_counter()
        for letter in PROMPT:
            browser.send("Input.insertText", text=letter)
            time.sleep(1 / args.keys_per_sec)
        took = time.perf_counter() - began
        made = browser.evaluate("window.made")
    finally:
        browser.close()
        server.terminate()
        server.wait(30)
    print(json.dumps({"keys": len(PROMPT), "sec": took, "images": made, "images_per_sec": made / took}))


if __name__ == "__main__":
    main()
