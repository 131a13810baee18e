"""The reference evaluator and its reader on programs that coremltools wrote, whole and damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_edge.errors import BundleError
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.evaluator import Evaluator
from kdc_edge.runtimes.mil.program import read_program
from tests.runtimes.test_mil_ops import floats


class Small(torch.nn.Module):
    """A bit of everything that the networks have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 48, 3, padding=1)
        self.norm = torch.nn.GroupNorm(8, 48)
        self.linear = torch.nn.Linear(48, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return F.gelu(self.linear(hidden)).softmax(-1)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from kdc_edge.export.coreml.apple_modules import AppleNetwork
    from kdc_edge.export.coreml.export import compress, convert
    from kdc_edge.manifest import Tensor
    from kdc_edge.quiet import quiet

    folder = tmp_path_factory.mktemp("packages")
    network = AppleNetwork(
        Small().eval(),
        {"x": Tensor(dtype="float32", shape=[1, 4, 8, 8])},
        {"y": Tensor(dtype="float32", shape=[1, 64, 96])},
        {}, "",
    )  # fmt: skip
    found = {}
    for target in ("iOS17", "iOS18"):
        whole = convert(network, half=True, target=target)
        for precision in ("fp16", "w8", "palette4"):
            found[f"{target}-{precision}"] = folder / f"{target}-{precision}.mlpackage"
            with quiet():
                compress(whole, precision).save(str(found[f"{target}-{precision}"]))
    return found


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
@pytest.mark.parametrize(("precision", "least_db"), [("fp16", 60), ("w8", 45), ("palette4", 25)])
def test_a_converted_network(packages: dict[str, Path], target: str, precision: str, least_db: float) -> None:
    x = floats(3, 1, 4, 8, 8)
    expected = Small().eval()(torch.tensor(x)).detach().numpy()
    found = Evaluator(read_program(packages[f"{target}-{precision}"] / PROGRAM))(x=x)["y"]
    assert found.dtype == np.float32
    error = np.mean((found - expected) ** 2)
    assert 10 * np.log10(expected.max() ** 2 / error) > least_db


@pytest.mark.parametrize("name", ["iOS17-palette4", "iOS18-palette4", "iOS17-w8", "iOS18-w8", "iOS18-fp16"])
def test_the_reader_reads_what_coremltools_reads(packages: dict[str, Path], name: str) -> None:
    from kdc_edge.runtimes.coreml_tools import load_coremltools

    ct = load_coremltools("a test")
    spec = ct.models.MLModel(str(packages[name]), skip_model_load=True).get_spec()
    function = spec.mlProgram.functions["main"]
    theirs = function.block_specializations[function.opset].operations
    ours = read_program(packages[name] / PROGRAM)
    assert ours.specification_version == spec.specificationVersion
    assert [o.type for o in ours.operations] == [o.type for o in theirs]
    assert [list(o.outputs) for o in ours.operations] == [[v.name for v in o.outputs] for o in theirs]
    assert [o.inputs.keys() for o in ours.operations] == [o.inputs.keys() for o in theirs]
    assert {n: t.shape for n, t in ours.inputs.items()} == {
        f.name: tuple(f.type.multiArrayType.shape) for f in spec.description.input
    }


def test_weights_equal_coremltools_own_decompression(packages: dict[str, Path], tmp_path: Path) -> None:
    from coremltools.optimize.coreml import decompress_weights

    from kdc_edge.quiet import quiet
    from kdc_edge.runtimes.coreml_tools import load_coremltools

    ct = load_coremltools("a test")
    for name in ("iOS17-palette4", "iOS18-palette4", "iOS17-w8", "iOS18-w8"):
        with quiet():
            whole = decompress_weights(ct.models.MLModel(str(packages[name]), skip_model_load=True))
            whole.save(str(tmp_path / f"{name}.mlpackage"))
        x = floats(4, 1, 4, 8, 8)
        found = Evaluator(read_program(packages[name] / PROGRAM))(x=x)["y"]
        expected = Evaluator(read_program(tmp_path / f"{name}.mlpackage" / PROGRAM))(x=x)["y"]
        np.testing.assert_array_equal(found, expected)


@pytest.fixture
def own(packages: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(packages["iOS17-fp16"], tmp_path / "own.mlpackage"))


def test_an_unknown_operation_is_named_with_its_place(own: Path) -> None:
    path = own / PROGRAM
    path.write_bytes(path.read_bytes().replace(b"softmax", b"softmux"))
    with pytest.raises(BundleError, match=r"uses the operation 'softmux' at '.*', which the mil engine does not know"):
        Evaluator(read_program(path))


def test_a_changed_operation_is_caught(own: Path) -> None:
    path = own / PROGRAM
    before = Evaluator(read_program(path))(x=floats(0, 1, 4, 8, 8))["y"]
    path.write_bytes(path.read_bytes().replace(b"\x04silu", b"\x04sqrt"))
    after = Evaluator(read_program(path))(x=floats(0, 1, 4, 8, 8))["y"]
    assert not np.allclose(before, after, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 4000), at=st.integers(0, 4000), byte=st.integers(0, 255))
def test_damaged_programs_are_one_line(packages: dict[str, Path], cut: int, at: int, byte: int) -> None:
    source = packages["iOS17-fp16"] / PROGRAM
    whole = source.read_bytes()
    damaged = bytearray(whole[: len(whole) - cut])
    damaged[at % len(damaged)] = byte
    path = source.with_name("damaged.mlmodel")
    path.write_bytes(damaged)
    said = ""
    try:
        Evaluator(read_program(path))(x=floats(0, 1, 4, 8, 8))
    except BundleError as error:
        said = str(error)
    assert "\n" not in said


def test_a_number_that_its_type_cannot_hold_is_one_line(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdc_edge.runtimes.mil.program.integers", lambda _: [2**36 - 1])
    with pytest.raises(BundleError, match="no ML Program that can be read: Python integer 68719476735 out of bounds"):
        read_program(own / PROGRAM)


def test_damaged_weights(own: Path) -> None:
    weights = own / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    evaluator = Evaluator(read_program(own / PROGRAM))
    data = weights.read_bytes()
    weights.write_bytes(data[:100])  # within the first record, whichever weight that is
    with pytest.raises(BundleError, match="damaged weight file: it ends before offset"):
        evaluator(x=floats(0, 1, 4, 8, 8))
    weights.unlink()
    with pytest.raises(BundleError, match=r"weight\.bin cannot be read"):
        Evaluator(read_program(own / PROGRAM))(x=floats(0, 1, 4, 8, 8))
    path = own / PROGRAM
    path.write_bytes(path.read_bytes().replace(b"weights/weight.bin", b"../../../secret.bi"))
    with pytest.raises(BundleError, match="leaves the folder"):
        Evaluator(read_program(path))(x=floats(0, 1, 4, 8, 8))


def test_inputs_of_another_shape_are_refused(packages: dict[str, Path]) -> None:
    evaluator = Evaluator(read_program(packages["iOS17-fp16"] / PROGRAM))
    with pytest.raises(BundleError, match=r"takes x of shape \(1, 4, 8, 8\) where \(1, 4, 9, 8\) is given"):
        evaluator(x=floats(0, 1, 4, 9, 8))
    with pytest.raises(BundleError, match="where nothing is given"):
        evaluator()
