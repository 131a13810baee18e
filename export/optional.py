"""The proof of optional components, which no image of the parity check needs.

    checks = prove_optional(checkpoint, Path("bundles/onnx-fp16"), find_format("onnx", "fp16"), ["vae_encoder"])

The VAE encoder reads a smooth random image; latents drawn from its distribution with the same noise are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdc_edge.bundle import Check
from kdc_edge.components import Component
from kdc_edge.diffusers_folder import read_model
from kdc_edge.editing import draw_latents
from kdc_edge.export.examples import smooth
from kdc_edge.export.parity import compare
from kdc_edge.formats import Format
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.base import LoadOptions, get_runtime


def prove_optional(checkpoint: Path, bundle: Path, row: Format, names: Sequence[str]) -> list[Check]:
    """One check a component, passed or not: the bundle's against PyTorch's, in fp32 on the CPU."""
    return [_prove_encoder(checkpoint, bundle, row)] if "vae_encoder" in names else []


def _prove_encoder(checkpoint: Path, bundle: Path, row: Format) -> Check:
    model = read_model(checkpoint)
    rng = np.random.default_rng(0)
    sample = smooth(rng, [1, 3, model.image_size, model.image_size])
    noise = rng.standard_normal([1, model.latent_channels, model.latent_size, model.latent_size]).astype(np.float32)

    def drawn(encoder: Component) -> Component:
        return lambda **inputs: draw_latents(encoder(**inputs), noise)

    reference = drawn(get_runtime("torch").load(checkpoint, "vae_encoder", LoadOptions(device="CPU")))
    calls = [({"sample": sample}, reference(sample=sample))]
    candidate = drawn(open_pipeline(bundle).components["vae_encoder"])
    return compare("vae_encoder", calls, candidate, row.min_component_psnr_db)
