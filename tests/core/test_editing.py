"""Images to begin with: read as diffusers reads them, bounded, checked; sampling begun late equals diffusers'."""

from __future__ import annotations

import inspect
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from kdc_edge.components import Component
from kdc_edge.editing import Edit, draw_latents, read_edit
from kdc_edge.errors import InputError
from kdc_edge.image import Pixels
from kdc_edge.noise import initial_latents
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request, describe
from kdc_edge.samplers import SAMPLERS, NoiseSchedule, make_sampler
from kdc_edge.tokenizer import Tokenizer
from tests.bench.rows import MODEL
from tests.core.diffusers_runs import SD_CONFIG, SEED, SHAPE, denoiser, reference
from tests.core.test_pipeline import Unet, decode, encode

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (45, 70, 3), np.uint8))


@pytest.mark.parametrize("steps", [2, 5, 8])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_begun_late_equals_diffusers(name: str, spacing: str, steps: int) -> None:
    """From clean latents with noise, at an odd and an even step; and the noise of later timesteps."""
    config = {**SD_CONFIG, "timestep_spacing": spacing}
    for skipped in {1, steps // 2}:
        theirs = reference(name, config, steps)
        begin = skipped * theirs.order
        if hasattr(theirs, "set_begin_index"):
            theirs.set_begin_index(begin)
        sampler = make_sampler(name, NoiseSchedule.from_config(config), steps, seed=SEED)
        sampler.skip(skipped)
        assert sampler.first == begin
        generator = torch.Generator("cpu").manual_seed(SEED)
        clean, noise = initial_latents(SHAPE, 9), initial_latents(SHAPE, SEED)
        torch.randn(SHAPE, generator=generator)
        x = sampler.add_noise(clean, noise, begin)
        y = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), theirs.timesteps[begin : begin + 1])
        random = {"generator": generator} if "generator" in inspect.signature(theirs.step).parameters else {}
        for i, t in list(enumerate(theirs.timesteps))[begin:]:
            scale = max(1.0, float(y.abs().max()))
            np.testing.assert_allclose(x / scale, y.numpy() / scale, rtol=0, atol=1e-4)
            x = sampler.step(denoiser(sampler.scale_model_input(x, i), float(t)), i, x)
            y = theirs.step(denoiser(theirs.scale_model_input(y, t), float(t)), t, y, return_dict=False, **random)[0]
            if i + 1 < len(theirs.timesteps):
                ours = sampler.add_noise(clean, noise, i + 1)
                again = theirs.add_noise(
                    torch.from_numpy(clean), torch.from_numpy(noise), theirs.timesteps[i + 1 : i + 2]
                )
                np.testing.assert_allclose(ours, again.numpy(), rtol=1e-3, atol=1e-3)
                assert ours.dtype == np.float32
        np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=1e-3)


def test_images_and_masks_are_resized_as_diffusers_does(photo: Image.Image) -> None:
    edit = read_edit(photo, (48, 32), mask=photo)
    (expected,) = VaeImageProcessor(do_normalize=False).preprocess(photo, height=32, width=48)
    np.testing.assert_allclose(edit.image / 255, expected.permute(1, 2, 0).numpy(), atol=1e-6)
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    ((grey,),) = processor.preprocess(photo, height=32, width=48)
    assert edit.mask is not None
    assert edit.strength == 1.0
    assert read_edit(photo, (48, 32)).strength == 0.8
    # diffusers makes it grey after resizing, which rounds once more: pixels at the threshold may differ.
    assert np.mean(edit.mask != (grey.numpy() > 0.5)) < 0.02


