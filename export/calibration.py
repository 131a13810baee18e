"""Calibration data: the U-Net's inputs, recorded while the checkpoint generates images from the user's prompts.

    calibration = calibrate(checkpoint, prompts, samples=64, seed=0)
    [call["sample"].shape for call in calibration.inputs]  # each (2, C, h, w), or (1, C, h, w) without guidance

Consecutive steps of a few prompts look alike, so each image gives a few steps taken at random, and the
prompts are many. Seeded: the same prompts give the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kdc_edge.diffusers_folder import hash_checkpoint, read_model
from kdc_edge.editing import ENCODER
from kdc_edge.errors import InputError
from kdc_edge.export.examples import example_edit
from kdc_edge.export.kept import Arrays, Inputs, hash_of, kept, pack_inputs, unpack_inputs
from kdc_edge.export.reference import Recorder
from kdc_edge.export.targets import ExportRequest
from kdc_edge.manifest import CalibrationInfo, Model
from kdc_edge.pipeline import Pipeline
from kdc_edge.prompts import own_prompts
from kdc_edge.request import Request, made_for
from kdc_edge.runtimes.base import LoadOptions, get_runtime
from kdc_edge.samplers import SAMPLERS, make_sampler, sampler_for
from kdc_edge.tokenizer import Tokenizer

SAMPLES = 64  # of both halves of guidance; twice as many of a guidance-free student, in the same time
STEPS = 10  # of each image
SAMPLES_AN_IMAGE = 4
GUIDANCE = 7.5


@dataclass(frozen=True)
class Calibration:
    inputs: list[Inputs]  # of U-Net calls
    info: CalibrationInfo

    def arrays(self) -> Arrays:
        """All of it, to be kept."""
        return pack_inputs("unet", self.inputs) | {"info": np.array(self.info.model_dump_json())}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Calibration:
        """What `arrays` gave. Raises KeyError where something is missing."""
        return cls(unpack_inputs("unet", arrays), CalibrationInfo.model_validate_json(str(arrays["info"])))


def calibrate_for(
    request: ExportRequest, default_samples: int | None = None, *, samples_an_image: int = SAMPLES_AN_IMAGE
) -> Calibration:
    """The request's calibration, kept for the next export of the checkpoint. Raises as `calibrate` does."""
    checkpoint, prompts = request.checkpoint, request.calibration_prompts
    samples = default_samples if request.calibration_samples is None else request.calibration_samples
    prompts = own_prompts(checkpoint) if prompts is None else prompts
    base = base_request(read_model(checkpoint))
    with request.stage("recording the U-Net's inputs for calibration") as tell:
        key = hash_of(
            "calibration", hash_checkpoint(checkpoint), list(prompts), samples, samples_an_image, requests=[base]
        )
        return kept(
            Calibration,
            key,
            lambda: calibrate(checkpoint, prompts, samples, samples_an_image=samples_an_image, tell=tell),
        )


def base_request(model: Model) -> Request:
    """What each image of a calibration is, but for prompt and seed: a few-step student's own steps, sampler, guidance.

    Others are sampled by DPM-Solver++ 2M, or, where their scheduler config does not fit it, as on the device.
    """
    base = made_for(model, Request("", steps=STEPS, guidance=GUIDANCE))
    if SAMPLERS[base.sampler].obstacle(model.scheduler) is None:
        return base
    return replace(base, sampler=sampler_for(model.scheduler)[0])


def one_by_one(calls: Sequence[Inputs]) -> list[Inputs]:
    """Calls of a batch as calls of one sample each."""
    return [
        {name: value[i : i + 1] if len(value) > 1 else value for name, value in call.items()}
        for call in calls
        for i in range(len(call["sample"]))
    ]


def calibrate(
    checkpoint: Path,
    prompts: Sequence[str] | None = None,
    samples: int | None = None,
    *,
    seed: int = 0,
    samples_an_image: int = SAMPLES_AN_IMAGE,
    tell: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Generate in PyTorch from prompts drawn at random, and keep `samples` of the U-Net's calls.

    Without prompts, the checkpoint's own captions are taken. A few-step student's timesteps are its own. An inpainting
    model repaints smooth random images. `tell` gets how many samples there are, after each image.

    Raises InputError for no prompts or a count that cannot be used, CheckpointError for the checkpoint.
    """
    prompts = own_prompts(checkpoint) if prompts is None else prompts
    model = read_model(checkpoint)
    if samples is None:
        samples = SAMPLES if model.guided else 2 * SAMPLES
    if samples < 1:
        raise InputError(f"--calibration-samples {samples} is too few: use 1 or more")
    if not prompts:
        raise InputError("there are no prompts to calibrate on: give --calibration-prompts a file with one a line")
    rng = np.random.default_rng(seed)
    runtime = get_runtime("torch")
    unet = Recorder(runtime.load(checkpoint, "unet", LoadOptions(device="CPU")))
    names = ("text_encoder", ENCODER) if model.inpainting else ("text_encoder",)
    components = {name: runtime.load(checkpoint, name, LoadOptions(device="CPU")) for name in names} | {"unet": unet}
    pipeline = Pipeline(model, Tokenizer.from_folder(checkpoint / "tokenizer"), components)
    base = base_request(model)
    calls = len(make_sampler(base.sampler, pipeline.schedule, base.steps).timesteps)  # Heun's are two a step
    samples_an_image = min(samples_an_image, calls)
    inputs: list[Inputs] = []
    order = [p for _ in range(-(-samples // len(prompts))) for p in rng.permutation(np.array(prompts, object))]
    for number, prompt in enumerate(order):
        wanted = min(samples_an_image, samples - len(inputs))
        if wanted == 0:
            break
        kept_steps = sorted(rng.choice(calls, wanted, replace=False))
        unet.calls.clear()
        edit = example_edit(model, seed + number)
        request = replace(base, prompt=str(prompt), seed=seed + number, edit=edit)
        for progress in pipeline.run(request):
            if progress.stage == "unet" and progress.step > kept_steps[-1]:
                break  # the later steps, and the decoder, are not needed
        inputs += [unet.calls[step][0] for step in kept_steps]
        tell(f"{len(inputs)} of {samples} samples")
    text = "\n".join(prompts)
    info = CalibrationInfo(
        prompts_sha256=hashlib.sha256(text.encode()).hexdigest(),
        prompts=len(prompts),
        samples=len(inputs),
        seed=seed,
        sampler=request.sampler,
        steps=request.steps,
        guidance=request.guidance,
    )
    return Calibration(inputs, info)
