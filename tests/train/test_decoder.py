"""Small decoders: their shapes, exact resume, what diffusers reads of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError, InputError, KdcError
from kdc_edge.files import sole_writer
from kdc_edge.manifest import Sampling
from kdc_edge.presets import DECODERS, DecoderPreset, find_decoder
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.torch.small_decoder import ThinDecoder, find_decoder_folder, load_decoder, new_decoder
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import DecoderConfig, learning_rate
from kdc_edge.train.data.cache import encode_images
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.garden.judge import load_judge
from kdc_edge.train.tools import decoder as decoder_module
from kdc_edge.train.tools.decoder import DecoderTrainer, extrapolate
from tests.cli.test_commands import complaint, run

WEIGHTS = "diffusion_pytorch_model.safetensors"


def config(cache: Path, **changes: object) -> DecoderConfig:
    small = DecoderConfig(
        (Task("flowers", "garden:flowers"), Task("fish", "garden:fish")), GARDEN_TEACHER, "garden-decoder",
        steps=5, batch_size=2, samples=4, save_every=2, eval_images=2, extrapolated=0.5, cache=cache,
    )  # fmt: skip
    return replace(small, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def _few_evaluation_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_module, "EVALUATION", replace(decoder_module.EVALUATION, steps=2))
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A training without an interruption; beside it its folders as a kill would have left them."""
    out = tmp_path_factory.mktemp("decoders") / "whole"
    steps = []
    for done in DecoderTrainer(config(cache), out).run():
        steps.append(done.step)
        shutil.copytree(out, out.with_name(f"killed-{done.step}"))
    assert steps == [1, 2, 3, 4, 5]
    return out


@pytest.mark.parametrize("preset", DECODERS, ids=lambda p: p.name)
def test_presets_have_as_many_parameters_as_they_say(preset: DecoderPreset) -> None:
    decoder = new_decoder(preset, 4).decoder
    assert sum(p.numel() for p in decoder.parameters()) == preset.parameters
    assert decoder(torch.zeros(1, 4, 2, 3)).shape == (1, 3, 2 * preset.vae_scale, 3 * preset.vae_scale)


def test_taesd_is_diffusers_own_default() -> None:
    ours, theirs = new_decoder(DECODERS[0], 4).decoder, AutoencoderTiny().decoder
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}


def test_presets_are_found_by_the_vaes_scale() -> None:
    assert [find_decoder(None, scale).name for scale in (8, 4)] == ["taesd", "garden-decoder"]
    with pytest.raises(InputError, match="'taesd' does not fit this checkpoint: choose from garden-decoder"):
        find_decoder("taesd", 4)
    with pytest.raises(InputError, match="'big' is unknown: choose from taesd, thin"):
        find_decoder("big", 8)
    with pytest.raises(InputError, match="makes 16 pixels"):
        find_decoder(None, 16)


def test_a_thin_decoder_comes_back_and_diffusers_class_refuses_it(tmp_path: Path) -> None:
    network = new_decoder(find_decoder("thin", 8), 4)
    with quiet():
        network.save_pretrained(tmp_path)
        with pytest.raises(Exception, match="shape"):
            AutoencoderTiny.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["_class_name"] == "ThinDecoder"
    model = read_model(GARDEN_TEACHER).model_copy(update={"vae_scale": 8})
    decoder = load_decoder(tmp_path, model)
    assert isinstance(network, ThinDecoder)
    assert decoder.class_name == "ThinDecoder"
    latents = torch.randn(2, 4, 2, 2)
    found = decoder.decode(latents / model.scaling_factor)[0]
    torch.testing.assert_close(found, network.decode(latents).sample, rtol=1e-4, atol=1e-5)


