"""kdc-edge serve over HTTP: images in OpenAI's shape, events, limits, origins, a full queue, clients that go away."""

from __future__ import annotations

import base64
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from kdc_edge.image import read_parameters
from kdc_edge.manifest import Sampling
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.serve import app as module
from kdc_edge.serve.app import make_app
from kdc_edge.serve.body import Limits
from kdc_edge.serve.worker import Event, Finished, Step, Worker

URL = "/v1/images/generations"
PROMPT = "a red flower with five petals and a yellow center on a sky background"


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return open_pipeline(bundle, threads=1)


@pytest.fixture
def worker(pipeline: Pipeline) -> Iterator[Worker]:
    worker = Worker(pipeline, name="garden", waiting=2)
    yield worker
    worker.close()


@pytest.fixture
def client(worker: Worker) -> Iterator[TestClient]:
    with TestClient(make_app(worker)) as client:
        yield client


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


def test_images_are_those_of_the_pipeline_with_seeds_that_count_up(client: TestClient, pipeline: Pipeline) -> None:
    answer = ask(client, n=2, model="dall-e-3", user="somebody").json()
    assert [item["seed"] for item in answer["data"]] == [1, 2]
    for item in answer["data"]:
        expected = pipeline.generate(Request(PROMPT, steps=2, seed=item["seed"], sampler="ddim"))
        assert np.array_equal(pixels(item), expected)


def test_what_a_safety_checker_blanks_is_said(pipeline: Pipeline) -> None:
    """Flags every second image; without one, nothing is claimed."""
    scores = itertools.cycle([np.full((1, 17), -1.0), np.full((1, 17), 0.1)])
    checked = Pipeline(
        pipeline.model, pipeline.tokenizer, {**pipeline.components, "safety_checker": lambda **_: next(scores)}
    )
    worker = Worker(checked, name="checked")
    with TestClient(make_app(worker)) as client:
        items = ask(client, n=2).json()["data"]
        assert [item["nsfw_content_detected"] for item in items] == [False, True]
        assert [bool(pixels(item).any()) for item in items] == [True, False]
        found = [data for name, data in events(ask(client, n=2, stream=True).text) if name == "image"]
        assert [(data["seed"], data["nsfw_content_detected"]) for data in found] == [(1, False), (2, True)]
    worker.close()
    unchecked = Worker(pipeline, name="garden")
    with TestClient(make_app(unchecked)) as client:
        assert "nsfw_content_detected" not in ask(client).json()["data"][0]
    unchecked.close()


def test_a_prompt_of_any_length_is_cut_and_the_answer_says_so(client: TestClient) -> None:
    text = "petals " * 400
    for stream in (False, True):
        answer = ask(client, prompt=text, negative_prompt=text, stream=stream)
        item = events(answer.text)[-2][1] if stream else answer.json()["data"][0]
        assert item["revised_prompt"] == text[:2000]
    assert "revised_prompt" not in ask(client, prompt="x" * 2000).json()["data"][0]


def test_an_answer_says_what_was_done_in_another_way_than_asked(pipeline: Pipeline) -> None:
    few_steps = pipeline.model.model_copy(update={"sampling": Sampling(scheduler="ddim", steps=1, guidance=1.0)})
    worker = Worker(Pipeline(few_steps, pipeline.tokenizer, pipeline.components), name="few steps")
    with TestClient(make_app(worker)) as client:
        for stream in (False, True):
            answer = ask(client, guidance_scale=3, stream=stream)
            item = events(answer.text)[-2][1] if stream else answer.json()["data"][0]
            assert item["note"].startswith("guidance 3 is given to a student that was trained without")
        assert "note" not in ask(client).json()["data"][0]
    worker.close()


def test_a_stream_has_every_step_with_a_preview_then_the_image(client: TestClient, tmp_path: Path) -> None:
    found = events(ask(client, stream=True, num_inference_steps=3).text)
    assert [name for name, _ in found] == ["step", "step", "step", "image", "done"]
    assert [(data["step"], data["steps"]) for name, data in found if name == "step"] == [(1, 3), (2, 3), (3, 3)]
    assert pixels({"b64_json": found[0][1]["preview"]}).shape == (16, 16, 3)
    png = tmp_path / "image.png"
    png.write_bytes(base64.b64decode(found[3][1]["b64_json"]))
    assert read_parameters(png) | {"Seed": "1", "Steps": "3", "prompt": PROMPT} == read_parameters(png)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": 3}, "prompt: Input should be a valid string"),
        ({"prompt": ["a"] * 10_000}, "prompt: Input should be a valid string"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 5}, "n is 5: this server makes at most 4 images"),
        ({"n": 10**30}, "this server makes at most 4"),
        ({"num_inference_steps": 101}, "this server takes at most 100"),
        ({"num_inference_steps": 1.5}, "num_inference_steps: Input should be a valid integer"),
        ({"guidance_scale": "inf"}, "guidance_scale: Input should be a finite number"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**64}, "seed: Input should be less than"),
        ({"size": "64x63"}, "--height 63 cannot be made: use a multiple of"),
        ({"size": "99999x99999"}, "this server makes at most 1048576 pixels"),
        ({"size": "big"}, "size: String should match pattern"),
        ({"response_format": "url"}, "response_format: Input should be 'b64_json'"),
        ({"scheduler": "euler_a\x1b[31m"}, "choose from ddim"),
    ],
)
def test_bad_requests_are_a_clear_422(client: TestClient, fields: dict[str, Any], words: str) -> None:
    answer = ask(client, **fields)
    assert answer.status_code == 422
    assert words in message(answer)
    assert message(answer).isprintable()
    assert len(message(answer)) <= 500


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 60_000])
def test_bodies_that_are_no_request_are_refused(client: TestClient, body: bytes) -> None:
    answer = client.post(URL, content=body)
    assert answer.status_code == 422
    assert len(message(answer)) <= 500