def test_orientation_transparency_and_grey_are_handled(photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    photo.save(tmp_path / "turned.png", exif=exif)
    turned = read_edit(tmp_path / "turned.png", (45, 70)).image
    np.testing.assert_array_equal(turned, np.asarray(photo.transpose(Image.Transpose.ROTATE_270)))
    clear = photo.copy()
    clear.putalpha(0)
    assert (read_edit(clear, (16, 16)).image == 255).all()
    assert clear.mode == "RGBA"  # the caller's own is left alone
    grey = read_edit(photo.convert("L"), (16, 16)).image
    assert (grey[..., 0] == grey[..., 2]).all()


def drawn(mode: str, ground: Any, inside: Any) -> Image.Image:
    mask = Image.new(mode, (32, 32), ground)
    mask.paste(inside, (8, 8, 24, 24))
    return mask


@pytest.mark.parametrize(
    ("mask", "as_openai"),
    [
        (drawn("L", 0, 255), False),
        (drawn("RGB", "black", "white"), True),
        (drawn("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)), False),  # white strokes on a clear layer
        (drawn("RGBA", (9, 9, 9, 255), (0, 0, 0, 0)), True),
        (drawn("1", 0, 1), False),
    ],
)
def test_white_is_repainted_or_what_is_transparent_for_openais_clients(mask: Image.Image, as_openai: bool) -> None:
    found = read_edit(drawn("RGB", 0, 9), (32, 32), mask=mask, transparent_is_masked=as_openai).mask
    expected = np.zeros((32, 32), bool)
    expected[8:24, 8:24] = True
    assert found is not None
    np.testing.assert_array_equal(found, expected)


def test_what_is_no_image_is_named(photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for content, words in (
        (tmp_path / "nothing.png", "nothing.png cannot be used: missing"),
        (tmp_path / "text.png", "text.png cannot be used: cannot be read as an image"),
        (b"\x89PNG\r\n\x1a\n", "the image cannot be used: cannot be read as an image"),
    ):
        with pytest.raises(InputError, match=words):
            read_edit(content, (16, 16))
    with pytest.raises(InputError, match=r"the mask .*text.png cannot be used"):
        read_edit(photo, (16, 16), mask=tmp_path / "text.png")
    with pytest.raises(InputError, match=r"more than 0\.003 million pixels"):
        read_edit(photo, (16, 16), max_pixels=3000)
    with pytest.raises(InputError, match="nothing is repainted"):
        read_edit(photo, (16, 16), mask=Image.new("L", (9, 9)))
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    assert read_edit(buffer.getvalue(), (16, 16)).image.shape == (16, 16, 3)


def test_draws_are_diffusers() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    parameters = 30 * initial_latents((1, 8, 6, 6), 1)
    expected = DiagonalGaussianDistribution(torch.from_numpy(parameters)).sample(torch.Generator().manual_seed(2))
    found = draw_latents(parameters, initial_latents((1, 4, 6, 6), 2))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def vae_encode(**inputs: np.ndarray) -> np.ndarray:
    """Means from the image's corners of 4 x 4 pixels, no deviation."""
    small = inputs["sample"][:, :, ::4, ::4]
    mean = np.concatenate([small, small[:, :1]], axis=1)
    return np.concatenate([mean, np.full_like(mean, -60)], axis=1)


@pytest.fixture
def pipeline() -> Pipeline:
    components: dict[str, Component] = {
        "text_encoder": encode, "unet": Unet(), "vae_decoder": decode, "vae_encoder": vae_encode,
    }  # fmt: skip
    return Pipeline(MODEL, Tokenizer.clip(), components)


def plain(value: int) -> Pixels:
    return np.full((64, 64, 3), value, np.uint8)


def test_steps_are_strength_times_steps_and_progress_counts_them(pipeline: Pipeline) -> None:
    for steps, strength, taken in ((4, 0.6, 2), (10, 0.7, 7), (20, 1.0, 20), (5, 0.2, 1)):
        request = Request("a", steps=steps, edit=Edit(plain(9), strength))
        done = list(pipeline.run(request))
        assert [(p.step, p.steps) for p in done if p.stage == "scheduler"] == [(i + 1, taken) for i in range(taken)]
        assert sum(p.stage == "vae_encoder" for p in done) == 1
    assert describe(request, plain(0), "m")["Denoising strength"] == 0.2
    assert "Guidance interval" not in describe(request, plain(0), "m")
    assert describe(replace(request, guidance_interval=(0, 0.7)), plain(0), "m")["Guidance interval"] == "0:0.7"
    heun = list(pipeline.run(replace(request, steps=4, sampler="heun", edit=Edit(plain(9), 0.5))))
    assert [(p.step, p.steps) for p in heun if p.stage == "scheduler"] == [(1, 3), (2, 3), (3, 3)]
    assert [p.stage for p in pipeline.prepare(request)].count("load") == 4


def test_the_unmasked_latents_are_the_images_own(pipeline: Pipeline) -> None:
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    for strength in (0.5, 1.0):
        request = Request("a", steps=4, edit=Edit(plain(200), strength, mask))
        *_, last = (p.latents for p in pipeline.run(request) if p.latents is not None)
        np.testing.assert_allclose(last[:, :, 8:], 200 / 127.5 - 1, atol=1e-5)
        assert np.abs(last[:, :, :8] - (200 / 127.5 - 1)).max() > 0.1


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m-sde"])
def test_an_edit_of_a_batch_is_that_of_its_request(pipeline: Pipeline, sampler: str) -> None:
    """Images, masks, prompts and seeds differ."""
    mask = np.random.default_rng(3).random((64, 64)) > 0.5
    requests = [
        Request(prompt, steps=4, seed=seed, sampler=sampler, edit=Edit(plain(value), 0.8, m))
        for prompt, seed, value, m in (("a", 1, 50, mask), ("b", 2, 90, ~mask))
    ]
    *_, last = (p.latents for p in pipeline.run(*requests) if p.latents is not None)
    for i, request in enumerate(requests):
        *_, alone = (p.latents for p in pipeline.run(request) if p.latents is not None)
        np.testing.assert_allclose(last[i], alone[0], atol=1e-6)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit(plain(1), 0.1), r"strength 0.1 of 4 steps is none: use 0.25 or more"),
        (Edit(plain(1), 1.5), "strength 1.5 is out of range"),
        (Edit(plain(1), float("nan")), "strength nan is out of range"),
        (Edit(plain(1)[:32]), "an edit needs a uint8 image .* of the request's size, 64x64"),
        (Edit(plain(1), mask=np.ones((32, 32), bool)), "an edit needs"),
    ],
)
def test_edits_are_checked_before_any_work(pipeline: Pipeline, edit: Edit, words: str) -> None:
    with pytest.raises(InputError, match=words):
        pipeline.check(Request("a", steps=4, edit=edit))


def test_a_batch_shares_the_kind_of_edit_and_a_missing_encoder_is_named(pipeline: Pipeline) -> None:
    edit, masked = Edit(plain(1)), Edit(plain(1), mask=np.ones((64, 64), bool))
    for other in (None, masked, Edit(plain(1), 0.5)):
        with pytest.raises(InputError, match="images of one batch share the strength"):
            pipeline.check(Request("a", edit=edit), Request("a", edit=other))
    without = Pipeline(MODEL, Tokenizer.clip(), {n: c for n, c in pipeline.components.items() if n != "vae_encoder"})
    with pytest.raises(InputError, match=r"has no vae_encoder.* kdc-edge export --with vae_encoder"):
        without.generate(Request("a", edit=edit))
