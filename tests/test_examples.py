"""The scripts of examples/, each run as its first lines say, in an empty folder."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import queue
import runpy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

import kdc_edge
from kdc_edge.image import read_parameters
from kdc_edge.serve.app import make_app
from kdc_edge.serve.worker import Worker

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROMPT = "a red flower"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> kdc_edge.Pipeline:
    return kdc_edge.Pipeline.open(bundle)


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def expected(pipeline: kdc_edge.Pipeline, prompt: str, seed: int) -> np.ndarray:
    return np.asarray(pipeline(prompt, seed=seed).images[0])


def test_generate(
    bundle: Path, pipeline: kdc_edge.Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "generate.py", bundle, PROMPT, "flower.png")
    assert np.array_equal(pixels("flower.png"), expected(pipeline, PROMPT, 1))
    assert capsys.readouterr().out == "flower.png\n"
    with pytest.raises(SystemExit, match="absent"):
        run(monkeypatch, "generate.py", "absent", PROMPT, "flower.png")


def test_stream(
    bundle: Path, pipeline: kdc_edge.Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "stream.py", bundle, PROMPT, "flower.png")
    assert np.array_equal(pixels("flower.png"), expected(pipeline, PROMPT, 1))
    assert capsys.readouterr().out.splitlines() == [f"step {i} of 20" for i in range(1, 21)]


def test_stream_leaves_a_preview_where_it_is_cancelled(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = kdc_edge.Pipeline.stream

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield next(iter(stream(*arguments, **options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(kdc_edge.Pipeline, "stream", interrupted)
    run(monkeypatch, "stream.py", bundle, PROMPT, "flower.png")
    assert pixels("flower.png").shape == (256, 256, 3)
    assert capsys.readouterr().out == "step 1 of 20\ncancelled: flower.png has the last preview\n"


def test_worker(bundle: Path, pipeline: kdc_edge.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "worker.py", bundle, PROMPT, "a blue fish")
    for seed, prompt in enumerate((PROMPT, "a blue fish")):
        assert np.array_equal(pixels(f"worker-{seed}.png"), expected(pipeline, prompt, seed))


def test_the_worker_refuses_what_exceeds_its_queue_and_survives_errors(bundle: Path) -> None:
    worker = runpy.run_path(str(EXAMPLES / "worker.py"))["Worker"](str(bundle), waiting=1)
    started, go_on = threading.Event(), threading.Event()
    make = worker._pipeline

    def slow(prompt: str, **options: Any) -> Any:
        started.set()
        assert go_on.wait(30)
        return make(prompt, num_inference_steps=1, **options)

    worker._pipeline = slow
    wrong = worker.submit(PROMPT, -1)
    assert started.wait(30)
    image = worker.submit(PROMPT, 1)
    with pytest.raises(queue.Full):
        worker.submit(PROMPT, 2)
    go_on.set()
    worker.close()
    with pytest.raises(kdc_edge.KdcError):
        wrong.result()
    assert image.result().size == (64, 64)


def test_seeds(bundle: Path, pipeline: kdc_edge.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "seeds.py", bundle, PROMPT, "sheet.png", "5", "1", "2", "3", "4")
    sheet = pixels("sheet.png")
    assert sheet.shape == (128, 256, 3)
    for i, seed in ((0, 5), (4, 4)):
        tile = sheet[i // 4 * 64 :, i % 4 * 64 :][:64, :64].astype(int)
        assert abs(tile - expected(pipeline, PROMPT, seed)).max() <= 1


def test_client(
    pipeline: kdc_edge.Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KDC_EDGE_TOKEN", "secret")
    with serving(pipeline, token="secret") as server:
        run(monkeypatch, "client.py", server, PROMPT, "2")
        names = capsys.readouterr().out.split()
        assert sorted(names) == sorted(path.name for path in folder.glob("image-*.png"))
        assert len(names) == 2
        for name in names:
            seed = int(read_parameters(Path(name))["Seed"])
            assert np.array_equal(pixels(name), expected(pipeline, PROMPT, seed))
        with pytest.raises(SystemExit, match="at most 4 images"):
            run(monkeypatch, "client.py", server, PROMPT, "5")
        monkeypatch.delenv("KDC_EDGE_TOKEN")
        with pytest.raises(SystemExit, match="a token is needed"):
            run(monkeypatch, "client.py", server, PROMPT)


def test_the_client_waits_for_a_full_server(monkeypatch: pytest.MonkeyPatch) -> None:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    image = {"b64_json": base64.b64encode(png.getvalue()).decode(), "seed": 7}
    answers = [(503, {"error": {"message": "full"}}), (200, {"data": [image]})]

    class Full(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = answers.pop(0)
            self.send_response(status)
            self.send_header("Retry-After", "3")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    waited: list[int] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with http.server.HTTPServer(("127.0.0.1", 0), Full) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            run(monkeypatch, "client.py", f"http://127.0.0.1:{server.server_port}", PROMPT)
        finally:
            server.shutdown()
            thread.join()
    assert waited == [3]
    assert pixels("image-7.png").shape == (8, 8, 3)


def test_every_script_is_named_in_the_docs() -> None:
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert scripts == ["client.py", "generate.py", "seeds.py", "stream.py", "worker.py"]
    for page in ("docs/python.md", "examples/README.md"):
        text = (ROOT / page).read_text("utf-8")
        assert [name for name in scripts if name not in text] == [], page


@contextlib.contextmanager
def serving(pipeline: kdc_edge.Pipeline, token: str) -> Iterator[str]:
    """kdc-edge serve's application on a free port of this machine."""
    worker = Worker(pipeline, name="garden", waiting=2)
    config = uvicorn.Config(make_app(worker, token=token), port=0, log_config=None, log_level="error", lifespan="off")
    sock = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        worker.close()
        assert not thread.is_alive()
