"""The export formats: one row per target and precision, for the command line, the docs and the proof.

The thresholds are peak signal-to-noise ratios against PyTorch fp32, in dB: `min_component_psnr_db` for each component's
output on recorded inputs (peak: the reference's largest magnitude), `min_image_psnr_db` for a whole image from the same
noise (peak 255).
"""

from __future__ import annotations

from dataclasses import dataclass

from kdc_edge.errors import unknown_choice
from kdc_edge.text import markdown_table


@dataclass(frozen=True)
class Format:
    target: str
    precision: str
    description: str
    bytes_per_weight: float  # of the U-Net, on disk
    calibrated: bool  # quantized on recorded U-Net inputs
    engines: tuple[str, ...]  # in order of preference
    min_component_psnr_db: float
    min_image_psnr_db: float

    @property
    def name(self) -> str:
        return f"{self.target}-{self.precision}"


_ORT, _OPENVINO = ("onnxruntime",), ("openvino",)
_COREML = ("coreml", "mil")  # mil computes on every machine, for the proof, the files that coreml runs on Apple's
_FP16 = "arithmetic in fp16"
_FP32 = "arithmetic in fp32"
_BF16 = "arithmetic in bf16 on CPUs with bf16 instructions, else fp32"
_VNNI = "int8 matrix products on CPUs with VNNI or AMX"

# fmt: off
FORMATS: list[Format] = [
    Format("onnx", "fp32", f"fp32 weights, {_FP32}", 4.0, False, _ORT, 60.0, 50.0),
    Format("onnx", "fp16", f"fp16 weights, {_FP32}", 2.0, False, _ORT, 45.0, 35.0),
    Format("onnx", "w8", f"int8 weights, {_FP32}", 1.0, False, _ORT, 35.0, 30.0),
    Format("onnx", "w4", f"int4 weights in U-Net matrices, int8 elsewhere, {_FP32}", 0.7, False, _ORT, 28.0, 25.0),
    Format("onnx", "int8", "int8 weights, int8 arithmetic in the U-Net", 1.0, True, _ORT, 20.0, 20.0),
    Format("coreml", "fp32", f"fp32 weights, {_FP32}", 4.0, False, _COREML, 60.0, 50.0),
    Format("coreml", "fp16", f"fp16 weights, {_FP16}", 2.0, False, _COREML, 45.0, 35.0),
    Format("coreml", "w8", f"int8 weights, {_FP16}", 1.0, False, _COREML, 40.0, 30.0),
    Format("coreml", "palette8", f"weights from tables of 256 values, {_FP16}", 1.0, False, _COREML, 40.0, 30.0),
    Format("coreml", "palette6", f"weights from tables of 64 values, {_FP16}", 0.75, False, _COREML, 32.0, 25.0),
    Format("coreml", "palette4", f"weights from tables of 16 values, {_FP16}", 0.5, False, _COREML, 20.0, 12.0),
    Format("coreml", "mixed", f"tables of 2 to 256 values, chosen per U-Net layer for a size or PSNR budget, {_FP16}",
           0.5, True, _COREML, 15.0, 10.0),
    Format("openvino", "fp32", f"fp32 weights, {_FP32}", 4.0, False, _OPENVINO, 60.0, 50.0),
    Format("openvino", "fp16", f"fp16 weights, {_BF16}", 2.0, False, _OPENVINO, 40.0, 35.0),
    Format("openvino", "w8", f"int8 weights, {_VNNI}, other {_BF16}", 1.0, False, _OPENVINO, 35.0, 30.0),
    Format("openvino", "w4", f"int4 weights in U-Net matrices, int8 elsewhere, {_VNNI}, other {_BF16}", 0.7, False,
           _OPENVINO, 28.0, 25.0),
    Format("openvino", "int8", "int8 weights, int8 arithmetic in the U-Net", 1.0, True, _OPENVINO, 20.0, 20.0),
    Format("openvino", "int8-hybrid", f"int8 weights, int8 convolutions in the U-Net, {_VNNI}", 1.0, True,
           _OPENVINO, 20.0, 20.0),
]
# fmt: on

DEFAULT_PRECISION = "fp16"
GOOD_PSNR_DB = 30.0  # of a whole image; above it, differences from PyTorch are hard to see


def targets() -> tuple[str, ...]:
    return tuple(dict.fromkeys(f.target for f in FORMATS))


def find_format(target: str, precision: str) -> Format:
    """The row of a target and precision; raises UsageError naming the choices."""
    for row in FORMATS:
        if (row.target, row.precision) == (target, precision):
            return row
    known = [f.precision for f in FORMATS if f.target == target]
    if not known:
        raise unknown_choice("--target", target, targets())
    raise unknown_choice("--precision", precision, known, f"{target} has no precision {precision!r:.80}")


def formats_table() -> str:
    """The README's table."""
    names = ("target", "precision", "description", "bytes per weight", "engine", "minimum image PSNR")
    rows = [
        (f.target, f.precision, f.description, f"{f.bytes_per_weight:g}", f.engines[0], f"{f.min_image_psnr_db:g} dB")
        for f in FORMATS
    ]
    return markdown_table(names, rows)
