"""`kdc-edge serve` under good and bad requests: answers by kind, resident memory, and whether it hangs.

    python benchmarks/serve_load.py bundles/onnx-w8 --requests 10000 --clients 8

Starts the server itself. Exit code 1 where a kind gets another answer than it should, where memory grows by more than
--max-growth megabytes after the first tenth, or where the server does not make an image at the end.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PATH = "/v1/images/generations"
GOOD = {"prompt": "a red flower", "num_inference_steps": 1, "seed": 1}
TIMEOUT_SEC = 60.0
SLOW_SEC = 14.0  # longer than the server waits for a body
Answer = int | str


class Client:
    """Sends one request of each kind; every request has a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def post(
        self, body: bytes, headers: dict[str, str] | None = None, method: str = "POST", path: str = PATH
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_SEC)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            return "closed"
        finally:
            connection.close()

    def json(self, **fields: object) -> Answer:
        return self.post(json.dumps(GOOD | fields).encode())

    def dropped(self, sent: bytes, announced: int, wait_sec: float) -> Answer:
        """A client that goes away after `sent`, part of a body or all of it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_SEC) as link:
            head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Length: {announced}\r\n\r\n"
            link.sendall(head.encode() + sent)
            time.sleep(wait_sec)
        return "dropped"

    def slow(self) -> Answer:
        """A body that never ends: a byte a second."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_SEC) as link:
            link.sendall(f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n".encode())
            until = time.monotonic() + SLOW_SEC
            link.settimeout(1.0)
            while time.monotonic() < until:
                try:
                    link.sendall(b" ")
                    if answer := link.recv(64):
                        return int(answer.split()[1])
                except TimeoutError:
                    continue
                except OSError:
                    return "closed"
        return "no answer"


def kinds(client: Client) -> dict[str, tuple[int, Callable[[], Answer], set[Answer]]]:
    """name -> (weight, request, answers that are right)."""
    whole = json.dumps(GOOD).encode()
    return {
        "good": (4, lambda: client.json(), {200, 503}),
        "good, as events": (2, lambda: client.json(stream=True), {200, 503}),
        "no JSON": (10, lambda: client.post(b"{prompt:"), {422}),
        "no UTF-8": (5, lambda: client.post(b'{"prompt": "\xff\xfe"}'), {422}),
        "nested 30,000 deep": (5, lambda: client.post(b"[" * 30_000), {422}),
        "wrong types": (10, lambda: client.json(prompt=3, n="many", seed=[]), {422}),
        "not a number": (5, lambda: client.post(b'{"prompt": "x", "guidance_scale": NaN}'), {422}),
        "10,000 prompts": (5, lambda: client.json(prompt=["x"] * 10_000), {422}),
        "a prompt of 50,000 letters": (5, lambda: client.json(prompt="x" * 50_000), {422}),
        "1 MB of JSON": (5, lambda: client.json(prompt="x" * 1_000_000), {413, "closed"}),
        "10,000 images": (10, lambda: client.json(n=10_000), {422}),
        "99,999 pixels a side": (10, lambda: client.json(size="99999x99999"), {422}),
        "a million steps": (5, lambda: client.json(num_inference_steps=1_000_000), {422}),
        "GET": (5, lambda: client.post(b"", method="GET"), {405}),
        "no such path": (5, lambda: client.post(whole, path="/v1/nothing"), {404}),
        "another host's name": (5, lambda: client.post(whole, {"Host": "evil.example"}), {421}),
        "a page of another origin": (5, lambda: client.post(whole, {"Origin": "http://evil.example"}), {403}),
        "dropped in the body": (5, lambda: client.dropped(whole[:9], 1000, 0.0), {"dropped"}),
        "dropped while it draws": (2, lambda: client.dropped(whole, len(whole), 0.01), {"dropped"}),
    }


def start(bundle: Path) -> tuple[subprocess.Popen[str], int]:
    """The server's process and its port."""
    command = [sys.executable, "-m", "kdc_edge", "serve", "--bundle", str(bundle), "--port", "0", "--threads", "1"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if "http://" in line:
            threading.Thread(target=lambda: collections.deque(server.stderr, 0), daemon=True).start()  # type: ignore[arg-type]
            return server, int(line.split("/")[2].rpartition(":")[2])
    raise SystemExit("the server does not start")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--slow-clients", type=int, default=20)
    parser.add_argument("--max-growth", type=float, default=10.0, help="megabytes")
    args = parser.parse_args()
    server, port = start(args.bundle)
    try:
        return measure(args, Client(port), psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait(30)


def measure(args: argparse.Namespace, client: Client, process: psutil.Process) -> int:
    known = kinds(client)
    order = random.Random(0).choices(list(known), [weight for weight, *_ in known.values()], k=args.requests)
    found: dict[str, collections.Counter[Answer]] = collections.defaultdict(collections.Counter)
    slowest: dict[str, float] = collections.defaultdict(float)
    rss: list[float] = []
    lock, left, slow = threading.Lock(), iter(enumerate(order)), collections.Counter[Answer]()

    def work() -> None:
        while True:
            with lock:
                number, kind = next(left, (0, ""))
            if not kind:
                return
            began = time.perf_counter()
            try:
                answer = known[kind][1]()
            except OSError as error:  # a timeout: the server hangs
                answer = type(error).__name__
            with lock:
                found[kind][answer] += 1
                slowest[kind] = max(slowest[kind], time.perf_counter() - began)
                if number % max(1, args.requests // 10) == 0:
                    rss.append(process.memory_info().rss / 1e6)

    def wait() -> None:
        answer = client.slow()
        with lock:
            slow[answer] += 1

    assert client.json() == 200  # the networks are loaded
    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(args.clients)]
    threads += [threading.Thread(target=wait) for _ in range(args.slow_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    time.sleep(1)
    rss.append(process.memory_info().rss / 1e6)
    print("| request | answers | slowest, s |\n|---|---|---:|")
    wrong = []
    for kind, answers in found.items():
        print(f"| {kind} | {_text(answers)} | {slowest[kind]:.2f} |")
        wrong += [f"{kind}: {answer}" for answer in answers if answer not in known[kind][2]]
    if args.slow_clients:
        print(f"| a byte a second | {_text(slow)} | |")
        wrong += [f"a byte a second: {answer}" for answer in slow if answer != 408]
    growth = rss[-1] - rss[1]
    if growth > args.max_growth:
        wrong.append(f"memory grows by {growth:.1f} MB")
    if (answer := client.json()) != 200:
        wrong.append(f"the last good request is answered with {answer}")
    print(f"\n{args.requests} requests in {took:.0f} s; resident memory in MB: {', '.join(f'{v:.1f}' for v in rss)}")
    print(json.dumps({"requests": args.requests, "sec": took, "rss_mb": rss, "wrong": wrong}))
    return 1 if wrong else 0


def _text(answers: collections.Counter[Answer]) -> str:
    return ", ".join(f"{count} x {answer}" for answer, count in answers.most_common())


if __name__ == "__main__":
    raise SystemExit(main())
