"""What a benchmark knows: one `Row` a bundle, one `Environment` a machine, and both as one JSON document.

    text = to_json(Report(rows=rows, environment=here()))
    report = from_json(text)                     # InputError for anything else than kdc-edge/bench/1

Every sample is kept. Times are in seconds, sizes in bytes, and what is not known is None. The names in the
JSON document are the fields' names below; a later schema gets another number.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from pydantic import ConfigDict, TypeAdapter, ValidationError

import kdc_edge
from kdc_edge.bundle import Check
from kdc_edge.errors import InputError

SCHEMA: Literal["kdc-edge/bench/1"] = "kdc-edge/bench/1"
PACKAGES = ("numpy", "onnxruntime", "openvino", "coremltools", "torch")

_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Timing:
    """The samples of one stage and what they come to."""

    __pydantic_config__ = _CLOSED

    samples_sec: tuple[float, ...]
    median_sec: float
    p90_sec: float  # linear between neighbours, as numpy does

    @classmethod
    def of(cls, samples_sec: Sequence[float]) -> Timing | None:
        """None where nothing was measured, as for the second step of a one-step picture."""
        if not samples_sec:
            return None
        median, p90 = np.percentile(samples_sec, [50, 90])
        return cls(tuple(samples_sec), float(median), float(p90))


@dataclass(frozen=True)
class Timings:
    """The stages of a picture; their sum over a picture is its end to end."""

    __pydantic_config__ = _CLOSED

    load: Timing  # opening and compiling, in a process that had opened none: one sample; low_memory: opening alone
    first_picture: Timing  # the first picture after that, warm-up or not: one sample
    tokenize: Timing  # all that comes before the text encoder: checks, noise, tokens
    text_encoder: Timing
    unet_first_step: Timing  # each picture's first step, where engines plan and allocate
    unet_step: Timing | None  # every later step by itself; None for pictures of one step
    vae_decoder: Timing
    end_to_end: Timing


@dataclass(frozen=True)
class Row:
    """One bundle (or checkpoint), measured under the conditions that stand beside it."""

    __pydantic_config__ = _CLOSED

    name: str  # of the folder
    folder: str
    target: str | None  # None for a checkpoint
    precision: str | None
    engine: str | None
    device: str | None  # None means the engine's default; so for threads
    threads: int | None
    low_memory: bool
    size_bytes: int | None
    parity: Check | None  # the manifest's worst check of whole pictures against PyTorch
    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    guidance_mode: Literal["batched", "sequential"] | None  # None means the pipeline's own choice
    guidance_interval: tuple[float, float]  # fractions of the schedule
    sampler: str
    width: int | None  # pixels
    height: int | None
    seed: int
    repeats: int
    warmup: int
    timings: Timings | None = None
    peak_rss_bytes: int | None = None
    failure: str | None = None  # why there are no timings


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
    schema: Literal["kdc-edge/bench/1"] = SCHEMA


_REPORT = TypeAdapter(Report)


def to_json(report: Report) -> str:
    return _REPORT.dump_json(report, indent=2).decode() + "\n"


def from_json(text: str) -> Report:
    """Read a document that `to_json` wrote; raises InputError naming the first field that is wrong."""
    try:
        return _REPORT.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise InputError(f"this is no {SCHEMA} report: {where}: {first['msg']}") from None


def here() -> Environment:
    """This machine. Versions come from the packages' metadata: nothing is imported to learn them."""
    versions = {"kdc-edge": kdc_edge.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Environment(
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        cores=cores,
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        versions=versions,
    )


def _processor() -> str:
    """The processor's name as its maker gives it, where the system tells; else its architecture."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "Model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"
