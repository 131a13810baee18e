"""Our bundles in other people's programs: they open, and make our image from our noise.

    make interop            # an environment of its own, because optimum-onnx and optimum-intel pin older versions

The bundles are exported by the Makefile, in kdc-edge's own environment, into the folder named by
KDC_EDGE_INTEROP. 35 dB is more than the eye sees.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdc_edge.noise import NormalStream
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

REQUEST = Request(
    "a red flower with five petals and a yellow center on a sky background",
    steps=10, guidance=4.0, seed=3, sampler="ddim", width=64, height=64,
)  # fmt: skip
SHAPE = (1, 4, 16, 16)
# int8 rounds what it is given to 8 bits, so a difference in the last bit, which another order of the same sums
# makes, can become a whole step: measured 34.7 dB with openvino_genai.
FLOORS_DB = {"openvino-fp16": 35, "openvino-int8": 30, "onnx-fp32": 35, "onnx-fp16": 35}


def bundle(name: str) -> Path:
    return Path(os.environ["KDC_EDGE_INTEROP"]) / name


def psnr_db(found: np.ndarray, root: Path) -> float:
    ours = open_pipeline(root).generate(REQUEST)
    assert ours.std() > 20  # an image, not a grey square
    assert found.shape == ours.shape
    return -10 * math.log10(max(float(np.mean((found.astype(float) - ours) ** 2)), 1e-9) / 255**2)


def by_optimum(pipeline: Any) -> np.ndarray:
    """What a pipeline of optimum's makes from our noise: uint8 (H, W, 3)."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(NormalStream(REQUEST.seed).draw(SHAPE))
    found = pipeline(
        REQUEST.prompt, num_inference_steps=REQUEST.steps, guidance_scale=REQUEST.guidance, latents=latents,
        height=64, width=64, output_type="np",
    ).images[0]  # fmt: skip
    return np.asarray((found * 255).round(), np.uint8)


@pytest.mark.parametrize("name", ["openvino-fp16", "openvino-int8"])
def test_openvino_genai(name: str) -> None:
    import openvino
    import openvino_genai

    class OurNoise(openvino_genai.Generator):  # type: ignore[misc]
        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(NormalStream(REQUEST.seed).draw(tuple(shape)))

        def next(self) -> float:
            raise AssertionError("noise is asked for as a whole")

    pipeline = openvino_genai.Text2ImagePipeline(bundle(name), "CPU")
    found = pipeline.generate(
        REQUEST.prompt, num_inference_steps=REQUEST.steps, guidance_scale=REQUEST.guidance,
        height=64, width=64, generator=OurNoise(),
    )  # fmt: skip
    assert psnr_db(np.array(found.data)[0], bundle(name)) >= FLOORS_DB[name]


@pytest.mark.parametrize("name", ["openvino-fp16", "openvino-int8"])
def test_optimum_intel(name: str) -> None:
    from optimum.intel import OVStableDiffusionPipeline

    pipeline = OVStableDiffusionPipeline.from_pretrained(bundle(name), export=False, safety_checker=None)
    assert psnr_db(by_optimum(pipeline), bundle(name)) >= FLOORS_DB[name]


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-fp16"])
def test_optimum_onnx(name: str) -> None:
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    pipeline = ORTStableDiffusionPipeline.from_pretrained(bundle(name), export=False, safety_checker=None)
    assert psnr_db(by_optimum(pipeline), bundle(name)) >= FLOORS_DB[name]
