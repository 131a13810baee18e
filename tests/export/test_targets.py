"""Targets come from outside too: a registered one has its flags on the command line, its proof and its engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdc_edge.bundle import Bundle
from kdc_edge.errors import InputError
from kdc_edge.export.targets import TARGETS, ExportRequest
from kdc_edge.formats import FORMATS
from tests.forks import Fork

# Its artifact is a note of where the checkpoint is; its engine computes that checkpoint with PyTorch.
PAPER = """
import sys
from dataclasses import dataclass, field
from pathlib import Path
from kdc_edge.export.bundle_writer import write_bundle
from kdc_edge.export.targets import TARGETS, Target, flag
from kdc_edge.formats import FORMATS, Format
from kdc_edge.runtimes.base import DEFAULTS, ENGINES, Device, Engine, get_runtime

@dataclass(frozen=True)
class PaperOptions:
    ink: str = field(default="black", metadata=flag("colour of the writing."))
    folded: bool = field(default=False, metadata=flag("half the size."))

def export(request, options):
    def write(part, folder):
        (folder / "note.txt").write_text(f"{options.ink}\\n{options.folded}\\n{request.checkpoint.resolve()}")
        return ["note.txt"]
    return write_bundle(request, write)

class PaperRuntime:
    name, version = "paper", "1"
    def devices(self):
        return [Device("DESK", "a desk")]
    def load(self, folder, component, options=DEFAULTS):
        checkpoint = (folder / component / "note.txt").read_text("utf-8").splitlines()[-1]
        return get_runtime("torch").load(Path(checkpoint), component)

RUNTIME = PaperRuntime()

TARGETS["paper"] = Target("Paper", "paper", PaperOptions)
FORMATS.append(Format("paper", "fp32", "a note", 0.1, False, ("paper",), 60.0, 50.0))
ENGINES["paper"] = Engine("paper", "paper", "torch", "train")

if __name__ == "__main__":
    sys.modules["paper"] = sys.modules["__main__"]
    from kdc_edge.cli import main
    main()
"""


def test_a_target_and_an_engine_from_outside(checkpoint: Path, tmp_path: Path) -> None:
    def kdc_edge(*words: object, code: int = 0) -> Fork:
        done = Fork(PAPER, *words, cwd=tmp_path, output=tmp_path / "said")
        assert done.wait() == code, done.err
        return done

    done = kdc_edge("export", checkpoint, "--target", "paper", "--precision", "fp32", "--ink", "red", "--folded")
    assert done.out == "bundles/paper-fp32\n"
    assert re.search(r"image: (equal|\d+\.\d dB) \(at least 50 dB\)", done.err)
    bundle = Bundle.open(tmp_path / "bundles" / "paper-fp32")
    assert (bundle.root / "unet" / "note.txt").read_text("utf-8").splitlines()[:2] == ["red", "True"]
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.conditions.startswith("paper 1, ")

    refused = kdc_edge("export", checkpoint, "--target", "onnx", "--ink", "red", code=1).err
    assert "--ink is for --target paper: leave it out" in refused
    assert re.search(r"--ink +<str> +Paper: colour of the writing\.", kdc_edge("export", "--help").out)


def test_every_format_has_a_target_and_only_some_are_calibrated(tmp_path: Path) -> None:
    assert {row.target for row in FORMATS} == TARGETS.keys()
    ExportRequest(tmp_path, tmp_path / "out", "onnx", "int8", calibration_samples=3)
    with pytest.raises(InputError, match="onnx-fp16 needs no calibration: leave out --calibration-prompts and"):
        ExportRequest(tmp_path, tmp_path / "out", "onnx", "fp16", calibration_samples=3)
