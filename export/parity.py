"""The proof: parity of a bundle with PyTorch, on recorded inputs and on whole images.

    parity = check_parity(checkpoint, Path("bundles/onnx-fp16"), find_format("onnx", "fp16"), prompts)
    [c.what for c in parity.checks if not c.passed]

diffusers' pipeline generates images for a few prompts in fp32 from the checkpoint, while its components' inputs and
outputs are recorded (reference.py). The bundle's components then compute the same inputs, and the bundle generates the
same images.

An engine may compute in fewer bits than the artifact has (bfloat16 on some processors). A detail of an image, such as
one petal, can then differ though the artifact is right. Images below the threshold are therefore generated again in 32
bits, where the threshold applies; those in the engine's own arithmetic must still be recognizable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from kdc_edge.bundle import Bundle
from kdc_edge.components import COMPONENTS, Component
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import KdcError
from kdc_edge.export.examples import example_edit
from kdc_edge.export.kept import hash_of, kept
from kdc_edge.export.reference import Call, Reference, record
from kdc_edge.export.targets import Stage, silent
from kdc_edge.formats import Format
from kdc_edge.manifest import Check, Model, Parity
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request, own_request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.base import get_runtime, preferred_engine

IMAGES = 2  # each one costs STEPS U-Net calls on both sides
LARGE = 64  # latents a side; from here on one image takes a minute on two cores, and IMAGES is halved
STEPS = 4  # enough to visit noise, structure and detail
GUIDANCE = 4.0
COMPONENT_DB = 30.0  # of a component in fewer bits than 32, where it reaches its aim in 32
IN_32_BITS = " in 32 bits"  # of a check's name
RECOGNIZABLE_DB = 20.0  # of two images that differ in a detail; images of two subjects are at about 10


def check_parity(
    checkpoint: Path,
    bundle: Path,
    row: Format,
    prompts: Sequence[str],
    decoder: Path | None = None,
    stage: Stage = silent,
) -> Parity:
    """Compare the bundle with its checkpoint: one check a component, one for the images.

    `decoder` is the small decoder that the bundle has in place of the checkpoint's.
    `stage` gets what runs. The checks are returned, passed or not.
    Raises CheckpointError when PyTorch itself computes no numbers.
    """
    base = Request("", steps=STEPS, guidance=GUIDANCE)
    model = read_model(checkpoint)
    base, _ = own_request(model, base, sampler=None, steps=None, guidance=None)
    edit = example_edit(model)
    requests = [replace(base, prompt=prompt, seed=i, edit=edit) for i, prompt in enumerate(prompts)]
    made = Bundle.open(bundle).manifest.provenance
    key = hash_of("reference", made.checkpoint_sha256, made.decoder_sha256, requests=requests)
    reference = kept(Reference, key, lambda: record(checkpoint, requests, decoder, stage))  # its networks are gone now
    subjects = [component_subject(name, reference.calls[name], row) for name in COMPONENTS]
    subjects.append(image_subject(reference.images, requests, row))
    checks = prove(subjects, partial(open_pipeline, bundle, safety_checker=False), row, stage)  # as the reference is
    torch_version, engine = get_runtime("torch").version, get_runtime(preferred_engine(row).name)
    size = model.image_size
    return Parity(
        reference=f"{reference.made_by}, on the checkpoint{' with the small decoder' if decoder else ''} in PyTorch"
        f" {torch_version}, fp32, on the CPU",
        conditions=f"{engine.name} {engine.version}, {len(requests)} prompts, {size}x{size}, {base.steps} steps"
        f" of {base.sampler}, guidance {base.guidance:g}, worst case",
        checks=checks,
    )


def images_of(model: Model) -> int:
    """How many images the proof makes: twice as many where a step needs half the work, for want of guidance."""
    return max(1, IMAGES // (2 if model.latent_size >= LARGE else 1)) * (1 if model.guided else 2)


def compare(what: str, calls: Sequence[Call], component: Component, threshold_db: float) -> Check:
    """The worst signal-to-noise ratio over the recorded calls; the peak is the reference's largest magnitude.

    An output with a wrong shape, or with values that are no numbers, fails: its error is infinite.
    """
    found = [_distance(component(**inputs), expected) for inputs, expected in calls]
    return _worst(what, found, threshold_db)


@dataclass(frozen=True)
class Subject:
    """A part of the proof."""

    what: str
    measure: Callable[[Pipeline], Check]
    lower_db: float  # enough in the engine's own arithmetic, where 32 bits reach the aim
    stage: str  # what is said while it is measured


def component_subject(
    name: str,
    calls: Sequence[Call],
    row: Format,
    seen: Callable[[Component], Component] = lambda component: component,
) -> Subject:
    """One component on recorded calls; `seen` gives what is compared of it."""
    aim = row.min_component_psnr_db

    def measure(pipeline: Pipeline) -> Check:
        return compare(name, calls, seen(pipeline.components[name]), aim)

    return Subject(name, measure, min(COMPONENT_DB, aim), f"proof: {name} on recorded inputs")


def image_subject(expected: Sequence[np.ndarray], requests: Sequence[Request], row: Format) -> Subject:
    """The whole images of the requests."""
    aim = row.min_image_psnr_db

    def measure(pipeline: Pipeline) -> Check:
        try:
            images = [pipeline.generate(request) for request in requests]
        except KdcError:  # values that are no numbers reached the end
            return _worst("image", [(-math.inf, math.inf)], aim)
        return _worst("image", [_distance(i, e, peak=255) for i, e in zip(images, expected, strict=True)], aim)

    return Subject("image", measure, min(RECOGNIZABLE_DB, aim), "proof: whole images")


def prove(
    subjects: Sequence[Subject],
    open_bundle: Callable[..., Pipeline],
    row: Format,
    stage: Stage = silent,
) -> list[Check]:
    """A check of each; in 32 bits as well where it misses its aim and the engine computes in fewer.

    The bundle is open in one arithmetic at a time: both U-Nets in memory would be the peak of an export.
    """

    def measured(asked: Sequence[Subject], in_words: str, pipeline: Pipeline) -> dict[str, Check]:
        found = {}
        for subject in asked:
            with stage(f"{subject.stage}{in_words}"):
                found[subject.what] = subject.measure(pipeline)
        return found

    found = measured(subjects, "", open_bundle())
    missed = [subject for subject in subjects if not found[subject.what].passed]
    if not missed or not preferred_engine(row).reduces_precision:
        return list(found.values())
    exact = measured(missed, IN_32_BITS, open_bundle(exact=True))
    checks = []
    for subject in subjects:
        check = found[subject.what]
        if subject.what in exact:
            checks.append(exact[subject.what].model_copy(update={"what": f"{subject.what}{IN_32_BITS}"}))
            check = check.model_copy(update={"threshold_db": subject.lower_db})
        checks.append(check)
    return checks


def _distance(found: np.ndarray, expected: np.ndarray, peak: float | None = None) -> tuple[float, float]:
    """PSNR in dB, infinite when both are equal to the last bit, and the largest absolute error."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return -math.inf, math.inf
    error = found.astype(np.float64) - expected
    mean_square = float(np.mean(error**2))
    if mean_square == 0:
        return math.inf, 0.0
    top = float(np.abs(expected).max()) if peak is None else peak
    return (10 * math.log10(top**2 / mean_square) if top else -math.inf), float(np.abs(error).max())


def _worst(what: str, found: Sequence[tuple[float, float]], threshold_db: float) -> Check:
    worst_db = min(db for db, _ in found)
    return Check(
        what=what,
        psnr_db=None if worst_db == math.inf else round(worst_db, 2),
        threshold_db=threshold_db,
        max_abs_error=max(error for _, error in found),
    )
