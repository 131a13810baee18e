"""This machine: processor, instruction sets, memory, accelerators, and versions of installed packages.

    machine = this_machine()
    machine.processor.features         # ("AVX2", "AVX-512", "AVX512_BF16"); None where the system does not tell

No package is imported for it, and no network is used.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from kdc_edge.errors import InputError
from kdc_edge.version import __version__

MAX_THREADS_PER_CORE = 8  # more only wait for each other


@dataclass(frozen=True)
class Feature:
    """Instructions that engines choose faster kernels for."""

    name: str
    flags: tuple[str, ...]  # in Linux's /proc/cpuinfo, any of them
    sysctl: str | None  # on macOS
    description: str


X86 = (
    Feature("AVX2", ("avx2",), "hw.optional.avx2_0", "256-bit vectors"),
    Feature("AVX-512", ("avx512f",), "hw.optional.avx512f", "512-bit vectors"),
    Feature("AVX512_BF16", ("avx512_bf16",), None, "bfloat16"),
    Feature("AVX512_FP16", ("avx512_fp16",), None, "float16"),
    Feature("VNNI", ("avx512_vnni", "avx_vnni"), "hw.optional.avx512vnni", "8-bit dot products"),
    Feature("AMX_BF16", ("amx_bf16",), None, "bfloat16 matrices"),
    Feature("AMX_INT8", ("amx_int8",), None, "8-bit matrices"),
)
ARM = (
    Feature("NEON", ("asimd", "neon"), "hw.optional.AdvSIMD", "128-bit vectors"),
    Feature("FP16", ("asimdhp",), "hw.optional.arm.FEAT_FP16", "float16"),
    Feature("BF16", ("bf16",), "hw.optional.arm.FEAT_BF16", "bfloat16"),
    Feature("DotProd", ("asimddp",), "hw.optional.arm.FEAT_DotProd", "8-bit dot products"),
    Feature("I8MM", ("i8mm",), "hw.optional.arm.FEAT_I8MM", "8-bit matrices"),
    Feature("SVE", ("sve",), None, "vectors of any length"),
    Feature("SVE2", ("sve2",), None, "vectors of any length"),
    Feature("SME", ("sme",), "hw.optional.arm.FEAT_SME", "matrices"),
    Feature("SME2", ("sme2",), "hw.optional.arm.FEAT_SME2", "matrices"),
)

# Linux gives Arm cores by number: implementer, part.
_ARM_CORES = {
    "0x41 0xd03": "Cortex-A53", "0x41 0xd05": "Cortex-A55", "0x41 0xd07": "Cortex-A57", "0x41 0xd08": "Cortex-A72",
    "0x41 0xd0b": "Cortex-A76", "0x41 0xd0c": "Neoverse-N1", "0x41 0xd40": "Neoverse-V1", "0x41 0xd41": "Cortex-A78",
    "0x41 0xd44": "Cortex-X1", "0x41 0xd46": "Cortex-A510", "0x41 0xd47": "Cortex-A710", "0x41 0xd48": "Cortex-X2",
    "0x41 0xd49": "Neoverse-N2", "0x41 0xd4d": "Cortex-A715", "0x41 0xd4e": "Cortex-X3", "0x41 0xd4f": "Neoverse-V2",
    "0x41 0xd80": "Cortex-A520", "0x41 0xd81": "Cortex-A720", "0x41 0xd82": "Cortex-X4",
}  # fmt: skip


@dataclass(frozen=True)
class Processor:
    name: str  # the vendor's name where the system tells it, else the architecture
    architecture: str  # x86_64, aarch64, arm64, ...
    features: tuple[str, ...] | None  # of this architecture's table; None where the system does not tell
    absent: tuple[str, ...] | None  # the rest of that table

    @property
    def lacks_vnni(self) -> bool:
        """Is it an x86 that multiplies 8-bit numbers in 16 bits, where their sums overflow?"""
        features = self.features or ()
        return "AVX2" in features and "VNNI" not in features


@dataclass(frozen=True)
class Machine:
    os: str
    python: str
    processor: Processor
    cores: int | None  # logical, as many as this process may use
    memory_bytes: int
    available_bytes: int  # without swapping


@dataclass(frozen=True)
class Accelerator:
    """Hardware in this machine, the engine's device for it, and how to install that device."""

    name: str
    engine: str
    device: str
    hint: str


