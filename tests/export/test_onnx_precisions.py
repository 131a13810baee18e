"""ONNX in every precision and form: what is computed, what stays in float, and what the engine makes of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdc_edge import Pipeline
from kdc_edge.bundle import Bundle
from kdc_edge.errors import BundleError, InputError
from kdc_edge.export.components import ExportComponent, load_component
from kdc_edge.export.onnx.export import trace
from kdc_edge.export.onnx.int8 import quantize_int8, uint8_scale
from kdc_edge.export.onnx.weights import round_channels
from kdc_edge.export.targets import ExportRequest, OnnxOptions, export_checkpoint
from kdc_edge.hardware import Processor
from kdc_edge.manifest import MANIFEST, list_files
from kdc_edge.request import Request
from kdc_edge.runtimes import LoadOptions, get_runtime, open_pipeline
from tests.export.editing import closeness_db
from tests.runtimes.test_base import some_inputs

PROMPTS = ["a red flower", "a blue fish"]


@pytest.fixture(scope="module")
def bundles(
    checkpoint: Path, bundle_fp32: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every precision, proved; the graphs are traced once."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {"fp32": bundle_fp32, "fp16": bundle}
    for precision in ("w8", "w4"):
        made[precision] = export_checkpoint(
            ExportRequest(checkpoint, folder / precision, "onnx", precision, extra=["vae_encoder"])
        ).root
    request = ExportRequest(
        checkpoint, folder / "int8", "onnx", "int8", calibration_prompts=PROMPTS, calibration_samples=6,
        extra=["vae_encoder"],
    )  # fmt: skip
    made["int8"] = export_checkpoint(request).root
    return made


def operations(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def optimized(path: Path, work: Path) -> Counter[str]:
    """The operations that onnxruntime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(work / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return operations(work / "optimized.onnx")


def unet_model(bundle: Path) -> Path:
    return bundle / "unet" / "model.onnx"


def test_sizes_fall_with_the_bits(bundles: dict[str, Path]) -> None:
    sizes = {p: sum(f.stat().st_size for f in (b / "unet").glob("model.onnx*")) for p, b in bundles.items()}
    assert sizes["fp16"] < 0.55 * sizes["fp32"]
    assert sizes["w8"] < 0.65 * sizes["fp16"]
    assert sizes["w4"] < sizes["w8"]
    assert sizes["int8"] < 0.65 * sizes["fp16"]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("precision", ["w8", "w4", "int8"])
def test_the_encoder_is_kept_in_8_bits_and_proved(bundles: dict[str, Path], checkpoint: Path, precision: str) -> None:
    manifest = Bundle.open(bundles[precision]).manifest
    assert manifest.parity is not None
    check = manifest.parity.checks[-1]
    assert (check.what, check.passed, check.reaches(30)) == ("vae_encoder", True, True)
    graph = onnx.load(bundles[precision] / "vae_encoder" / "model.onnx").graph
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    stored = sum(len(t.raw_data) for t in graph.initializer if t.data_type in kinds)
    assert stored > 0.9 * sum(len(t.raw_data) for t in graph.initializer)
    pipeline = Pipeline.open(bundles[precision], threads=1)
    assert closeness_db(pipeline, checkpoint, "dpm++2m", masked=False, steps=2) > 25


def test_the_timesteps_matrices_are_in_8_bits(bundles: dict[str, Path]) -> None:
    found = {precision: operations(bundles[precision] / "unet" / "model.onnx") for precision in ("fp16", "w8", "w4")}
    assert found["w4"]["Gemm"] == found["fp16"]["Gemm"] > 5
    assert found["w4"]["DequantizeLinear"] == found["w4"]["Conv"] + found["w4"]["Gemm"]
    assert found["w4"]["Cast"] < found["fp16"]["Cast"]


def test_names_that_the_tracer_numbered_are_numbers_alone(bundles: dict[str, Path]) -> None:
    for precision in ("fp32", "w4"):
        graph = onnx.load(bundles[precision] / "unet" / "model.onnx").graph
        onnx.checker.check_model(str(bundles[precision] / "vae_decoder" / "model.onnx"))
        assert not any(node.name for node in graph.node)
        assert not graph.value_info
        names = {tensor.name for tensor in graph.initializer}
        assert not any(name.startswith("val_") for name in names)
        assert "unet.conv_in.bias" in names


def test_attention_is_one_operation(bundles: dict[str, Path], checkpoint: Path) -> None:
    attentions = sum(name.endswith("to_q") for name, _ in load_component(checkpoint, "unet").module.named_modules())
    assert operations(unet_model(bundles["fp32"]))["MultiHeadAttention"] == attentions > 0
    assert operations(bundles["fp32"] / "vae_decoder" / "model.onnx")["MultiHeadAttention"] == 1


def test_original_attention_is_standard_onnx_and_equal(
    checkpoint: Path, bundle_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --static too: of both, the U-Net is traced anew and the rest taken as it is."""

    def trace_unet(part: ExportComponent, sizes: dict[str, int]) -> ir.Model:
        return trace(part, sizes) if part.name == "unet" else ir.load(bundle_fp32 / part.name / "model.onnx")

    monkeypatch.setattr("kdc_edge.export.onnx.export.trace", trace_unet)
    options = OnnxOptions(attention="original", static=True)
    made = export_checkpoint(ExportRequest(checkpoint, tmp_path / "out", "onnx", "fp32", verify=False), options)
    graph = onnx.load(unet_model(made.root)).graph
    assert {node.domain for node in graph.node} == {""}
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 4, 16, 16]
    assert made.manifest.components["unet"].inputs["sample"].shape == [1, 4, 16, 16]
    request = Request("a red flower", steps=2, guidance=3.0)
    fixed, free = (open_pipeline(root, threads=1).generate(request) for root in (made.root, bundle_fp32))
    assert np.abs(fixed.astype(int) - free).max() <= 1  # guidance asks for two samples, the graph takes one
    pipeline = open_pipeline(made.root)
    with pytest.raises(InputError, match="height 128 cannot be made: this bundle's sizes are fixed"):
        pipeline.check(Request("a red flower", steps=1, width=128, height=128))
    with pytest.raises(BundleError, match="cannot compute this"):
        pipeline.components["unet"](
            sample=np.zeros((1, 4, 32, 32), np.float32), timestep=np.zeros(1, np.int64),
            encoder_hidden_states=np.zeros((1, 77, 128), np.float32),
        )  # fmt: skip
    with pytest.raises(InputError, match="--attention 'sdpa' is unknown: choose from fused, original"):
        OnnxOptions(attention="sdpa")


def test_a_fixed_batch_is_calibrated_sample_by_sample(
    checkpoint: Path, bundle_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves of guidance are recorded in one call, and the graph of --static takes one sample."""
    shapes: list[tuple[int, ...]] = []

    def quantize(base: Path, inputs: list[dict[str, np.ndarray]]) -> tuple[ir.Model, dict[str, float]]:
        shapes.extend(call["sample"].shape for call in inputs)
        return ir.load(base), {}

    monkeypatch.setattr("kdc_edge.export.onnx.export.quantize_int8", quantize)
    monkeypatch.setattr(
        "kdc_edge.export.onnx.export.trace", lambda part, _: ir.load(bundle_fp32 / part.name / "model.onnx")
    )
    for static, expected in ((True, [(1, 4, 16, 16)] * 4), (False, [(2, 4, 16, 16)] * 2)):
        request = ExportRequest(checkpoint, tmp_path / "out", "onnx", "int8", calibration_samples=2, verify=False)
        export_checkpoint(request, OnnxOptions(static=static))
        assert shapes == expected
        shapes.clear()


def test_int8_computes_in_integers(bundles: dict[str, Path], tmp_path: Path) -> None:
    ran = optimized(unet_model(bundles["int8"]), tmp_path)
    plain = operations(unet_model(bundles["fp32"]))
    assert ran["QLinearConv"] >= plain["Conv"] - 2 - ran["FusedConv"]  # all but those at the latents
    assert ran["MatMulIntegerToFloat"] == plain["MatMul"]
    info = Bundle.open(bundles["int8"]).manifest.calibration
    assert info is not None
    assert (info.samples, info.prompts) == (6, 2)


def test_layers_that_hurt_stay_in_float(tmp_path: Path) -> None:
    """One product's input has an outlier that leaves nothing of the other values in 8 bits."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((32, 32)).astype(np.float32)
    weights[0] = 0  # the outlier's own contribution: none
    x = ir.val("x", ir.DataType.FLOAT, [4, 32])
    values = [ir.val(n, const_value=ir.tensor(weights, name=n)) for n in ("w1", "w2")]
    spoil = ir.val("spoil", const_value=ir.tensor(np.eye(1, 32, dtype=np.float32) * 1e5, name="spoil"))
    fine = ir.node("MatMul", [x, values[0]], name="fine")
    spoiled = ir.node("Add", [x, spoil], name="spoiled")
    hurt = ir.node("MatMul", [spoiled.outputs[0], values[1]], name="hurt")
    for node in (fine, spoiled, hurt):
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([4, 32])
    graph = ir.Graph(
        [x], [fine.outputs[0], hurt.outputs[0]], nodes=[fine, spoiled, hurt], initializers=[*values, spoil],
        opset_imports={"": 20}, name="test",
    )  # fmt: skip
    calls = [{"x": random.standard_normal((4, 32)).astype(np.float32)} for _ in range(5)]
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "base.onnx")
    model, left_out = quantize_int8(tmp_path / "base.onnx", calls)
    assert left_out.keys() == {"hurt"}
    assert left_out["hurt"] < 1
    assert [node.inputs[1].name for node in model.graph if node.op_type == "MatMul" and node.inputs[1]] == [
        "fine.weight",
        "w2",
    ]


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
@example(0.0, 3.653956830836425e-42)  # its step would have two bits in float32
def test_ranges_hold_zero_exactly(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = uint8_scale(low, high)
    assert 0 <= zero <= 255
    assert scale > 0
    for value in (0.0, low, high):
        rounded = (np.clip(np.rint(value / scale) + zero, 0, 255) - zero) * scale
        assert abs(rounded - value) <= (0 if value == 0 else 1.01 * scale)


@given(arrays.arrays(np.float32, (5, 7), elements=st.floats(-100, 100, width=32)), st.integers(0, 1))
def test_rounded_channels_are_within_half_a_step(weights: np.ndarray, axis: int) -> None:
    stored, scale = round_channels(weights, axis)
    assert scale.shape == (weights.shape[axis],)
    widened = stored * scale.reshape([-1 if i == axis else 1 for i in range(2)])
    assert (np.abs(widened - weights) <= 0.501 * scale.max() + 1e-12).all()


def test_rows_are_looked_up_before_they_are_widened(bundles: dict[str, Path]) -> None:
    graph = onnx.load(bundles["fp16"] / "text_encoder" / "model.onnx").graph
    (table,) = (node for node in graph.node if node.op_type == "Gather" and "token_embedding" in node.input[0])
    (reader,) = (node for node in graph.node if table.output[0] in node.input)
    assert reader.op_type == "Cast"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w4", "int8"])
def test_low_memory_and_cache_change_no_number(bundles: dict[str, Path], precision: str, tmp_path: Path) -> None:
    runtime = get_runtime("onnxruntime")
    inputs = some_inputs("unet", 2, 16, 16)
    plain, small, first, second = (
        runtime.load(bundles[precision], "unet", LoadOptions(threads=1, low_memory=low_memory, cache=cache))(**inputs)
        for low_memory, cache in ((False, None), (True, None), (False, tmp_path), (False, tmp_path))
    )
    np.testing.assert_array_equal(first, plain)
    np.testing.assert_array_equal(second, plain)
    assert len(list(tmp_path.iterdir())) == 1
    # int8 turns a last-bit difference of the float layers into a whole step.
    np.testing.assert_allclose(small, plain, atol=0.1 if precision == "int8" else 1e-3)


def test_int8_on_processors_whose_products_overflow(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """There weights become uint8; every other component and precision stays as it is (w8 would not run so)."""
    from kdc_edge.runtimes import onnxruntime as module

    runtime, inputs = get_runtime("onnxruntime"), some_inputs("unet", 2, 16, 16)
    expected = runtime.load(bundles["int8"], "unet", LoadOptions(threads=1))(**inputs)
    overflows = module.this_processor().lacks_vnni
    asked: list[str] = []
    real = ort.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        ort.SessionOptions, "add_session_config_entry", lambda o, key, value: (asked.append(key), real(o, key, value))
    )
    for features, changed in ((("AVX2",), True), (("AVX2", "VNNI"), False), (("NEON",), False), (None, False)):
        processor = Processor("a processor", "x86_64", features, None)
        monkeypatch.setattr(module, "this_processor", lambda processor=processor: processor)
        asked.clear()
        found = runtime.load(bundles["int8"], "unet", LoadOptions(threads=1))(**inputs)
        assert ("session.x64quantprecision" in asked) is changed
        if changed or not overflows:  # which a processor that does is not spared otherwise
            np.testing.assert_allclose(found, expected, atol=0.1)
    monkeypatch.setattr(module, "this_processor", lambda: Processor("old", "x86_64", ("AVX2",), None))
    asked.clear()
    open_pipeline(bundles["int8"], threads=1).generate(Request("a red flower", steps=1))
    assert asked.count("session.x64quantprecision") == 1


def test_the_cache_is_used(bundles: dict[str, Path], tmp_path: Path) -> None:
    runtime = get_runtime("onnxruntime")
    inputs = some_inputs("unet", 1, 16, 16)
    runtime.load(bundles["fp16"], "unet", LoadOptions(cache=tmp_path))
    (kept,) = tmp_path.iterdir()
    made = onnx.load(kept / "model.onnx")
    assert Counter(node.op_type for node in made.graph.node)["Cast"] < 5  # the stored halves are widened in it
    kept.joinpath("model.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="refused by onnxruntime"):
        runtime.load(bundles["fp16"], "unet", LoadOptions(cache=tmp_path))
    shutil.rmtree(kept)
    assert runtime.load(bundles["fp16"], "unet", LoadOptions(cache=tmp_path))(**inputs).shape == (1, 4, 16, 16)


def test_a_weight_file_that_is_missing_or_shorter(
    checkpoint: Path, bundle_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kdc_edge.export.onnx.export.trace", lambda part, _sizes=None: ir.load(bundle_fp32 / part.name / "model.onnx")
    )
    monkeypatch.setattr("kdc_edge.export.onnx.export.EXTERNAL_DATA_BYTES", 1000)
    root = export_checkpoint(ExportRequest(checkpoint, tmp_path / "out", "onnx", "fp16", verify=False)).root
    data = root / "unet" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx_data.*copy or export it again"):
        open_pipeline(root)
    data.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx_data.*copy or export it again"):
        open_pipeline(root)


def test_an_opset_too_new(bundle_fp32: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(bundle_fp32, tmp_path / "bundle"))
    model = onnx.load(unet_model(root))
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = 99
    onnx.save(model, unet_model(root))
    content = json.loads((root / MANIFEST).read_text("utf-8"))
    content["files"] = {n: f.model_dump() for n, f in list_files(root).items() if n != MANIFEST}
    (root / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"too new for onnxruntime .*upgrade onnxruntime$") as said:
        get_runtime("onnxruntime").load(root, "unet")
    assert "\n" not in str(said.value)


def test_providers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdc_edge.runtimes import onnxruntime as module

    with pytest.raises(InputError, match="has no device 'cuda' here: choose from CPU; cuda needs onnxruntime-gpu"):
        get_runtime("onnxruntime").load(bundle, "unet", LoadOptions(device="cuda"))
    # A build with CUDA whose driver is not there: onnxruntime itself would go on, on the processor.
    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(module._ort, "get_available_providers", lambda: there)
    real = ort.InferenceSession

    def session(path: str, options: ort.SessionOptions, providers: list[object]) -> ort.InferenceSession:
        assert next(name for name, _ in providers) == "CUDAExecutionProvider"  # type: ignore[misc]
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(module._ort, "InferenceSession", session)
    with pytest.raises(InputError, match="cannot start CUDA here, a driver or library of it is missing"):
        get_runtime("onnxruntime").load(bundle, "unet", LoadOptions(device="cuda"))


def test_sizes_fixed_while_tracing(checkpoint: Path) -> None:
    model = trace(
        load_component(checkpoint, "vae_decoder"),
        {"batch_size": 1, "latent_height": 8, "latent_width": 16, "height": 32, "width": 64},
    )
    assert list(model.graph.inputs[0].shape or ()) == [1, 4, 8, 16]
    assert list(model.graph.outputs[0].shape or ()) == [1, 3, 32, 64]
