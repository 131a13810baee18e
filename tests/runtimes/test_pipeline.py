"""The Python interface: open a folder, call, stream, stop; from several threads too."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kdc_edge
from kdc_edge import Pipeline, Request, tokenizer
from kdc_edge.bundle import Bundle
from kdc_edge.errors import InputError, KdcWarning
from kdc_edge.image import preview
from kdc_edge.pipeline import Progress
from kdc_edge.runtimes import pipeline as runtime_pipeline
from kdc_edge.runtimes.base import Runtime


@pytest.fixture(scope="module")
def pipeline(bundle_fp32: Path) -> Pipeline:
    return Pipeline.open(str(bundle_fp32), threads=1)


def test_the_public_names() -> None:
    names = ["Bundle", "KdcError", "Pipeline", "Request", "__version__", "open_pipeline"]
    assert sorted(kdc_edge.__all__) == names
    assert set(names) <= set(dir(kdc_edge))
    assert all(hasattr(kdc_edge, name) for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'pipline'"):
        kdc_edge.pipline  # noqa: B018


def test_importing_the_package_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import kdc_edge; print(*set(sys.modules) - before)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    ours = {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}
    assert ours == {
        "kdc_edge",
        "kdc_edge.telemetry",
        "kdc_edge.version",
        "openvino_telemetry",
    }  # the last is a name that is blocked


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "kdc_edge", "--version"], check=True, capture_output=True, text=True)
    assert kdc_edge.__version__ in done.stdout


def test_a_call_makes_the_images_of_their_requests(pipeline: Pipeline, tmp_path: Path) -> None:
    made = pipeline(
        ["a red flower", "a fish"], negative_prompt="blue", num_inference_steps=2, guidance_scale=3.0,
        num_images_per_prompt=2, seed=5, scheduler="euler",
    )  # fmt: skip
    assert made.seeds == [5, 6, 7, 8]
    for image, prompt, seed in zip(made.images, ["a red flower"] * 2 + ["a fish"] * 2, made.seeds, strict=True):
        request = Request(prompt, "blue", steps=2, guidance=3.0, seed=seed, sampler="euler")
        assert np.abs(np.asarray(image, int) - pipeline.generate(request)).max() <= 1  # a batch sums in another order
    made.images[0].save(tmp_path / "flower.png")
    assert (tmp_path / "flower.png").stat().st_size > 100


def test_the_defaults_are_the_checkpoints_scheduler_and_the_requests_steps(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def make(*requests: Request) -> Iterator[Progress]:
        asked.extend(requests)
        yield Progress("vae_decoder", 1, 1, pixels=np.zeros((8, 8, 3), np.uint8))

    monkeypatch.setattr(pipeline, "run", make)
    pipeline("a red flower")
    assert asked == [Request("a red flower", sampler="ddim", weighted=True)]


def test_what_is_taken_instead_is_a_warning_at_the_line_that_called(pipeline: Pipeline) -> None:
    unknown = pipeline.model.model_copy(
        update={"scheduler": {**pipeline.model.scheduler, "_class_name": "KDPM2DiscreteScheduler"}}
    )
    other = Pipeline(unknown, pipeline.tokenizer, pipeline.components)
    words = "the checkpoint's scheduler is KDPM2DiscreteScheduler; .*: dpm\\+\\+2m is taken"
    with pytest.warns(KdcWarning, match=words) as called:
        other("a", num_inference_steps=1)
    with pytest.warns(KdcWarning, match=words) as streamed:
        other.stream("a", num_inference_steps=1)
    assert {warning.filename for warning in [*called, *streamed]} == {__file__}
    other("a", num_inference_steps=1, scheduler="ddim")  # no warning, which would be an error here


def test_seeds_are_one_an_image(pipeline: Pipeline) -> None:
    assert pipeline("a", seed=[9, 3], num_images_per_prompt=2, num_inference_steps=1).seeds == [9, 3]
    with pytest.raises(InputError, match="2 seeds are given for 1 images"):
        pipeline("a", seed=[9, 3])
    with pytest.raises(InputError, match="num_images_per_prompt is 0"):
        pipeline("a", num_images_per_prompt=0)
    with pytest.raises(InputError, match="no image is asked for"):
        pipeline([])
    with pytest.raises(InputError, match="not a whole number"):
        pipeline("a", seed=-1)


def test_what_diffusers_callers_write_is_taken(pipeline: Pipeline) -> None:
    as_here = pipeline("a", num_inference_steps=1)
    as_there = pipeline("a", num_inference_steps=1, negative_prompt=None, width=128 / 2, height=np.int64(64))
    assert as_here.images[0].tobytes() == as_there.images[0].tobytes()
    with pytest.raises(InputError, match="the seed is None"):
        pipeline("a", seed=None)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_taken(pipeline: Pipeline) -> None:
    made = pipeline("a", num_inference_steps=np.int64(1), seed=np.int32(2**31 - 1), num_images_per_prompt=2)  # type: ignore[arg-type]
    assert made.seeds == [2**31 - 1, 2**31]
    assert made.images[0] == pipeline("a", num_inference_steps=1, seed=2**31 - 1).images[0]


@pytest.mark.parametrize(
    "options",
    [
        {"width": 65},
        {"width": 4096, "height": 2**20},
        {"num_inference_steps": 0},
        {"guidance_scale": 101},
        {"scheduler": "magic"},
        {"image": Image.new("RGB", (9, 9)), "strength": 0.5},
    ],
)
def test_no_error_names_an_option_of_the_command_line(pipeline: Pipeline, options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as refused:
        pipeline("a", **options)
    assert " --" not in f" {refused.value}".replace("kdc-edge export --with", "")


def test_no_error_of_opening_names_an_option_of_the_command_line(bundle_fp32: Path) -> None:
    for options in ({"threads": 0}, {"threads": 10**6}, {"device": "TOASTER"}, {"device": ","}, {"engine": "magic"}):
        with pytest.raises(InputError) as refused:
            Pipeline.open(bundle_fp32, **options)  # type: ignore[arg-type]
        assert "--" not in str(refused.value)


def test_what_is_not_read_of_a_prompt_is_a_warning(pipeline: Pipeline) -> None:
    long = "petals " * 80
    words = "the prompt is longer than the model reads: left out are its last 5 tokens; this bundle's U-Net"
    with pytest.warns(KdcWarning, match=words) as called:
        pipeline([long, long], num_inference_steps=1, guidance_scale=1)
    with pytest.warns(KdcWarning, match="the negative prompt is longer .* left out is 'petals petals") as streamed:
        pipeline.stream("a", num_inference_steps=1, negative_prompt=long, plain_prompt=True)
    assert [warning.filename for warning in [*called, *streamed]] == [__file__] * 2
    with pytest.warns(KdcWarning) as unused:  # one line: without guidance it is not read at all
        pipeline("a", num_inference_steps=1, guidance_scale=1, negative_prompt=long)
    assert ["guidance 1 means none" in str(warning.message) for warning in unused] == [True]


def test_the_working_folder_is_a_bundle_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    Pipeline.open(".")


def test_a_stream_has_previews_and_ends_with_the_image(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "scheduler": "pndm"}
    steps = list(pipeline.stream("a red flower", **options))
    assert [(step.step, step.steps) for step in steps] == [(i, 4) for i in (1, 2, 3, 4)]  # PNDM takes one twice
    assert [step.image is not None for step in steps] == [False, False, False, True]
    for step in steps:
        assert step.preview.shape == (16, 16, 3)
        assert step.preview.dtype == np.uint8
    np.testing.assert_array_equal(steps[-1].image, pipeline("a red flower", **options).images[0])


def test_a_stream_is_checked_at_once_and_stops_where_it_is_closed(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="steps"):
        pipeline.stream("a", num_inference_steps=0)
    calls = 0
    unet = pipeline.components["unet"]

    def count(**inputs: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return unet(**inputs)

    counted = Pipeline(pipeline.model, pipeline.tokenizer, {**pipeline.components, "unet": count})
    stream = counted.stream("a", num_inference_steps=5)
    assert next(stream).step == 1
    stream.close()
    assert calls == 1
    assert list(stream) == []


def test_a_preview_is_in_colour_where_the_colours_are_known() -> None:
    latents = np.zeros((1, 4, 2, 2), np.float32)
    assert preview(latents, 8).tolist() == [[[[128] * 3] * 2] * 2]
    latents[0, 3] = 1  # "L4" of SD 1.x is dark, blue most of all
    red, green, blue = preview(latents, 8)[0, 0, 0]
    assert 128 > red > green > blue
    assert len(set(preview(latents, 4)[0, 0, 0].tolist())) == 1


def test_a_preview_of_latents_that_overflowed_is_grey() -> None:
    latents = np.full((1, 4, 2, 2), np.inf, np.float32)
    latents[0, 0] = np.nan
    assert preview(latents, 8).tolist() == [[[[128] * 3] * 2] * 2]


def test_threads_make_equal_images(pipeline: Pipeline) -> None:
    alone = [np.asarray(pipeline("a red flower", seed=s, num_inference_steps=3).images[0]) for s in range(3)]

    def make(seed: int) -> np.ndarray:
        return np.asarray(pipeline("a red flower", seed=seed, num_inference_steps=3).images[0])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(make, [0, 1, 2] * 3))
    for i, image in enumerate(found):
        np.testing.assert_array_equal(image, alone[i % 3])


def test_the_check_of_the_files_begins_before_the_engine_is_imported(
    bundle_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    check, found = Bundle.check, runtime_pipeline.get_runtime

    def noted(bundle: Bundle, part: str) -> Any:
        if part == "text_encoder":  # the first component that an image needs
            begun.set()
        return check(bundle, part)

    def imported(name: str) -> Runtime:
        assert begun.wait(10)
        return found(name)

    monkeypatch.setattr(Bundle, "check", noted)
    monkeypatch.setattr(runtime_pipeline, "get_runtime", imported)
    assert Pipeline.open(bundle_fp32).components["unet"]


def test_a_system_that_forbids_lower_priority_stops_no_check(
    bundle_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: int) -> int:
        raise PermissionError("not permitted")

    monkeypatch.setattr("os.nice", forbidden)
    assert Pipeline.open(bundle_fp32).components["text_encoder"]


def test_threads_share_one_load(bundle_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are loaded once, though four threads ask for the first image at the same time."""
    from kdc_edge.runtimes.onnxruntime import OnnxRuntime

    loaded: list[str] = []
    load = OnnxRuntime.load
    monkeypatch.setattr(OnnxRuntime, "load", lambda self, f, name, o: (loaded.append(name), load(self, f, name, o))[1])
    fresh = Pipeline.open(bundle_fp32, threads=1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: fresh("a", seed=seed, num_inference_steps=1), range(4)))
    assert sorted(loaded) == ["text_encoder", "unet", "vae_decoder"]


def test_low_memory_takes_one_image_at_a_time(bundle_fp32: Path) -> None:
    frugal = Pipeline.open(bundle_fp32, low_memory=True)
    assert [len(b) for b in frugal.batches([Request("a", seed=s) for s in range(3)])] == [1, 1, 1]


def test_low_memory_holds_no_vocabulary_beside_a_network(bundle_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Released before each network is loaded, so that it is read once an image; held else."""
    read: list[Path] = []
    read_vocabulary = tokenizer.read_vocabulary
    monkeypatch.setattr(tokenizer, "read_vocabulary", lambda path: (read.append(path), read_vocabulary(path))[1])
    for low_memory, times in ((False, 1), (True, 3)):
        read.clear()
        pipeline = Pipeline.open(bundle_fp32, threads=1, low_memory=low_memory)
        first, second = (pipeline("a red flower", num_inference_steps=1).images[0] for _ in range(2))
        assert first == second
        pipeline.tokenizer.encode(["a"])
        assert len(read) == times
