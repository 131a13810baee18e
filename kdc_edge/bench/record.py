"""The record of a benchmark: one `Row` a measurement, one `Environment` a machine, and both as one JSON document.

    text = to_json(Report(rows=rows, environment=here()))
    report = from_json(text)                     # InputError for anything else than kdc-edge/bench/3

Every sample is kept. Times are in seconds, sizes in bytes, shares between 0 and 1, and what is not known is None.
The names in the JSON document are the fields' names below (docs/bench-schema.md); a later schema gets another number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from kdc_edge.errors import InputError
from kdc_edge.hardware import package_versions, this_machine
from kdc_edge.manifest import Check
from kdc_edge.text import invalid_field, megabytes, one_line

SCHEMA: Literal["kdc-edge/bench/3"] = "kdc-edge/bench/3"
PACKAGES = ("numpy", "onnxruntime", "openvino", "coremltools", "torch", "diffusers", "transformers")
MAX_REPORT_BYTES = 256 * 10**6

_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Timing:
    """The samples of one stage, and their statistics."""

    __pydantic_config__ = _CLOSED

    samples_sec: tuple[float, ...]
    median_sec: float
    p90_sec: float  # linear between neighbours, as numpy does
    std_sec: float | None  # of the samples (n - 1); None for one sample

    @classmethod
    def of(cls, samples_sec: Sequence[float]) -> Timing | None:
        """None where nothing was measured, as for the second step of a one-step image."""
        if not samples_sec:
            return None
        median, p90 = np.percentile(samples_sec, [50, 90])
        std = float(np.std(samples_sec, ddof=1)) if len(samples_sec) > 1 else None
        return cls(tuple(samples_sec), float(median), float(p90), std)


@dataclass(frozen=True)
class Timings:
    """The stages of an image; from `tokenize` to `png` they add up to its end to end.

    A stage's share of an image: sum(stage.samples_sec) / sum(end_to_end.samples_sec).
    """

    __pydantic_config__ = _CLOSED

    load: Timing  # opening the folder and its networks, in a process that had opened none: one sample
    compile: Timing | None  # the engine's preparation for these shapes: one sample; None where it is part of loading
    cold: Timing  # from the start of the process to the first image's PNG, imports included: one sample
    tokenize: Timing  # all that comes before the text encoder: checks, noise, tokens
    text_encoder: Timing
    unet_first_step: Timing  # each image's first step, both halves of the guidance
    unet_step: Timing | None  # every later step by itself; None for images of one step
    scheduler: Timing  # an image's guidance mixing and sampler arithmetic, all steps together
    vae_decoder: Timing  # up to the pixels
    png: Timing  # the pixels as the bytes of a PNG
    end_to_end: Timing  # from the prompt to these bytes, warm


@dataclass(frozen=True)
class Disturbance:
    """Other work and sensors of the machine during the counted images, as far as the system tells."""

    __pydantic_config__ = _CLOSED

    others_share: float | None = None  # of the time of the processors that this process may use
    frequency_mhz: tuple[float, ...] | None = None  # mean of the processors, after each counted image
    temperature_celsius: tuple[float, ...] | None = None  # of the hottest sensor, after each counted image
    verdict: str | None = None  # the signs of a disturbance; None where there are none


@dataclass(frozen=True)
class Psnr:
    """PSNR of the image to a reference's, made from the same request and noise."""

    __pydantic_config__ = _CLOSED

    reference: str  # in words: "torch:runs/latest/checkpoint", "onnx-fp32, the most precise of the table"
    db: float | None  # peak 255, the worst of the images that both made; None where all are equal to the last bit


@dataclass(frozen=True)
class PromptQuality:
    """Quality of the images of a file of prompts, one image a prompt."""

    __pydantic_config__ = _CLOSED

    values: dict[str, float]  # prompt_accuracy (0 to 1) and exact of garden captions, clip_score (0 to 100) of others
    prompts: int
    prompts_sha256: str  # one a line