def test_a_training_leaves_a_folder_that_diffusers_reads_a_sheet_and_results(trained: Path) -> None:
    with quiet():
        theirs, found = AutoencoderTiny.from_pretrained(trained / "decoder", output_loading_info=True)
    assert not any(found.values())
    assert theirs.config.scaling_factor == 1
    state = load_file(trained / "state.safetensors")
    assert all(torch.equal(state[f"decoder/{n}"], p) for n, p in theirs.decoder.named_parameters())
    with Image.open(trained / "sheet.png") as sheet:
        assert sheet.size == (8 * 64, 4 * 64)  # two rows a task
    results = json.loads((trained / "results.json").read_text("utf-8"))
    assert (results["preset"], results["steps"]) == ("garden-decoder", 5)
    assert 5 < results["psnr_db"]["fish"] < 40
    assert {*results["prompt_accuracy"]["flowers"]} == {"vae", "small", "psnr_db"}
    assert find_decoder_folder(str(trained)) == find_decoder_folder(str(trained / "decoder")) == trained / "decoder"


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_resumed_trainings_end_with_the_same_weights_to_the_last_bit(
    trained: Path, cache: Path, tmp_path: Path, stop_after: int
) -> None:
    """Stopped without a word before the first saved state, between two, and at one."""
    shutil.copytree(trained.with_name(f"killed-{stop_after}"), tmp_path / "cut")
    again = DecoderTrainer(config(cache), tmp_path / "cut", resume=True)
    assert again.step == (stop_after - 1) // 2 * 2  # the generator was left before the state of its last step
    for _ in again.run():
        pass
    expected, found = (load_file(run / "decoder" / WEIGHTS) for run in (trained, tmp_path / "cut"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "cut" / "results.json").read_text("utf-8") == (trained / "results.json").read_text("utf-8")


def test_resume_takes_the_settings_that_the_training_was_started_with(
    trained: Path, cache: Path, tmp_path: Path
) -> None:
    """--out is enough; a flag that would change the weights is refused, one that does not is taken."""
    DecoderTrainer(config(cache), tmp_path / "out")
    again = "train-decoder", "--resume", "--out", tmp_path / "out"
    assert "--batch-size is 3 and the run was started with 2" in complaint(*again, "--batch-size", 3, cwd=tmp_path)
    assert "no training to resume" in complaint(*again[:3], "nowhere", cwd=tmp_path)
    assert "needs --from" in complaint("train-decoder", cwd=tmp_path)
    with sole_writer(tmp_path / "out"):
        assert "is being written by another process" in complaint(*again, cwd=tmp_path)
    assert "going on after" not in run(*again, "--eval-images", 3, cwd=tmp_path).stderr
    assert "steps are done" in run(*again, cwd=tmp_path).stderr
    expected, found = (load_file(out / "decoder" / WEIGHTS) for out in (trained, tmp_path / "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_decoder_learns(cache: Path, tmp_path: Path) -> None:
    steps = DecoderTrainer(config(cache, steps=20, save_every=100, extrapolated=0.0), tmp_path / "out").run()
    found = [step.losses for step in islice(steps, 20)]
    assert {*found[0]} == {"l1", "mse", "features", "total"}
    assert found[-1]["total"] < 0.6 * found[0]["total"]
    assert found[-1]["features"] < found[0]["features"]


def test_a_loss_that_is_no_number_ends_the_training_with_what_can_be_done(cache: Path, tmp_path: Path) -> None:
    """A resumed training refuses another learning rate."""
    trainer = DecoderTrainer(config(cache), tmp_path / "out")
    trainer.features = lambda images, _: images.sum() * float("nan")
    with pytest.raises(KdcError, match="at step 1: begin a new training with a lower --learning-rate"):
        next(iter(trainer.run()))


def test_the_judges_maps_are_its_trunks_stages_with_a_gradient() -> None:
    judge, images = load_judge(), torch.randn(2, 3, 64, 64, requires_grad=True)
    maps = judge.maps(images)
    assert [m.shape[1:] for m in maps] == [(24, 32, 32), (48, 16, 16), (72, 8, 8), (96, 4, 4)]
    torch.testing.assert_close(judge.trunk[-3:](maps[-1]), judge.trunk(images))
    maps[0].sum().backward()
    assert images.grad is not None


def test_the_learning_rate_warms_up_and_falls(cache: Path) -> None:
    chosen = config(cache, steps=100)
    rates = [learning_rate(chosen, step) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3)
    assert all(a < b for a, b in pairwise(rates[:5]))
    assert all(a > b for a, b in pairwise(rates[6:]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"learning_rate": 1.0}, "--learning-rate"),
        ({"perceptual": -1.0}, "--perceptual"),
        ({"extrapolated": 1.5}, "--extrapolated"),
        ({"eval_images": 1}, "--eval-images 1"),
        ({"tasks": ()}, "nothing to learn"),
    ],
)
def test_settings_that_cannot_be_are_named(cache: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        config(cache, **change)


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, checkpoint: Path) -> None:
    given = ("train-decoder", "--from")
    assert "no checkpoint at" in complaint(*given, tmp_path / "nowhere", cwd=tmp_path)
    assert "'taesd' does not fit" in complaint(*given, "garden", "--preset", "taesd", cwd=tmp_path, code=2)
    assert "belongs to no run" in complaint(*given, checkpoint, cwd=tmp_path)
    assert "unknown data source" in complaint(*given, "garden", "--task", "a=moon:x", cwd=tmp_path)
    unwritable = "--out", tmp_path / "decoder", "--samples", 1, "--cache", __file__
    assert "ot a directory" in complaint(*given, GARDEN_TEACHER.resolve(), *unwritable, cwd=tmp_path)
    gone = (Task("photos", f"imagefolder:{tmp_path / 'gone'}"),)
    with pytest.raises(InputError, match="gone is no folder"):
        DecoderTrainer(config(tmp_path, tasks=gone), tmp_path / "decoder")
    assert list(tmp_path.iterdir()) == []


def test_other_settings_and_a_damaged_state_are_refused(trained: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--batch-size is 3 and the run was started with 2"):
        DecoderTrainer(config(cache, batch_size=3), trained, resume=True)
    with pytest.raises(InputError, match="holds other files"):
        DecoderTrainer(config(cache), trained)
    DecoderTrainer(config(cache), tmp_path / "out")
    save_file({"step": torch.tensor(1)}, tmp_path / "out" / "state.safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        DecoderTrainer(config(cache), tmp_path / "out", resume=True)


def test_images_cannot_be_encoded_for_training_by_a_small_vae() -> None:
    with pytest.raises(CheckpointError, match="AutoencoderTiny, and training needs an AutoencoderKL"):
        encode_images(AutoencoderTiny(), torch.zeros(1, 8, 8, 3, dtype=torch.uint8).numpy())


def test_a_share_of_the_latents_is_moved_along_the_line_to_another_one() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(400, 4, 2, 2, generator=generator)
    moved = extrapolate(latents, 0.5, generator)
    line = latents - latents.roll(1, 0)
    amount = ((moved - latents) * line).sum((1, 2, 3)) / line.square().sum((1, 2, 3))
    torch.testing.assert_close(moved, latents + amount[:, None, None, None] * line)
    assert 0.4 < float((amount == 0).float().mean()) < 0.6
    assert -0.501 < float(amount.min()) < -0.45
    assert 0.95 < float(amount.max()) < 1.001
    assert torch.equal(extrapolate(latents[:1], 1.0, generator), latents[:1])
    assert extrapolate(latents, 0.0, generator) is latents


def test_latents_are_moved_for_few_step_students(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unsaid = config(cache, extrapolated=None)
    assert DecoderTrainer(unsaid, tmp_path / "guided").extrapolated == 0
    few_steps = read_model(GARDEN_TEACHER).model_copy(
        update={"sampling": Sampling(scheduler="ddim", steps=4, guidance=1.0)}
    )
    monkeypatch.setattr(decoder_module, "read_model", lambda _: few_steps)
    assert DecoderTrainer(unsaid, tmp_path / "few").extrapolated == 0.5
    assert DecoderTrainer(config(cache, extrapolated=0.25), tmp_path / "said").extrapolated == 0.25
