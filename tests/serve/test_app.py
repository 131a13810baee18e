"""kdc-edge serve over HTTP: images in OpenAI's shape, events, changed images, requests that are refused."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
from kdc_edge.serve.worker import Worker
from tests.serve.client import EDITS, PROMPT, URL, ask, base64_of, events, message, pixels


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


def test_a_null_is_what_is_left_out(client: TestClient) -> None:
    nulls = dict.fromkeys(["n", "size", "response_format", "stream", "negative_prompt", "scheduler", "user"])
    (item,) = ask(client, **nulls).json()["data"]
    np.testing.assert_array_equal(pixels(item), pixels(ask(client).json()["data"][0]))
    assert message(ask(client, prompt=None)) == "prompt: Field required"


def test_what_is_not_read_of_a_prompt_is_said(client: TestClient) -> None:
    (item,) = ask(client, prompt="petals " * 80, num_inference_steps=1).json()["data"]
    assert item["note"].startswith("the prompt is longer than the model reads: left out are its last 5 tokens")


def test_the_models_own_steps_are_brought_within_the_limit(worker: Worker) -> None:
    """Its 20 steps, which a request without a number asks for, and the page with it."""
    limited = TestClient(make_app(worker, limits=Limits(steps=3)))
    found = events(ask(limited, num_inference_steps=None, stream=True).text)
    assert [(data["step"], data["steps"]) for name, data in found if name == "step"] == [(1, 3), (2, 3), (3, 3)]
    assert '"steps": 3,' in limited.get("/").text


def test_a_stream_has_every_step_with_a_preview_then_the_image(
    client: TestClient, pipeline: Any, tmp_path: Path
) -> None:
    found = events(ask(client, stream=True, num_inference_steps=3).text)
    assert [name for name, _ in found] == ["step", "step", "step", "image", "done"]
    assert [(data["step"], data["steps"]) for name, data in found if name == "step"] == [(1, 3), (2, 3), (3, 3)]
    options = {"seed": 1, "num_inference_steps": 3}
    for (_, data), step in zip(found, pipeline.stream(PROMPT, **options), strict=False):
        np.testing.assert_array_equal(pixels({"b64_json": data["preview"]}), step.preview)
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
        ({"size": "64x63"}, "height 63 cannot be made: use a multiple of"),
        ({"size": "99999x99999"}, "this server makes at most 1048576 pixels"),
        ({"size": "\U00010d40x64"}, "size: String should match pattern"),  # a digit to pydantic, none to Python
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


@pytest.fixture(scope="module")
def changing(checkpoint: Path) -> Iterator[tuple[TestClient, Any]]:
    pipeline = open_pipeline(checkpoint, threads=1)
    worker = Worker(pipeline, name="checkpoint", waiting=2)
    with TestClient(make_app(worker, limits=Limits(input_pixels=10_000))) as client:
        yield client, pipeline
    worker.close()


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
        ({"image": None}, "image: Field required"),
        ({"image": "§"}, "image is not in base64"),
        ({"image": base64.b64encode(b"no image").decode()}, "the image cannot be used: cannot be read as an image"),
        ({"image": base64_of(Image.new("L", (200, 51)))}, "the image cannot be used: more than 0.01 million pixels"),
        ({"mask": base64_of(Image.new("L", (9, 9)))}, "nothing is repainted"),
        ({"strength": 0}, "strength: Input should be greater than 0"),
        ({"strength": 0.1}, "strength 0.1 of 2 steps is none"),
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