@dataclass(frozen=True)
class Row:
    """One bundle (or checkpoint), measured under the conditions that stand beside it."""

    __pydantic_config__ = _CLOSED

    # what was measured
    name: str  # of the folder
    folder: str
    target: str | None  # None for a checkpoint
    precision: str | None
    checkpoint_sha256: str | None  # of the checkpoint that a bundle was exported from
    size_bytes: int | None
    parity: Check | None  # the manifest's worst check of whole images against PyTorch
    unet_parameters: int | None
    # on what
    engine: str | None
    device: str | None  # as asked for; None means the engine's default; so for threads
    threads: int | None
    low_memory: bool
    # the image
    prompt: str
    negative_prompt: str
    prompt_sha256: str  # of both, one a line
    steps: int
    guidance: float
    guidance_mode: Literal["batched", "sequential"] | None  # None means the pipeline's own choice
    guidance_interval: tuple[float, float]  # fractions of the schedule
    sampler: str
    width: int | None  # pixels
    height: int | None
    seed: int
    # how often
    repeats: int
    warmup: int
    random_weights: bool = False  # of the model: nothing was trained, the image is noise
    # what came of it
    failure: str | None = None  # why there are no timings
    timings: Timings | None = None
    provider: str | None = None  # what computed, in the engine's words: "CPUExecutionProvider", "CPU"
    compute_dtype: str | None = None  # of the U-Net's matrix products, where the engine tells: "bf16"
    peak_rss_bytes: int | None = None  # the kernel's high-water mark; of a failed row: as last seen
    # Shared pages by their share. There is no high-water mark of it: sampled, so that short peaks can be missed.
    peak_pss_bytes: int | None = None
    energy_joules: float | None = None  # per counted image, of the processor packages with all that ran on them
    disturbance: Disturbance | None = None
    # how good the image is
    reference: bool = False  # the other rows' images are compared with this one's
    psnr: Psnr | None = None  # None for the reference itself, and where there is none
    prompt_quality: PromptQuality | None = None
    more_prompts: tuple[str, ...] = ()  # that the images after the first showed in turn

    @property
    def image_sec(self) -> float | None:
        """Median time of an image, warm, from the prompt to the PNG."""
        return None if self.timings is None else self.timings.end_to_end.median_sec

    @property
    def psnr_db(self) -> float | None:
        """PSNR to the reference's image, infinite where both are equal; None where it is not known."""
        return None if self.psnr is None else math.inf if self.psnr.db is None else self.psnr.db

    @property
    def parity_db(self) -> float | None:
        """The same of the export's proof."""
        return None if self.parity is None else math.inf if self.parity.psnr_db is None else self.parity.psnr_db


@dataclass(frozen=True)
class Environment:
    """The machine and the software that the rows were measured on."""

    __pydantic_config__ = _CLOSED

    os: str
    processor: str
    cores: int | None  # logical, as many as this process may use
    memory_bytes: int
    python: str
    versions: dict[str, str]  # kdc-edge and the installed packages that compute


@dataclass(frozen=True)
class Report:
    """The JSON document."""

    __pydantic_config__ = _CLOSED

    environment: Environment
    rows: tuple[Row, ...]
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    command: str | None = None  # the command line that made it
    schema: Literal["kdc-edge/bench/3"] = SCHEMA


_REPORT = TypeAdapter(Report)


def to_json(report: Report) -> str:
    return _REPORT.dump_json(report, indent=2).decode() + "\n"


def from_json(text: str | bytes) -> Report:
    """Read a document that `to_json` wrote; raises InputError naming the first field that is wrong."""
    try:
        found = json.loads(text)
        schema = found.get("schema") if isinstance(found, dict) else None
        if isinstance(schema, str) and schema.startswith("kdc-edge/bench/") and schema != SCHEMA:
            raise InputError(f"this report is {schema:.40} and this kdc-edge reads {SCHEMA}: measure again")
        return _REPORT.validate_python(found)
    except ValidationError as error:
        raise InputError(f"this is no {SCHEMA} report: {invalid_field(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is no {SCHEMA} report: {one_line(error)}") from None


def read_report(path: Path) -> Report:
    """The document in a file; raises InputError."""
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise InputError(f"larger than {megabytes(MAX_REPORT_BYTES)}")
        return from_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: make one with kdc-edge bench --format json --out {path}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def text_sha256(*lines: str) -> str:
    """Of texts, one a line."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()


def here() -> Environment:
    """This machine. Versions come from the packages' metadata: nothing is imported to learn them."""
    machine = this_machine()
    return Environment(
        os=machine.os,
        processor=machine.processor.name,
        cores=machine.cores,
        memory_bytes=machine.memory_bytes,
        python=machine.python,
        versions=package_versions(PACKAGES),
    )
