"""Exports are whole, proved, quiet, and readable by others; or they are not there."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest

from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import hash_checkpoint
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.export.components import load_component
from kdc_edge.export.onnx.export import trace
from kdc_edge.export.targets import ExportRequest, export_checkpoint
from kdc_edge.runtimes import LoadOptions, get_runtime
from tests.forks import Fork

NAMES = {
    "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
    "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
    "vae_decoder": (["latent_sample"], ["sample"]),
}


def test_the_folder_is_optimums(bundle: Path) -> None:
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert files == {
        "kdc-edge.json", "model_index.json", "scheduler/scheduler_config.json",
        *(f"tokenizer/{n}" for n in ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")),
        *(f"{name}/{file}" for name in NAMES for file in ("config.json", "model.onnx")),
    }  # fmt: skip
    index = json.loads((bundle / "model_index.json").read_text("utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    for name, (inputs, outputs) in NAMES.items():
        graph = onnx.load(bundle / name / "model.onnx").graph
        assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (inputs, outputs)
    timestep = onnx.load(bundle / "unet" / "model.onnx").graph.input[1].type.tensor_type
    assert timestep.elem_type == onnx.TensorProto.INT64
    assert [d.dim_value for d in timestep.shape.dim] == [1]


def test_the_provenance(bundle_fp32: Path, checkpoint: Path) -> None:
    provenance = Bundle.open(bundle_fp32).manifest.provenance
    assert provenance.checkpoint == checkpoint.name
    assert provenance.checkpoint_sha256 == hash_checkpoint(checkpoint)
    assert {"kdc-edge", "torch", "diffusers", "onnxruntime"} <= provenance.packages.keys()
    assert provenance.command == "a test"
    assert provenance.created.endswith("+00:00")


def test_nothing_of_this_machine_is_in_the_files(bundle_fp32: Path) -> None:
    for path in bundle_fp32.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"site-packages" not in data
            assert str(Path(__file__).parents[2]).encode() not in data


def test_half_precision_halves_the_weights(bundle: Path, bundle_fp32: Path) -> None:
    for name in NAMES:
        half, whole = ((b / name / "model.onnx").stat().st_size for b in (bundle, bundle_fp32))
        assert half < 0.55 * whole
    model = onnx.load(bundle / "unet" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    kept = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert all(len(i.dims) < 2 or np.prod(i.dims) < 1024 for i in kept)


def test_weights_beyond_half_precision_stay_whole() -> None:
    import onnx_ir as ir

    from kdc_edge.export.onnx.export import store_half

    weights = {"large": np.full((64, 64), 1e5), "fits": np.full((64, 64), 0.5), "bias": np.ones(4096)}
    values = [ir.val(n, const_value=ir.tensor(w.astype(np.float32), name=n)) for n, w in weights.items()]
    nodes = [ir.node("Identity", [value]) for value in values]
    graph = ir.Graph([], [n.outputs[0] for n in nodes], nodes=nodes, initializers=values, opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    store_half(model)
    assert {name: value.dtype for name, value in graph.initializers.items()} == {
        "large": ir.DataType.FLOAT,
        "bias": ir.DataType.FLOAT,
        "fits.fp16": ir.DataType.FLOAT16,
    }


def test_tracing_is_quiet(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace(load_component(checkpoint, "text_encoder"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_dummy_inputs_have_the_described_shapes(checkpoint: Path, framework: str) -> None:
    for name, (inputs, outputs) in NAMES.items():
        part = load_component(checkpoint, name)
        dummies = part.config.generate_dummy_inputs(framework, batch_size=3)
        assert (list(dummies), list(part.config.outputs)) == (inputs, outputs)
        for tensor, shape in part.config.input_shapes.items():
            for given, described in zip(dummies[tensor].shape, shape, strict=True):
                assert given == {"batch_size": 3}.get(str(described), described) or isinstance(described, str)


@pytest.mark.usefixtures("traced_once")
def test_large_weights_lie_beside_the_graph(
    checkpoint: Path, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdc_edge.export.onnx.export.EXTERNAL_DATA_BYTES", 1_000_000)
    made = export_checkpoint(ExportRequest(checkpoint, tmp_path / "out", "onnx", "fp16", verify=False))
    assert made.manifest.parity is None
    assert made.manifest.components["unet"].files == ["unet/model.onnx", "unet/model.onnx_data"]
    assert made.manifest.components["text_encoder"].files == ["text_encoder/model.onnx"]
    assert made.verify() == len(made.manifest.files)
    inputs = {
        "sample": np.ones((1, 4, 8, 8), np.float32),
        "timestep": np.array([1]),
        "encoder_hidden_states": np.ones((1, 77, 128), np.float32),
    }
    runtime = get_runtime("onnxruntime")
    beside, within = (runtime.load(b, "unet", LoadOptions(threads=1))(**inputs) for b in (made.root, bundle))
    np.testing.assert_array_equal(beside, within)


@pytest.mark.usefixtures("traced_once")
def test_a_tokenizer_as_transformers_5_saves_it(own_checkpoint: Path, tmp_path: Path, bundle: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (own_checkpoint / "tokenizer" / name).unlink()
    made = export_checkpoint(ExportRequest(own_checkpoint, tmp_path / "out", "onnx", "fp16", verify=False))
    for name in ("vocab.json", "merges.txt"):
        ours, original = ((root / "tokenizer" / name).read_text("utf-8") for root in (made.root, bundle))
        assert ours.split() == original.split() or json.loads(ours) == json.loads(original)
    (own_checkpoint / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(CheckpointError, match="no byte-pair vocabulary"):
        export_checkpoint(ExportRequest(own_checkpoint, tmp_path / "other", "onnx", "fp16", verify=False))


def test_bad_requests_stop_before_the_work(checkpoint: Path, own_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no precision 'int3'"):
        export_checkpoint(ExportRequest(checkpoint, out, "onnx", "int3"))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        export_checkpoint(ExportRequest(tmp_path / "nowhere", out, "onnx", "fp16"))
    with pytest.raises(InputError, match="holds other files"):
        export_checkpoint(ExportRequest(checkpoint, own_checkpoint, "onnx", "fp16"))
    config = own_checkpoint / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"trained_betas": [0.1, 0.2]}))
    with pytest.raises(CheckpointError, match="trained_betas"):
        export_checkpoint(ExportRequest(own_checkpoint, out, "onnx", "fp16"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.usefixtures("traced_once")
def test_an_interrupted_export_leaves_what_was_there(
    checkpoint: Path, own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdc_edge.export.bundle_writer.check_parity", interrupt)
    before = Bundle.open(own_bundle).manifest
    for out in (tmp_path / "new", own_bundle):
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(ExportRequest(checkpoint, out, "onnx", "fp32"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]
    assert Bundle.open(own_bundle).manifest == before


KILLED = """
import sys, time
from pathlib import Path
import onnx_ir as ir
import kdc_edge.export.onnx.export as onnx
from kdc_edge.export.targets import ExportRequest, export_checkpoint
def trace(part, sizes=None):
    if part.name == "vae_decoder":
        print("ready", flush=True)
        time.sleep(600)
    return ir.load(Path(sys.argv[3]) / part.name / "model.onnx")
onnx.trace = trace
export_checkpoint(ExportRequest(Path(sys.argv[1]), Path(sys.argv[2]), "onnx", "fp16"))
"""


def test_a_killed_export_leaves_no_half_bundle(checkpoint: Path, bundle_fp32: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = Fork(KILLED, checkpoint, out, bundle_fp32, cwd=tmp_path, output=tmp_path / "said")
    child.wait_for(tmp_path / "said.out", 1)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(tmp_path.glob(".out.part-*/unet/model.onnx"))  # it was in the middle
    assert not out.exists()
    assert export_checkpoint(ExportRequest(checkpoint, out, "onnx", "fp16", verify=False)).verify() > 0