def base64_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def changing(checkpoint: Path) -> Iterator[tuple[TestClient, Any]]:
    pipeline = open_pipeline(checkpoint, threads=1)
    worker = Worker(pipeline, name="checkpoint", waiting=2)
    with TestClient(make_app(worker, limits=Limits(input_pixels=10_000))) as client:
        yield client, pipeline
    worker.close()


EDITS = "/v1/images/edits"


def test_an_image_is_changed_as_the_pipeline_does(changing: tuple[TestClient, Any]) -> None:
    client, pipeline = changing
    image = Image.new("RGB", (80, 60), "teal")
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (16, 16, 48, 48))
    body = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 1, "image": base64_of(image)}
    for url in ("", "data:image/png;base64,"):
        answer = client.post(EDITS, json=body | {"image": url + body["image"], "strength": 0.5, "n": 2}).json()
        assert [item["seed"] for item in answer["data"]] == [1, 2]
        expected = pipeline(PROMPT, image=image, strength=0.5, num_inference_steps=4, seed=2).images[0]
        assert np.array_equal(pixels(answer["data"][1]), np.asarray(expected))
    found = events(client.post(EDITS, json=body | {"mask": base64_of(mask), "stream": True}).text)
    assert [name for name, _ in found] == ["step"] * 4 + ["image", "done"]
    expected = pipeline(
        PROMPT, image=image, mask_image=mask.getchannel("A").point(lambda a: 255 - a), num_inference_steps=4, seed=1
    ).images[0]
    assert np.array_equal(pixels(found[4][1]), np.asarray(expected))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image": None}, "image: Input should be a valid string"),
        ({"image": "§"}, "image is not in base64"),
        ({"image": base64.b64encode(b"no image").decode()}, "the image cannot be used: cannot be read as an image"),
        ({"image": base64_of(Image.new("L", (200, 51)))}, "the image cannot be used: more than 0.01 million pixels"),
        ({"mask": base64_of(Image.new("L", (9, 9)))}, "nothing is repainted"),
        ({"strength": 0}, "strength: Input should be greater than 0"),
        ({"strength": 0.1}, "--strength 0.1 of 2 steps is none"),
    ],
)
def test_bad_edits_are_a_clear_422(changing: tuple[TestClient, Any], fields: dict[str, Any], words: str) -> None:
    image = base64_of(Image.new("RGB", (80, 60)))
    body = {"prompt": PROMPT, "num_inference_steps": 2, "image": image} | fields
    answer = changing[0].post(EDITS, json=body)
    assert (answer.status_code, words in message(answer)) == (422, True), message(answer)


def test_a_bundle_without_an_encoder_says_so_and_images_are_bounded(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client.post(EDITS, json={"prompt": PROMPT, "image": base64_of(Image.new("RGB", (9, 9)))})
    assert answer.status_code == 422
    assert "export --with vae_encoder" in message(answer)
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAX_EDITS", 0)
        assert client.post(EDITS, json={"prompt": PROMPT, "image": ""}).status_code == 503
    monkeypatch.setattr(module, "MAX_EDIT_BYTES", 1000)
    assert client.post(EDITS, json={"prompt": PROMPT, "image": "x" * 1000}).status_code == 413


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
        ({"Origin": "http://testserver"}, 200),
    ):
        body = {"prompt": PROMPT, "num_inference_steps": 1}
        assert client.post(URL, json=body, headers=headers).status_code == status


def test_a_token_is_asked_for_where_there_is_one(worker: Worker) -> None:
    client = TestClient(make_app(worker, token="geheim"))
    assert ask(client).status_code == 401
    assert client.get("/metrics").status_code == 401
    assert client.get("/").status_code == client.get("/health").status_code == 200
    client.headers["Authorization"] = "Bearer geheim"
    assert ask(client).status_code == 200


class Slow:
    """A worker's pipeline whose steps wait until they may go on."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self.model = pipeline, pipeline.model
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


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


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


@contextmanager
def listening(worker: Worker) -> Iterator[str]:
    """A real server on a free port of this machine."""
    config = uvicorn.Config(
        make_app(worker, limits=Limits(steps=1000)), port=0, log_config=None, log_level="error", lifespan="off"
    )
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


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
