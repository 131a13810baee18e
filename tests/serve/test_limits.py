"""kdc-edge serve within its limits: huge bodies, other origins, tokens, a full queue, clients that go away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from starlette.testclient import TestClient

from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request
from kdc_edge.serve import app as module
from kdc_edge.serve.app import make_app
from kdc_edge.serve.worker import Busy, Event, Finished, Step, Worker
from tests.serve.client import PROMPT, URL, ask, events, listening, message, wait_for


def test_a_huge_body_is_cut_off(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 1024

    assert client.post(URL, content=endless()).status_code == 413


def test_other_methods_and_paths_are_refused(client: TestClient) -> None:
    assert client.get(URL).status_code == 405
    assert client.get("/../../etc/passwd").status_code == 404


def test_pages_of_other_origins_and_other_names_of_this_host_are_refused(client: TestClient) -> None:
    for headers, status in (
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "rebound.example"}, 421),
        ({"Host": "["}, 400),
        ({"Origin": "http://["}, 400),
        ({"Origin": "http://testserver"}, 200),
    ):
        body = {"prompt": PROMPT, "num_inference_steps": 1}
        assert client.post(URL, json=body, headers=headers).status_code == status


def test_allowed_names_are_read_as_browsers_write_them(worker: Worker) -> None:
    client = TestClient(make_app(worker, hosts=frozenset({"MyDesk.local"})))
    assert client.get("/health", headers={"Host": "mydesk.local:8000"}).status_code == 200


def test_a_token_is_asked_for_where_there_is_one(worker: Worker) -> None:
    client = TestClient(make_app(worker, token="geheim"))
    assert ask(client).status_code == 401
    assert client.get("/metrics").status_code == 401
    assert client.get("/").status_code == client.get("/health").status_code == 200
    client.headers["Authorization"] = "Bearer geheim"
    assert ask(client).status_code == 200


def test_a_fault_has_the_shape_of_every_error(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.pipeline, "check", None)
    answer = ask(TestClient(make_app(worker), raise_server_exceptions=False))
    assert (answer.status_code, message(answer)[:31]) == (500, "the request could not be met; t")


class Slow:
    """A worker's pipeline whose steps wait until they may go on."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self.model = pipeline, pipeline.model
        self.unread = pipeline.unread
        self.may_go_on = threading.Event()
        self.begun = threading.Semaphore(0)

    def check(self, request: Request) -> None:
        self._pipeline.check(request)

    def run(self, request: Request) -> Iterator[Any]:
        for done in self._pipeline.run(request):
            if done.stage == "unet":
                self.begun.release()
                self.may_go_on.wait(30)
            yield done


def submit(worker: Worker, steps: int = 2) -> list[Event]:
    found: list[Event] = []
    worker.submit([Request(PROMPT, steps=steps)], found.append)
    return found


def test_a_full_queue_is_a_503_and_waiting_jobs_are_done_in_order(pipeline: Pipeline) -> None:
    slow = Slow(pipeline)
    worker = Worker(slow, name="slow", waiting=1)  # type: ignore[arg-type]
    first = submit(worker)
    assert slow.begun.acquire(timeout=30)
    second = submit(worker)
    client = TestClient(make_app(worker))
    answer = ask(client)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    slow.may_go_on.set()
    wait_for(lambda: first and second and isinstance(second[-1], Finished))
    assert isinstance(first[-1], Finished)
    assert "kdc_edge_jobs_refused_total 1" in client.get("/metrics").text
    worker.close()


def test_a_job_that_was_cancelled_gives_its_place_to_the_next(pipeline: Pipeline) -> None:
    """Else one who types a prompt while a long step is in work fills the queue with what nobody waits for."""
    slow = Slow(pipeline)
    worker = Worker(slow, name="slow", waiting=1)  # type: ignore[arg-type]
    submit(worker)
    assert slow.begun.acquire(timeout=30)
    for _ in range(3):
        worker.submit([Request(PROMPT, steps=1)], lambda _: None).cancel()
    last = submit(worker)
    assert (worker.waiting, worker.counts.cancelled) == (1, 3)
    with pytest.raises(Busy, match="the queue is full"):
        submit(worker)
    slow.may_go_on.set()
    wait_for(lambda: last and isinstance(last[-1], Finished))
    worker.close()


