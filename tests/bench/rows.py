"""What the tests of benchmarks share: a pipeline of fakes, what child processes open, bundles and rows without work."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from kdc_edge.bench.record import Environment, Row, Timing, Timings, text_sha256
from kdc_edge.components import Component
from kdc_edge.errors import KdcError
from kdc_edge.manifest import (
    Check,
    ComponentInfo,
    Manifest,
    Model,
    Parity,
    Provenance,
    Sampling,
    Tensor,
    list_files,
    write_manifest,
)
from kdc_edge.pipeline import Pipeline
from kdc_edge.tokenizer import Tokenizer

MODEL = Model(
    unet_parameters=7,
    latent_channels=4,
    latent_size=16,
    latent_unit=8,
    vae_scale=4,
    scaling_factor=1.0,
    scheduler={"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
)
FEW_STEPS = MODEL.model_copy(update={"sampling": Sampling(scheduler="ddim", steps=4, guidance=1.0)})
HOSTILE = "<script>alert('x')</script> & \"quotes\" | *pipe*"


def make_pipeline(work: Callable[[str], None] = lambda _: None) -> Pipeline:
    """The real pipeline on components that say who they are and answer with constants."""

    def text_encoder(**inputs: np.ndarray) -> np.ndarray:
        work("text_encoder")
        return np.zeros((*inputs["input_ids"].shape, 8), np.float32)

    def unet(**inputs: np.ndarray) -> np.ndarray:
        work("unet")
        return inputs["sample"] * np.float32(0.1)

    def vae_decoder(**inputs: np.ndarray) -> np.ndarray:
        work("vae_decoder")
        height, width = inputs["latent_sample"].shape[2:]
        return np.full((1, 3, height * 4, width * 4), 0.5, np.float32)

    components: dict[str, Component] = {"text_encoder": text_encoder, "unet": unet, "vae_decoder": vae_decoder}
    return Pipeline(MODEL, Tokenizer.clip(), components)


# What the child processes open, by name (the fixture `opener`).


def open_fake(
    folder: Path, *, engine: str | None, device: str | None, threads: int | None, low_memory: bool, check: bool
) -> Pipeline:
    print(f"engines talk: {folder} {engine} {device} {threads} {low_memory} {check}")
    return make_pipeline()


def open_slow(*_: object, **__: object) -> Pipeline:
    time.sleep(0.5)
    return make_pipeline()


def open_large(*_: object, **__: object) -> Pipeline:
    """Holds 200 MiB at once, and no longer."""
    block = np.ones(200 * 2**20, np.uint8)
    del block
    return make_pipeline()


def open_large_and_endless(*_: object, **__: object) -> Pipeline:
    block = np.ones(200 * 2**20, np.uint8)
    time.sleep(120)
    raise AssertionError(block)


def open_refused(*_: object, **__: object) -> Pipeline:
    raise KdcError("this engine\nrefuses")


def open_too_large(*_: object, **__: object) -> Pipeline:
    raise MemoryError


def open_killed(*_: object, **__: object) -> Pipeline:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def open_crash(*_: object, **__: object) -> Pipeline:
    print("engine: illegal instruction", file=sys.stderr, flush=True)
    os._exit(3)


def open_broken(*_: object, **__: object) -> Pipeline:
    raise ZeroDivisionError("inside the engine")


def open_endless(folder: Path, **_: object) -> Pipeline:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(120)
    raise AssertionError


def lines_until(stream: IO[str], start: str) -> list[str]:
    """The lines of a process, up to the first that begins so."""
    lines = []
    for line in stream:
        lines.append(line)
        if line.startswith(start):
            return lines
    raise AssertionError(lines)


def make_bundle(
    folder: Path, checks: Sequence[Check] = (), model: Model = MODEL, checkpoint_sha256: str = "0" * 64
) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 1000)
    tensor = Tensor(dtype="float32", shape=[1])
    info = ComponentInfo(files=["weights"], inputs={"x": tensor}, outputs={"y": tensor})
    manifest = Manifest(
        target="onnx",
        precision="fp16",
        model=model,
        components={"unet": info},
        files=list_files(folder),
        parity=Parity(reference="PyTorch", conditions="a test", checks=list(checks)),
        provenance=Provenance(checkpoint="c", checkpoint_sha256=checkpoint_sha256, packages={}, created="today"),
    )
    write_manifest(folder, manifest)
    return folder


def check(what: str, psnr_db: float | None) -> Check:
    return Check(what=what, psnr_db=psnr_db, threshold_db=35.0, max_abs_error=0.0)


def timing(*samples_sec: float) -> Timing:
    made = Timing.of(samples_sec)
    assert made is not None
    return made


def make_row(name: str = "onnx-fp16", scale: float = 1.0, **changes: object) -> Row:
    stages = {f.name: timing(scale * 0.25, scale * 0.5) for f in dataclasses.fields(Timings)}
    row = Row(
        name=name,
        folder=f"bundles/{name}",
        target="onnx",
        precision="fp16",
        checkpoint_sha256="0" * 64,
        engine="onnxruntime",
        device=None,
        threads=2,
        low_memory=False,
        size_bytes=3 * 2**20,
        parity=check("image", 51.7),
        unet_parameters=482_346_884,
        prompt="a red flower",
        negative_prompt="",
        prompt_sha256=text_sha256("a red flower", ""),
        steps=20,
        guidance=7.5,
        guidance_mode=None,
        guidance_interval=(0.0, 1.0),
        sampler="ddim",
        width=64,
        height=64,
        seed=1,
        repeats=2,
        warmup=1,
        timings=Timings(**stages),
        peak_rss_bytes=250 * 2**20,
    )
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


FAILED = make_row("coreml", timings=None, peak_rss_bytes=None, parity=None, failure="needs macOS")
MACHINE = Environment("Linux", "A <fast> processor", 2, 24 * 2**30, "3.11.7", {"kdc-edge": "0.1.0"})