def this_machine() -> Machine:
    memory = psutil.virtual_memory()
    return Machine(
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=this_processor(),
        cores=cores(),
        memory_bytes=memory.total,
        available_bytes=memory.available,
    )


def cores() -> int | None:
    """Logical processors, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads that no engine should start here: thousands take a machine down."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"{threads} threads are too few: use 1 or more")
    here = cores() or 1
    if threads > (most := MAX_THREADS_PER_CORE * here):
        raise InputError(f"{threads} threads are too many for {here} cores: use {here}, and at most {most}")


def free_memory_bytes() -> int:
    """What can be allocated now, swap included."""
    return int(psutil.virtual_memory().available + psutil.swap_memory().free)


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """kdc-edge's version and those of the installed packages, from their metadata: nothing is imported."""
    found = {"kdc-edge": __version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def this_processor() -> Processor:
    architecture = platform.machine() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        return read_cpuinfo(cpuinfo.read_text(errors="replace"), architecture)
    if sys.platform == "darwin":
        found = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, errors="replace", check=False)
        return read_sysctl(found.stdout, architecture)
    return Processor(platform.processor() or architecture, architecture, None, None)


def read_cpuinfo(text: str, architecture: str) -> Processor:
    """From Linux's /proc/cpuinfo; unknown fields are left out."""
    fields: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and value.strip():
            fields.setdefault(key.strip(), []).append(value.strip())
    codes = zip(fields.get("CPU implementer", []), fields.get("CPU part", []), strict=False)
    cores = ", ".join(dict.fromkeys(_ARM_CORES.get(f"{who} {part}", f"core {who} {part}") for who, part in codes))
    name = next((fields[key][0] for key in ("model name", "Hardware", "Model") if key in fields), "")
    if name and cores:
        name = f"{name} ({cores})"
    flags = fields.get("flags") or fields.get("Features")
    there = None if flags is None else set.intersection(*(set(line.lower().split()) for line in flags))
    return _processor(name or cores or architecture, architecture, there)


def read_sysctl(text: str, architecture: str) -> Processor:
    """From macOS's `sysctl -a`."""
    values = dict(re.findall(r"^([\w.]+): (.*)$", text, re.M))
    return _processor(
        values.get("machdep.cpu.brand_string", architecture),
        architecture,
        {name for name, value in values.items() if value == "1"} if values else None,
    )


def _processor(name: str, architecture: str, there: set[str] | None) -> Processor:
    """`there`: flags or sysctl names that all cores have."""
    table = _table(architecture)
    if there is None or not table:
        return Processor(name, architecture, None, None)
    has = {f.name: bool(there.intersection(f.flags) or f.sysctl in there) for f in table}
    return Processor(
        name, architecture, tuple(n for n, yes in has.items() if yes), tuple(n for n, yes in has.items() if not yes)
    )


def _table(architecture: str) -> tuple[Feature, ...]:
    if architecture.lower() in ("x86_64", "amd64", "i686", "i386"):
        return X86
    return ARM if architecture.lower().startswith(("aarch64", "arm")) else ()


def describe_feature(name: str) -> str:
    return next(f.description for f in (*X86, *ARM) if f.name == name)


def find_accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """Accelerators that Linux's drivers report; none on other systems. `root` is for tests."""
    found = []
    if (root / "proc/driver/nvidia/version").is_file():
        for engine, hint in (
            ("onnxruntime", "pip install onnxruntime-gpu in place of onnxruntime"),
            ("torch", "install the build of torch for CUDA"),
        ):
            found.append(Accelerator("NVIDIA GPU", engine, "CUDA", hint))
    vendors = [path.read_text().strip() for path in sorted(root.glob("sys/class/drm/renderD*/device/vendor"))]
    if "0x8086" in vendors:
        hint = "install Intel's compute runtime (intel-opencl-icd)"
        found.append(Accelerator("Intel GPU", "openvino", "GPU", hint))
    if "0x1002" in vendors:
        hint = "install AMD's build of onnxruntime (onnxruntime-migraphx)"
        found.append(Accelerator("AMD GPU", "onnxruntime", "MIGRAPHX", hint))
    if "0x8086" in [path.read_text().strip() for path in root.glob("sys/class/accel/accel*/device/vendor")]:
        found.append(Accelerator("Intel NPU", "openvino", "NPU", "install Intel's NPU driver (intel-level-zero-npu)"))
    return found
