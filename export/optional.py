"""The proof of optional components, which no image of the parity check needs.

    checks = prove_optional(checkpoint, Path("bundles/onnx-fp16"), find_format("onnx", "fp16"), ["vae_encoder"])

Each reads a smooth random image. Of the VAE encoder, latents drawn from its distribution with the same noise are
compared; of the safety checker, the concepts' scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kdc_edge.components import CHECKER, CLIP_SIDE, Component
from kdc_edge.diffusers_folder import read_model
from kdc_edge.editing import draw_latents
from kdc_edge.export.examples import smooth
from kdc_edge.export.parity import component_subject, prove
from kdc_edge.formats import Format
from kdc_edge.manifest import Check
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.base import LoadOptions, get_runtime


def prove_optional(checkpoint: Path, bundle: Path, row: Format, names: Sequence[str]) -> list[Check]:
    """One check a component, passed or not: the bundle's against PyTorch's, in fp32 on the CPU."""
    prove = {"vae_encoder": _prove_encoder, CHECKER: _prove_checker}
    return [check for name in names for check in prove[name](checkpoint, bundle, row)]


def _prove_encoder(checkpoint: Path, bundle: Path, row: Format) -> list[Check]:
    model = read_model(checkpoint)
    rng = np.random.default_rng(0)
    sample = smooth(rng, [1, 3, model.image_size, model.image_size])
    noise = rng.standard_normal([1, model.latent_channels, model.latent_size, model.latent_size]).astype(np.float32)

    def drawn(encoder: Component) -> Component:
        return lambda **inputs: draw_latents(encoder(**inputs), noise)

    return _prove("vae_encoder", {"sample": sample}, checkpoint, bundle, row, drawn)


def _prove_checker(checkpoint: Path, bundle: Path, row: Format) -> list[Check]:
    sample = smooth(np.random.default_rng(0), [1, 3, CLIP_SIDE, CLIP_SIDE])
    return _prove(CHECKER, {"clip_input": sample}, checkpoint, bundle, row)


def _prove(
    name: str,
    inputs: dict[str, np.ndarray],
    checkpoint: Path,
    bundle: Path,
    row: Format,
    seen: Callable[[Component], Component] = lambda component: component,
) -> list[Check]:
    """One call; `seen` gives what is compared of a component."""
    reference = seen(get_runtime("torch").load(checkpoint, name, LoadOptions(device="CPU")))

    calls = [(inputs, reference(**inputs))]
    return prove([component_subject(name, calls, row, seen)], partial(open_pipeline, bundle), row)
