"""The pipeline's loop: which U-Net calls a request comes to, and when components are in memory."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from kdc_edge.components import Component, Shapes
from kdc_edge.errors import BundleError, InputError
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.base import COMPONENTS, LoadedComponents
from kdc_edge.runtimes.pipeline import split_devices
from kdc_edge.tokenizer import Tokenizer
from tests.bench.rows import MODEL


class Unet:
    """Answers with a mixture of its inputs, and remembers how it was called."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.prepared: list[Shapes] = []

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        sample, hidden = inputs["sample"], inputs["encoder_hidden_states"]
        assert len(sample) == len(hidden)
        self.batches.append(len(sample))
        return np.asarray(0.1 * sample + hidden.mean((1, 2))[:, None, None, None], np.float32)

    def prepare(self, shapes: Shapes) -> None:
        self.prepared.append(shapes)


def encode(**inputs: np.ndarray) -> np.ndarray:
    """Each prompt's own constant, (B, 77, 8)."""
    ids = inputs["input_ids"]
    return np.repeat(np.repeat((ids.sum(1) % 97 / 97)[:, None, None], 77, 1), 8, 2).astype(np.float32)


def decode(**inputs: np.ndarray) -> np.ndarray:
    latents = inputs["latent_sample"][:, :3]
    return np.asarray(np.tanh(latents).repeat(4, 2).repeat(4, 3), np.float32)


@pytest.fixture
def unet() -> Unet:
    return Unet()


@pytest.fixture
def pipeline(unet: Unet) -> Pipeline:
    components: dict[str, Component] = {"text_encoder": encode, "unet": unet, "vae_decoder": decode}
    return Pipeline(MODEL, Tokenizer.clip(), components)


@pytest.mark.parametrize(
    ("request_", "batches"),
    [
        (Request("a", steps=4), [2, 2, 2, 2]),
        (Request("a", steps=4, guidance=1), [1, 1, 1, 1]),
        (Request("a", steps=2, guidance=0), [1, 1]),
        (Request("a", steps=2, guidance_mode="sequential"), [1, 1, 1, 1]),
        (Request("a", steps=4, guidance_interval=(0.25, 0.75)), [1, 1, 1, 1, 1, 1]),
        (Request("a", steps=4, guidance_interval=(0.25, 0.75), guidance_mode="batched"), [1, 2, 2, 1]),
    ],
)
def test_the_calls_of_a_request(pipeline: Pipeline, unet: Unet, request_: Request, batches: list[int]) -> None:
    stages = [progress.stage for progress in pipeline.prepare(request_)]
    assert stages == ["load", "load", "compile", "load"]
    assert unet.batches == []
    pipeline.generate(request_)
    assert unet.batches == batches
    assert [shapes["sample"][0] for shapes in unet.prepared] == sorted(set(batches))
    assert unet.prepared[0]["encoder_hidden_states"][1:] == (77, -1)  # the width is the network's own


def latents(pipeline: Pipeline, request: Request) -> np.ndarray:
    (*_, last, _) = pipeline.run(request)
    assert last.latents is not None
    return last.latents


def test_both_modes_make_the_same_image(pipeline: Pipeline) -> None:
    batched, sequential = (
        latents(pipeline, Request("a red flower", "blue", steps=3, guidance=3, guidance_mode=mode))
        for mode in ("batched", "sequential")
    )
    np.testing.assert_allclose(batched, sequential, atol=1e-6)


