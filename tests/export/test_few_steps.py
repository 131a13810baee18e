"""A guidance-free student is proved and calibrated on its own timesteps, without an empty prompt's half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError
from kdc_edge.export import calibration
from kdc_edge.export.calibration import calibrate
from kdc_edge.export.components import load_component
from kdc_edge.export.coreml.export import _Export
from kdc_edge.export.parity import images_of
from kdc_edge.export.reference import record
from kdc_edge.export.targets import CoreMLOptions, ExportRequest
from kdc_edge.request import Request, made_for, own_request

TIMESTEPS = [999, 749, 499, 249]


@pytest.fixture
def few_steps(own_checkpoint: Path) -> Path:
    scheduler = own_checkpoint / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    scheduler.write_text(json.dumps(config))
    (own_checkpoint / "sampling.json").write_text('{"scheduler": "ddim", "steps": 4, "guidance": 1}')
    return own_checkpoint


def test_the_proof(few_steps: Path, checkpoint: Path) -> None:
    model = read_model(few_steps)
    reference = record(few_steps, [made_for(model, Request("a red flower"))])
    calls = [inputs for inputs, _ in reference.calls["unet"]]
    assert [int(call["timestep"][0]) for call in calls] == TIMESTEPS
    assert {call["sample"].shape for call in calls} == {(1, 4, 16, 16)}
    assert len(reference.calls["text_encoder"]) == 1
    guided = read_model(checkpoint)
    large = {"latent_size": 64}
    assert [images_of(m) for m in (guided, model)] == [2, 4]
    assert [images_of(m.model_copy(update=large)) for m in (guided, model)] == [1, 2]


def test_the_calibration(few_steps: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SAMPLES", 4)
    found = calibrate(few_steps, ["a red flower", "a blue fish"])
    assert [int(call["timestep"][0]) for call in found.inputs] == 2 * TIMESTEPS
    assert {call["sample"].shape for call in found.inputs} == {(1, 4, 16, 16)}
    assert calibrate(checkpoint, ["a red flower", "a blue fish"]).info.samples == 4


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"scheduler": "dpm2", "steps": 4}, "scheduler 'dpm2' is unknown"),
        ({"scheduler": "lcm", "steps": 60}, "lcm takes 1 to 50 steps"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused_before_the_work(
    few_steps: Path, sampling: dict[str, object], said: str
) -> None:
    (few_steps / "sampling.json").write_text(json.dumps(sampling | {"guidance": 1}))
    with pytest.raises(CheckpointError, match=rf"cannot be sampled as its sampling\.json says: {said}"):
        read_model(few_steps)


def test_a_negative_prompt_without_guidance_is_said(few_steps: Path, checkpoint: Path) -> None:
    asked = Request("a", negative_prompt="blue")
    for folder, guidance, used in ((few_steps, None, False), (few_steps, 3.0, True), (checkpoint, 1.0, False),
                                   (checkpoint, None, True)):  # fmt: skip
        request, note = own_request(read_model(folder), asked, sampler=None, steps=None, guidance=guidance)
        assert request.negative_prompt == ("blue" if used else "")
        assert ("the negative prompt is not used: guidance 1 means none" in note) is not used


@pytest.mark.parametrize(("asked", "batch"), [(None, 1), (2, 2)])
def test_the_batch_of_core_mls_unet(few_steps: Path, checkpoint: Path, asked: int | None, batch: int) -> None:
    for source, expected in ((few_steps, batch), (checkpoint, 2)):
        request = ExportRequest(source, Path("out"), "coreml", "fp16")
        export = _Export(request, read_model(source), CoreMLOptions(unet_batch=asked))
        inputs, _ = export.interface(load_component(source, "unet"))
        assert inputs["sample"].shape[0] == expected
