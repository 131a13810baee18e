"""What can be exported: one row a (target, precision). The command line, the docs and the checks read it.

The thresholds are peak signal-to-noise ratios against PyTorch fp32, in dB: `min_component_psnr_db` for each
component's output on recorded inputs (the signal's peak is the reference's largest magnitude),
`min_image_psnr_db` for a whole image from the same noise (peak 255).
"""

from __future__ import annotations

from dataclasses import dataclass

from kdc_edge.errors import InputError
from kdc_edge.text import markdown_table


@dataclass(frozen=True)
class Format:
    target: str
    precision: str
    does: str  # in plain words, for `kdc-edge formats`
    bytes_per_weight: float  # of the U-Net, on disk
    calibrated: bool  # needs recorded inputs to quantize?
    engines: tuple[str, ...]  # that can run it, the preferred first where the machine has it
    min_component_psnr_db: float
    min_image_psnr_db: float

    @property
    def name(self) -> str:
        return f"{self.target}-{self.precision}"


_ORT, _OPENVINO = ("onnxruntime",), ("openvino",)
_COREML = ("coreml", "mil")  # mil proves on every machine what coreml runs on Apple's
_BF16 = "arithmetic in bfloat16 where the processor has it"
_VNNI = "matrix products too on a CPU that multiplies such"
_FP16 = "arithmetic in 16 bits"

# fmt: off
FORMATS: tuple[Format, ...] = (
    Format("onnx", "fp32", "weights and arithmetic in 32 bits", 4.0, False, _ORT, 60.0, 50.0),
    Format("onnx", "fp16", "weights stored in 16 bits, arithmetic in 32 bits", 2.0, False, _ORT, 45.0, 35.0),
    Format("onnx", "w8", "weights stored in 8 bits, arithmetic in 32 bits", 1.0, False, _ORT, 35.0, 30.0),
    Format("onnx", "w4", "the U-Net's matrices stored in 4 bits, the rest in 8, arithmetic in 32 bits", 0.7, False,
           _ORT, 28.0, 25.0),
    Format("onnx", "int8", "weights and the U-Net's arithmetic in 8 bits", 1.0, True, _ORT, 20.0, 20.0),
    Format("coreml", "fp32", "weights and arithmetic in 32 bits", 4.0, False, _COREML, 60.0, 50.0),
    Format("coreml", "fp16", "weights and arithmetic in 16 bits", 2.0, False, _COREML, 45.0, 35.0),
    Format("coreml", "w8", f"weights stored in 8 bits, {_FP16}", 1.0, False, _COREML, 40.0, 30.0),
    Format("coreml", "palette8", f"weights from tables of 256 values, {_FP16}", 1.0, False, _COREML, 40.0, 30.0),
    Format("coreml", "palette6", f"weights from tables of 64 values, {_FP16}", 0.75, False, _COREML, 32.0, 25.0),
    Format("coreml", "palette4", f"weights from tables of 16 values, {_FP16}", 0.5, False, _COREML, 20.0, 12.0),
    Format("coreml", "mixed", f"each layer of the U-Net from a table of 2 to 256 values, within a budget, {_FP16}", 0.5,
           True, _COREML, 15.0, 10.0),
    Format("openvino", "fp32", "weights and arithmetic in 32 bits", 4.0, False, _OPENVINO, 60.0, 50.0),
    Format("openvino", "fp16", f"weights stored in 16 bits, {_BF16}", 2.0, False, _OPENVINO, 40.0, 35.0),
    Format("openvino", "w8", f"weights stored in 8 bits, {_VNNI}, other {_BF16}", 1.0, False, _OPENVINO, 35.0, 30.0),
    Format("openvino", "w4", f"the U-Net's matrices stored in 4 bits, the rest in 8, {_VNNI}, other {_BF16}", 0.7,
           False, _OPENVINO, 28.0, 25.0),
    Format("openvino", "int8", "weights and the U-Net's arithmetic in 8 bits", 1.0, True, _OPENVINO, 20.0, 20.0),
    Format("openvino", "int8-hybrid", f"weights, and the U-Net's convolutions, in 8 bits, {_VNNI}", 1.0, True,
           _OPENVINO, 20.0, 20.0),
)
# fmt: on

DEFAULT_PRECISION = "fp16"
GOOD_PSNR_DB = 30.0  # of a whole image: what differs from PyTorch's is hard to see


def targets() -> tuple[str, ...]:
    return tuple(dict.fromkeys(f.target for f in FORMATS))


def find_format(target: str, precision: str) -> Format:
    """The row of a target and precision; raises InputError naming what there is."""
    for row in FORMATS:
        if (row.target, row.precision) == (target, precision):
            return row
    known = [f.precision for f in FORMATS if f.target == target]
    if not known:
        raise InputError(f"unknown target {target!r}: choose from {', '.join(targets())}")
    raise InputError(f"{target} has no precision {precision!r}: choose from {', '.join(known)}")


def formats_table() -> str:
    """The table as the README shows it."""
    names = ("target", "precision", "what it does", "bytes a weight", "engine", "image PSNR at least")
    rows = [
        (f.target, f.precision, f.does, f"{f.bytes_per_weight:g}", f.engines[0], f"{f.min_image_psnr_db:g} dB")
        for f in FORMATS
    ]
    return markdown_table(names, rows)