@pytest.mark.parametrize("sampler", ["dpm++2m", "pndm", "lcm"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_of_a_batch_is_the_image_of_its_request(pipeline: Pipeline, sampler: str, guidance: float) -> None:
    """Different prompts, negative prompts and seeds side by side; LCM draws noise at every step."""
    requests = [
        Request("a red flower", "blue", steps=3, guidance=guidance, sampler=sampler, seed=5),
        Request("a fish", steps=3, guidance=guidance, sampler=sampler, seed=7),
        Request("a fish", steps=3, guidance=guidance, sampler=sampler, latents=np.ones((1, 4, 16, 16), np.float32)),
    ]
    *_, last = (done.latents for done in pipeline.run(*requests) if done.latents is not None)
    for i, request in enumerate(requests):
        alone = list(pipeline.run(request))
        np.testing.assert_allclose(last[i], [d.latents for d in alone if d.latents is not None][-1][0], atol=1e-6)
    images = pipeline.generate_batch(requests)
    assert len(images) == 3
    for image, request in zip(images, requests, strict=True):
        assert np.abs(image.astype(int) - pipeline.generate(request)).max() <= 1


def test_a_batch_is_one_call_a_step_and_the_decoder_takes_its_images_in_turn(pipeline: Pipeline, unet: Unet) -> None:
    requests = [Request("a", steps=2, seed=seed) for seed in range(3)]
    decoded = [(done.step, done.steps) for done in pipeline.run(*requests) if done.pixels is not None]
    assert unet.batches == [6, 6]
    assert decoded == [(1, 3), (2, 3), (3, 3)]


def test_requests_that_differ_in_more_than_prompt_and_seed_are_no_batch(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="share steps, guidance, sampler and size"):
        pipeline.check(Request("a"), Request("a", steps=3))
    with pytest.raises(InputError, match="no image is asked for"):
        pipeline.check()


@pytest.mark.parametrize(("max_batch", "free", "sizes"), [(16, 10**12, [6]), (4, 10**12, [3, 3]), (16, 10**7, [1] * 6)])
def test_batches_are_of_one_size_that_memory_allows(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, max_batch: int, free: int, sizes: list[int]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    pipeline.max_batch = max_batch
    requests = [Request("a", seed=seed) for seed in range(6)]
    batches = pipeline.batches(requests)
    assert [len(batch) for batch in batches] == sizes
    assert [request for batch in batches for request in batch] == requests


def test_the_interval_is_where_guidance_is(pipeline: Pipeline) -> None:
    never = latents(pipeline, Request("a red flower", steps=4, guidance=1))
    always = latents(pipeline, Request("a red flower", steps=4, guidance=3))
    first = latents(pipeline, Request("a red flower", steps=4, guidance=3, guidance_interval=(0.0, 0.25)))
    for other in (never, always):
        assert np.abs(first - other).max() > 1e-3


def test_the_prompt_pulls_away_from_the_negative_prompt(pipeline: Pipeline) -> None:
    """noise = without + guidance * (with - without); the fake's answers differ by the prompts' constants alone."""
    ids = {p: pipeline.tokenizer.encode([p]) for p in ("", "red")}
    gap = float(encode(input_ids=ids["red"])[0, 0, 0] - encode(input_ids=ids[""])[0, 0, 0])
    found = [latents(pipeline, Request("red", steps=1, guidance=g, sampler="ddim")) for g in (2.0, 4.0)]
    ratio = (found[1] - found[0]) / (2 * gap)
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-4)
    assert ratio.flat[0] < 0  # noise is taken away


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_mode": "both"}, "guidance mode 'both' is unknown"),
        ({"guidance_interval": (0.7, 0.2)}, "guidance interval 0.7:0.2 is no part"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance interval 0:1.5 is no part"),
        ({"guidance_interval": (0.0, float("nan"))}, "is no part"),
    ],
)
def test_what_is_refused(pipeline: Pipeline, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pipeline.check(Request("a", **changes))  # type: ignore[arg-type]


def test_components_are_loaded_when_asked_for() -> None:
    loaded: list[str] = []

    def load(name: str) -> Component:
        loaded.append(name)
        return encode

    components = LoadedComponents(load)
    assert (loaded, len(components), tuple(components)) == ([], 3, COMPONENTS)
    for name in ("unet", "unet", "vae_decoder", "unet"):
        components[name]
    assert loaded == ["unet", "vae_decoder"]


def test_low_memory_holds_one_component_at_a_time(pipeline: Pipeline) -> None:
    alive: set[str] = set()
    most = 0

    class Counted:
        def __init__(self, name: str) -> None:
            nonlocal most
            self.name = name
            alive.add(name)
            most = max(most, len(alive))

        def __call__(self, **inputs: np.ndarray) -> np.ndarray:
            return pipeline.components[self.name](**inputs)

        def __del__(self) -> None:
            alive.discard(self.name)

    for low_memory, expected in ((True, 1), (False, 3)):
        most = 0
        frugal = Pipeline(MODEL, pipeline.tokenizer, LoadedComponents(Counted, low_memory=low_memory))
        frugal.generate(Request("a", steps=2))
        assert most == expected
        del frugal


def test_devices_by_component() -> None:
    assert split_devices(None) == {}
    assert split_devices("GPU") == {"": "GPU"}
    assert split_devices("unet=GPU,CPU") == {"unet": "GPU", "": "CPU"}
    for wrong in ("unet=", "abacus=GPU", "CPU,GPU", "unet=GPU,unet=CPU", ","):
        with pytest.raises(InputError, match="is not understood"):
            split_devices(wrong)


def test_low_memory_makes_the_same_image(bundle: Path) -> None:
    request = Request("a red flower", steps=2, seed=3)
    usual, frugal = (open_pipeline(bundle, threads=1, low_memory=low).generate(request) for low in (False, True))
    assert np.abs(usual.astype(int) - frugal).max() <= 1  # sums in another order


class Slow:
    """A component that is compiled in the background: it notes for what, and in which thread."""

    made: ClassVar[list[tuple[str, object, str]]] = []

    def __init__(self, name: str) -> None:
        if name == "broken":
            raise BundleError("it is broken")
        self.name = name

    def prepare(self, shapes: Shapes) -> None:
        Slow.made.append((self.name, dict(shapes), threading.current_thread().name))

    def __call__(self, **_inputs: np.ndarray) -> np.ndarray:
        return np.zeros((2, 77, 5), np.float32)


def test_a_component_may_be_compiled_while_another_computes() -> None:
    Slow.made.clear()
    components = LoadedComponents(Slow, compile_ahead=True)
    components.start("unet", [{"sample": (2, 4, 8, 8)}])
    components.start("unet", [{"sample": (1, 4, 8, 8)}])  # it is on its way already
    unet = components["unet"]
    assert components["unet"] is unet
    (name, shapes, thread), *more = Slow.made
    assert (name, shapes, more) == ("unet", {"sample": (2, 4, 8, 8)}, [])
    assert thread != threading.current_thread().name
    components.start("broken", [])
    with pytest.raises(BundleError, match="it is broken"):
        components["broken"]


@pytest.mark.parametrize("options", [{}, {"compile_ahead": True, "low_memory": True}])
def test_nothing_is_compiled_early_where_memory_is_short_or_the_engine_gains_nothing(options: dict[str, bool]) -> None:
    Slow.made.clear()
    components = LoadedComponents(Slow, **options)
    components.start("unet", [{"sample": (2, 4, 8, 8)}])
    assert isinstance(components["unet"], Slow)
    assert Slow.made == []
