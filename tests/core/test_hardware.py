"""What a machine says of itself, from texts of machines that are not here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from kdc_edge.cli.devices import describe, find_engines, missing
from kdc_edge.hardware import Accelerator, find_accelerators, read_cpuinfo, read_sysctl, this_machine
from tests.cli.test_commands import run

SAPPHIRE_RAPIDS = """
processor	: 0
vendor_id	: GenuineIntel
model		: 143
model name	: Intel(R) Xeon(R) Platinum 8488C
flags		: fpu sse4_2 f16c avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8
bugs		: avx512_imaginary

processor	: 1
model name	: Intel(R) Xeon(R) Platinum 8488C
flags		: fpu sse4_2 f16c avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8
"""
ALDER_LAKE = "model name : 12th Gen Intel(R) Core(TM) i7-12700H\nflags : fpu avx2 fma avx_vnni\n"
RASPBERRY_PI_5 = """
processor	: 0
Features	: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU part	: 0xd0b

Revision	: c04170
Model		: Raspberry Pi 5 Model B Rev 1.0
"""
# A phone: the small cores lack what the large ones have, and its largest core is in no table.
PHONE = """
Features : fp asimd asimdhp asimddp
CPU implementer : 0x41
CPU part : 0xd46
Features : fp asimd asimdhp asimddp i8mm bf16 sve sve2 sme
CPU implementer : 0x41
CPU part : 0xfff
"""


@pytest.mark.parametrize(
    ("text", "architecture", "name", "features"),
    [
        (
            SAPPHIRE_RAPIDS, "x86_64", "Intel(R) Xeon(R) Platinum 8488C",
            ("AVX2", "AVX-512", "AVX512_BF16", "AVX512_FP16", "VNNI", "AMX_BF16", "AMX_INT8"),
        ),
        (ALDER_LAKE, "x86_64", "12th Gen Intel(R) Core(TM) i7-12700H", ("AVX2", "VNNI")),
        (RASPBERRY_PI_5, "aarch64", "Raspberry Pi 5 Model B Rev 1.0 (Cortex-A76)", ("NEON", "FP16", "DotProd")),
        (PHONE, "aarch64", "Cortex-A510, core 0x41 0xfff", ("NEON", "FP16", "DotProd")),
        (PHONE.split("0xd46")[1], "aarch64", "core 0x41 0xfff",
         ("NEON", "FP16", "BF16", "DotProd", "I8MM", "SVE", "SVE2", "SME")),
        ("model name : ARMv7\nFeatures : half thumb neon vfpv4\n", "armv7l", "ARMv7", ("NEON",)),
    ],
)  # fmt: skip
def test_processors_of_linux(text: str, architecture: str, name: str, features: tuple[str, ...]) -> None:
    found = read_cpuinfo(text, architecture)
    assert (found.name, found.architecture, found.features) == (name, architecture, features)
    assert found.absent is not None
    assert not set(found.absent) & set(features)
    assert len(found.absent) + len(features) == (7 if architecture == "x86_64" else 9)


def test_a_processor_that_tells_nothing_is_unknown_not_poor() -> None:
    for text, architecture in (("", "x86_64"), ("model name : C920\nisa : rv64gcv\n", "riscv64")):
        found = read_cpuinfo(text, architecture)
        assert (found.features, found.absent) == (None, None)
    assert found.name == "C920"
    assert read_sysctl("", "arm64").features is None


def test_processors_of_macos() -> None:
    text = "machdep.cpu.brand_string: Apple M4\nhw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_SME: 1\n"
    text += "hw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    found = read_sysctl(text, "arm64")
    assert (found.name, found.features) == ("Apple M4", ("NEON", "BF16", "SME"))


def test_this_machine_is_the_one_that_others_see() -> None:
    machine = this_machine()
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert 0 < machine.available_bytes < machine.memory_bytes
    assert machine.processor.name


def test_hardware_without_its_driver_is_named_with_what_to_do(tmp_path: Path) -> None:
    assert find_accelerators(tmp_path) == []
    for path, text in (
        ("proc/driver/nvidia/version", "NVRM version"),
        ("sys/class/drm/renderD128/device/vendor", "0x8086\n"),
        ("sys/class/accel/accel0/device/vendor", "0x8086\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    here = find_accelerators(tmp_path)
    assert {(a.engine, a.device) for a in here} == {
        ("onnxruntime", "CUDA"), ("torch", "CUDA"), ("openvino", "GPU"), ("openvino", "NPU"),
    }  # fmt: skip

    def engine(name: str, *devices: str) -> dict[str, object]:
        return {"engine": name, "devices": [{"name": device, "description": ""} for device in devices]}

    # The GPU is used (under OpenVINO's name for the first of two), the NPU is not, torch is not installed.
    engines = [engine("openvino", "CPU", "GPU.0", "GPU.1"), engine("onnxruntime", "CPU", "CUDA")]
    lines = missing([*engines, {"engine": "torch", "missing": "not installed: pip install x"}], here)
    assert lines == [
        "torch: not installed: pip install x",
        "openvino NPU: the Intel NPU here is not used: install Intel's NPU driver (intel-level-zero-npu)",
    ]
    (tmp_path / "sys/class/drm/renderD128/device/vendor").write_text("0x1002\n")
    assert ("onnxruntime", "MIGRAPHX") in {(a.engine, a.device) for a in find_accelerators(tmp_path)}


def test_an_engine_that_is_absent_or_broken_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdc_edge.runtimes import base

    def load(name: str) -> object:
        if name == "kdc_edge.runtimes.openvino":
            raise OSError("libopenvino.so: wrong ELF class\nand more")
        return __import__(name, fromlist=["RUNTIME"])

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "kdc_edge.runtimes.onnxruntime", raising=False)
    monkeypatch.setattr(base.importlib, "import_module", load)
    rows = {row["engine"]: row for row in find_engines()}
    assert rows["onnxruntime"]["missing"] == "not installed: pip install 'kdc-edge[onnx]'"
    assert rows["openvino"]["missing"].startswith("cannot be loaded (libopenvino.so: wrong ELF class): pip install")
    assert rows["mil"]["devices"]
    text = "\n".join(describe(this_machine(), list(rows.values()), missing(list(rows.values()), [])))
    assert "missing    onnxruntime: not installed" in text
    assert "engine     mil" in text


def test_devices_as_a_document_and_as_lines(tmp_path: Path) -> None:
    document = json.loads(run("devices", "--json", cwd=tmp_path).stdout)
    assert document["processor"]["name"] == this_machine().processor.name
    engines = {row["engine"]: row for row in document["engines"]}
    assert "CPU" in [d["name"] for d in engines["onnxruntime"]["devices"]]
    assert any(line.startswith("coreml") for line in document["missing"]) == (sys.platform != "darwin")
    text = run("devices", cwd=tmp_path).stdout
    assert f"processor  {document['processor']['name']}" in text
    assert f"engine     openvino {engines['openvino']['version']}: CPU" in text


def test_an_accelerator_of_an_engine_that_is_missing_is_said_once() -> None:
    gpu = Accelerator("NVIDIA GPU", "torch", "CUDA", "install it")
    assert missing([{"engine": "torch", "missing": "not installed"}], [gpu]) == ["torch: not installed"]