def test_a_server_that_ends_answers_everyone_at_once(pipeline: Pipeline) -> None:
    """The step in work takes longer than the server waits, and prints no traceback."""
    slow = Slow(pipeline)
    worker = Worker(slow, name="slow", waiting=4)  # type: ignore[arg-type]
    answers: list[Any] = []

    def client(stream: bool) -> None:
        with httpx.Client(base_url=address, timeout=30) as http:
            answers.append(ask(http, stream=stream))

    threads = [threading.Thread(target=client, args=(stream,)) for stream in (True, False, True)]
    with listening(worker) as address:
        for thread in threads:
            thread.start()
        assert slow.begun.acquire(timeout=30)
        wait_for(lambda: worker.waiting == 2)
        begun = time.monotonic()
    for thread in threads:
        thread.join(30)
    assert time.monotonic() - begun < 4
    assert sorted(answer.status_code for answer in answers) == [200, 200, 500]
    assert all("the server ends" in answer.text for answer in answers)
    with pytest.raises(Busy, match="the server ends"):
        submit(worker)
    slow.may_go_on.set()
    worker.close()
    assert not worker.alive


def test_a_stream_of_an_image_that_overflows_ends_with_the_reason(pipeline: Pipeline) -> None:
    unet = pipeline.components["unet"]
    overflowing = {**pipeline.components, "unet": lambda **inputs: np.full_like(unet(**inputs), np.nan)}
    worker = Worker(Pipeline(pipeline.model, pipeline.tokenizer, overflowing), name="overflowing")
    found = events(ask(TestClient(make_app(worker)), stream=True).text)
    assert [name for name, _ in found] == ["step", "step", "error"]
    assert "values that are no numbers" in found[-1][1]["message"]
    worker.close()


def test_a_failure_is_said_and_the_next_job_works(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_request: Request) -> Iterator[Any]:
        raise ZeroDivisionError("inside the engine")
        yield

    monkeypatch.setattr(module, "RETRY_SEC", 1)
    client = TestClient(make_app(worker))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.pipeline, "run", broken, raising=False)
        patch.setattr("threading.excepthook", lambda _: None)
        answer = ask(client)
        assert answer.status_code == 500
        assert message(answer).startswith("ZeroDivisionError: the image could not be made")
        assert [name for name, _ in events(ask(client, stream=True).text)] == ["error"]
    assert ask(client).status_code == 200
    assert client.get("/health").json() == {"status": "ok"}


def test_a_client_that_goes_away_stops_its_image(pipeline: Pipeline) -> None:
    worker = Worker(pipeline, name="garden", waiting=2)
    with listening(worker) as address:
        body = {"prompt": PROMPT, "num_inference_steps": 500}
        with httpx.Client(base_url=address) as client:
            with client.stream("POST", URL, json=body | {"stream": True}, timeout=30) as answer:
                assert next(answer.iter_lines()) == "event: step"
            wait_for(lambda: worker.counts.cancelled == 1)
            with pytest.raises(httpx.ReadTimeout):
                client.post(URL, json=body, timeout=httpx.Timeout(5, read=1))
            wait_for(lambda: worker.counts.cancelled == 2)
        with httpx.Client(base_url=address, timeout=30) as client:
            assert ask(client).status_code == 200
    worker.close()


def test_a_client_that_never_sends_its_body_is_let_go(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_SEC", 0.2)
    worker = Worker(pipeline, name="garden", waiting=2)
    with listening(worker) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(f"POST {URL} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in sock.recv(4096)
        with httpx.Client(base_url=address, timeout=30) as client:
            assert ask(client).status_code == 200
    worker.close()


def test_two_hundred_requests_leave_memory_where_it_was(client: TestClient, worker: Worker) -> None:
    """Good and bad ones in turns; the large run has 10,000 (docs/serve.md)."""
    for _ in range(20):
        ask(client, num_inference_steps=1)
    process = psutil.Process()
    before = process.memory_info().rss
    for i in range(200):
        answer = ask(client, **({"n": "x" * 1000} if i % 10 else {"num_inference_steps": 1}))
        assert answer.status_code == (422 if i % 10 else 200)
    assert process.memory_info().rss - before < 50e6
    assert worker.waiting == 0


def test_previews_are_dropped_while_a_client_is_slow(pipeline: Pipeline) -> None:
    """A job's events that nobody reads do not pile up."""
    import asyncio

    async def pile_up() -> int:
        found = module._Events()
        for i in range(1000):
            found.emit(Step(0, i + 1, 1000, np.zeros((1, 4, 16, 16), np.float32)))
            await asyncio.sleep(0)
        found.emit(Finished())
        await asyncio.sleep(0)
        return len([event async for event in found])

    assert pipeline is not None
    assert asyncio.run(pile_up()) <= module.MAX_PENDING_STEPS + 1
