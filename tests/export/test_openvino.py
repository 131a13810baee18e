"""OpenVINO bundles: whole, proved in every precision, readable by others; and what their runtime refuses."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import psutil
import pytest

from kdc_edge import Pipeline
from kdc_edge.bundle import Bundle
from kdc_edge.errors import BundleError, InputError, KdcError
from kdc_edge.export.calibration import calibrate, one_by_one
from kdc_edge.export.targets import ExportRequest, export_checkpoint
from kdc_edge.hardware import Processor
from kdc_edge.manifest import list_files
from kdc_edge.prompts import own_prompts, read_prompts
from kdc_edge.request import Request
from kdc_edge.runtimes import LoadOptions, get_runtime, open_pipeline
from kdc_edge.runtimes.openvino import MappedWeights, OpenVinoComponent
from tests.export.editing import closeness_db
from tests.runtimes.test_base import some_inputs

NAMES = {
    "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
    "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
    "vae_decoder": (["latent_sample"], ["sample"]),
}


@pytest.fixture(scope="module")
def fp32(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "openvino-fp32"
    request = ExportRequest(checkpoint, out, "openvino", "fp32", command="a test", extra=["vae_encoder"])
    return export_checkpoint(request).root


@pytest.fixture(scope="module")
def bundles(fp32: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every precision; the graphs are converted once."""
    folder = tmp_path_factory.mktemp("bundles")
    prompts = ["a red flower", "a blue fish"]
    with pytest.MonkeyPatch.context() as patch:
        convert = "kdc_edge.export.openvino.convert"
        patch.setattr(convert, lambda part: ov.Core().read_model(fp32 / part.name / "openvino_model.xml"))
        made = {"fp32": fp32}
        for precision in ("fp16", "w8", "w4"):
            made[precision] = export_checkpoint(
                ExportRequest(checkpoint, folder / precision, "openvino", precision, extra=["vae_encoder"])
            ).root
        request = ExportRequest(
            checkpoint, folder / "int8", "openvino", "int8", calibration_prompts=prompts, calibration_samples=6,
            extra=["vae_encoder"],
        )  # fmt: skip
        made["int8"] = export_checkpoint(request).root
    return made


def operations(bundle: Path, component: str = "unet") -> Counter[str]:
    model = ov.Core().read_model(bundle / component / "openvino_model.xml")
    return Counter(node.get_type_name() for node in model.get_ops())


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_images_are_changed_as_diffusers_does(fp32: Path, checkpoint: Path, masked: bool) -> None:
    pipeline = open_pipeline(fp32, threads=1)
    assert closeness_db(pipeline, checkpoint, "dpm++2m", masked=masked, steps=2, strength=1.0 if masked else 0.5) > 35
    encoder = ov.Core().read_model(fp32 / "vae_encoder" / "openvino_model.xml")
    assert [port.get_names() for port in (*encoder.inputs, *encoder.outputs)] == [{"sample"}, {"latent_parameters"}]


def test_the_folder_is_optimums(fp32: Path) -> None:
    index = json.loads((fp32 / "model_index.json").read_text("utf-8"))
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    for name, (inputs, outputs) in NAMES.items():
        assert (fp32 / name / "config.json").is_file()
        model = ov.Core().read_model(fp32 / name / "openvino_model.xml")
        assert [port.get_names() for port in model.inputs] == [{n} for n in inputs]
        assert [port.get_names() for port in model.outputs] == [{n} for n in outputs]
    timestep = ov.Core().read_model(fp32 / "unet" / "openvino_model.xml").input("timestep")
    assert (timestep.element_type, timestep.partial_shape) == (ov.Type.i64, ov.PartialShape([1]))
    for name in ("openvino_tokenizer", "openvino_detokenizer"):
        assert (fp32 / "tokenizer" / f"{name}.xml").is_file()
    assert Bundle.open(fp32).verify() > 0


def test_the_tokenizer_is_ours(fp32: Path) -> None:
    import openvino_tokenizers  # noqa: F401  # it registers the operations

    prompts = ["a red flower with five petals", "", "an   orange FISH, x!"]
    compiled = ov.Core().compile_model(fp32 / "tokenizer" / "openvino_tokenizer.xml", "CPU")
    pipeline = open_pipeline(fp32)
    for prompt in prompts:
        ids = compiled([prompt])["input_ids"][0]
        np.testing.assert_array_equal(ids, pipeline.tokenizer.encode([prompt])[0][: len(ids)])


def test_every_precision_is_proved_and_smaller(bundles: dict[str, Path]) -> None:
    sizes = {}
    for precision, root in bundles.items():
        bundle = Bundle.open(root)
        assert bundle.manifest.parity is not None
        checks = [c.what for c in bundle.manifest.parity.checks if "in 32 bits" not in c.what]
        assert checks == ["text_encoder", "unet", "vae_decoder", "image", "vae_encoder"]
        assert all(c.passed for c in bundle.manifest.parity.checks)
        sizes[precision] = (root / "unet" / "openvino_model.bin").stat().st_size
    assert sizes["fp16"] < 0.55 * sizes["fp32"]
    assert sizes["w4"] < sizes["w8"] < 0.6 * sizes["fp16"]
    assert sizes["int8"] < 0.6 * sizes["fp16"]


def test_what_is_computed_in_integers(bundles: dict[str, Path]) -> None:
    quantized = {precision: operations(root)["FakeQuantize"] for precision, root in bundles.items()}
    assert quantized["fp32"] == quantized["fp16"] == quantized["w8"] == quantized["w4"] == 0
    assert quantized["int8"] > 0
    for component in ("text_encoder", "vae_decoder", "vae_encoder"):
        assert operations(bundles["int8"], component)["FakeQuantize"] == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("precision", ["w8", "w4", "int8"])
def test_the_encoder_is_kept_in_8_bits_and_changes_images(
    bundles: dict[str, Path], checkpoint: Path, precision: str
) -> None:
    size = (bundles[precision] / "vae_encoder" / "openvino_model.bin").stat().st_size
    assert size < 0.35 * (bundles["fp32"] / "vae_encoder" / "openvino_model.bin").stat().st_size
    pipeline = Pipeline.open(bundles[precision], threads=1)
    assert closeness_db(pipeline, checkpoint, "dpm++2m", masked=False, steps=2) > 25


@pytest.mark.full
def test_the_hybrid_computes_less_in_integers(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        checkpoint, tmp_path / "hybrid", "openvino", "int8-hybrid", calibration_prompts=["a red flower"],
        calibration_samples=2,
    )  # fmt: skip
    hybrid = export_checkpoint(request)
    assert hybrid.manifest.parity is not None
    assert all(c.passed for c in hybrid.manifest.parity.checks)
    assert 0 < operations(hybrid.root)["FakeQuantize"] < operations(bundles["int8"])["FakeQuantize"]


def test_a_batch_is_calibrated_on_one_by_one() -> None:
    batch = some_inputs("unet", 2, 8, 8)
    first, second = one_by_one([batch])
    np.testing.assert_array_equal(np.concatenate([first["sample"], second["sample"]]), batch["sample"])
    assert second["encoder_hidden_states"].shape == (1, 77, 128)
    assert first["timestep"] is second["timestep"] is batch["timestep"]


def test_the_calibration_is_on_record(bundles: dict[str, Path]) -> None:
    info = Bundle.open(bundles["int8"]).manifest.calibration
    assert info is not None
    assert (info.prompts, info.samples, info.seed) == (2, 6, 0)
    assert Bundle.open(bundles["w8"]).manifest.calibration is None


def test_calibration_is_seeded_and_of_both_halves(checkpoint: Path) -> None:
    prompts = ["a red flower", "a blue fish", "a pink butterfly"]
    one, again, other = (calibrate(checkpoint, prompts, 6, seed=seed) for seed in (1, 1, 2))
    assert len(one.inputs) == one.info.samples == 6
    assert {call["sample"].shape for call in one.inputs} == {(2, 4, 16, 16)}
    timesteps = [int(call["timestep"][0]) for call in one.inputs]
    assert len(set(timesteps)) > 2
    for call, same in zip(one.inputs, again.inputs, strict=True):
        for name in call:
            np.testing.assert_array_equal(call[name], same[name])
    assert timesteps != [int(call["timestep"][0]) for call in other.inputs]
    halves = one.inputs[0]["encoder_hidden_states"]
    assert np.abs(halves[0] - halves[1]).max() > 0


def test_calibration_of_a_scheduler_that_is_not_dpm_solvers(own_checkpoint: Path) -> None:
    """kdc-edge has no sampler for these noise levels, DPM-Solver++ neither: generate takes DDIM."""
    path = own_checkpoint / "scheduler" / "scheduler_config.json"
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "use_exponential_sigmas": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    found = calibrate(own_checkpoint, ["a red flower"], 3)
    assert (found.info.sampler, len(found.inputs)) == ("ddim", 3)


def test_calibration_visits_every_call_of_a_sampler(own_checkpoint: Path) -> None:
    """Heun's are two a step but the last."""
    (own_checkpoint / "sampling.json").write_text('{"scheduler": "heun", "steps": 4, "guidance": 1}')
    found = calibrate(own_checkpoint, ["a red flower"], 7, samples_an_image=7)
    assert len({call["sample"].tobytes() for call in found.inputs}) == 7


def test_prompts_to_calibrate_on(own_checkpoint: Path, tmp_path: Path) -> None:
    assert own_prompts(own_checkpoint)
    (own_checkpoint / "prompts.txt").write_text("one\n\n two \n")
    assert own_prompts(own_checkpoint) == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="--calibration-samples 0"):
        calibrate(own_checkpoint, ["a"], 0)


@pytest.mark.parametrize("component", NAMES)
def test_openvino_equals_torch_at_any_size(checkpoint: Path, fp32: Path, component: str) -> None:
    torch = get_runtime("torch").load(checkpoint, component)
    openvino = get_runtime("openvino").load(fp32, component, LoadOptions(device="cpu", threads=1))
    for batch, height, width in ((1, 16, 16), (2, 8, 24)):
        inputs = some_inputs(component, batch, height, width)
        found = openvino(**inputs)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, torch(**inputs), atol=2e-4)


def test_the_numbers_that_are_really_computed_with(bundles: dict[str, Path]) -> None:
    found = {}
    for precision, exact in (("fp32", False), ("fp16", True), ("w8", True), ("int8", False)):
        options = LoadOptions(device="CPU", threads=1, exact=exact)
        unet: Any = get_runtime("openvino").load(bundles[precision], "unet", options)
        unet.prepare({name: value.shape for name, value in some_inputs("unet", 1, 8, 8).items()})
        choice = unet.explain()
        assert choice.provider == "CPU"
        found[precision] = choice.compute_dtype.split(", ")
    assert found["fp32"] == found["fp16"] == found["w8"] == ["fp32"]
    assert found["int8"][0] == "int8"


def test_threads_get_their_own_answers(fp32: Path) -> None:
    unet = get_runtime("openvino").load(fp32, "unet", LoadOptions(threads=1))
    inputs = [some_inputs("unet", 1, 8, 8) | {"timestep": np.array([t])} for t in (1, 500, 900)]
    expected = [unet(**call) for call in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: unet(**inputs[i % 3]), range(24)))
    for i, answer in enumerate(found):
        np.testing.assert_array_equal(answer, expected[i % 3])


def test_an_answer_is_not_overwritten_by_the_next(fp32: Path) -> None:
    unet = get_runtime("openvino").load(fp32, "unet", LoadOptions(threads=1))
    inputs = some_inputs("unet", 1, 8, 8)
    first = unet(**inputs)
    kept = first.copy()
    unet(**inputs | {"sample": 3 * inputs["sample"]})
    np.testing.assert_array_equal(first, kept)


def test_devices(fp32: Path) -> None:
    runtime = get_runtime("openvino")
    assert [runtime.devices()[0].name, runtime.devices()[-1].name] == ["CPU", "AUTO"]
    for device in ("NPU", "abacus", "unet=NPU,CPU"):
        with pytest.raises(InputError, match=r"openvino has no device '(NPU|abacus)' here: choose from CPU"):
            open_pipeline(fp32, device=device)
    request = Request("a red flower", steps=2, seed=1)
    one, mixed = (open_pipeline(fp32, device=d, threads=1).generate(request) for d in ("CPU", "unet=AUTO,CPU"))
    assert np.abs(one.astype(int) - mixed).max() <= 1


def damaged(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def refresh(bundle: Path) -> None:
    """Let the manifest list the files as they are now, so that the engine sees them."""
    manifest = json.loads((bundle / "kdc-edge.json").read_text("utf-8"))
    manifest["files"] = {name: info.model_dump() for name, info in list_files(bundle).items()}
    (bundle / "kdc-edge.json").write_text(json.dumps(manifest))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> bool:
    return "\n" not in str(error.value)


def test_damaged_files_are_refused_in_one_line(fp32: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = get_runtime("openvino")
    bundle = damaged(fp32, tmp_path)
    weights = bundle / "unet" / "openvino_model.bin"
    weights.rename(bundle / "weights.bin")
    with pytest.raises(BundleError, match=r"openvino_model\.bin is missing") as caught:
        runtime.load(bundle, "unet")
    assert one_line(caught)
    manifest = json.loads((bundle / "kdc-edge.json").read_text("utf-8"))
    del manifest["files"]["unet/openvino_model.bin"]
    manifest["components"]["unet"]["files"].remove("unet/openvino_model.bin")
    (bundle / "kdc-edge.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"openvino_model\.bin is missing") as caught:
        runtime.load(bundle, "unet")
    assert one_line(caught)

    (bundle / "weights.bin").rename(weights)
    graph = bundle / "unet" / "openvino_model.xml"
    graph.write_bytes(graph.read_bytes()[:5000])
    manifest["components"]["unet"]["files"].append("unet/openvino_model.bin")
    (bundle / "kdc-edge.json").write_text(json.dumps(manifest))
    refresh(bundle)
    with pytest.raises(BundleError, match=r"openvino_model\.xml is refused by openvino") as caught:
        runtime.load(bundle, "unet")
    assert one_line(caught)
    assert capfd.readouterr() == ("", "")


def test_inputs_that_do_not_fit(fp32: Path) -> None:
    unet: Any = get_runtime("openvino").load(fp32, "unet", LoadOptions(threads=1))
    inputs = some_inputs("unet", 1, 8, 8)
    with pytest.raises(BundleError, match="takes sample, timestep, encoder_hidden_states where sample are given"):
        unet(sample=inputs["sample"])
    with pytest.raises(InputError, match="was not made for this size") as caught:
        unet(**inputs | {"encoder_hidden_states": np.zeros((1, 77, 5), np.float32)})
    assert one_line(caught)
    shapes = {name: value.shape for name, value in inputs.items()}
    with pytest.raises(BundleError, match=r"takes sample of .* leaves open what must be fixed") as caught:
        unet.prepare(shapes | {"sample": (1, 4, -1, 8)})
    assert one_line(caught)


def test_too_little_memory_is_said_before_the_work(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = free = 10 * 2**20

    monkeypatch.setattr(psutil, "virtual_memory", Free)
    monkeypatch.setattr(psutil, "swap_memory", Free)
    with pytest.raises(KdcError, match=r"too little memory for .*20 MiB are free; close other programs") as caught:
        open_pipeline(fp32).generate(Request("a red flower", steps=1))
    assert one_line(caught)


def test_without_8_bit_dot_products_attention_is_not_rounded(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = some_inputs("unet", 2, 16, 16)
    load = get_runtime("openvino").load
    exact = load(bundles["fp32"], "unet", LoadOptions(threads=1))(**inputs)
    roundings, errors = [], []
    for features in (("AVX2", "VNNI"), ("AVX2",)):
        processor = Processor("a processor", "x86_64", features, None)
        monkeypatch.setattr("kdc_edge.runtimes.openvino.this_processor", lambda processor=processor: processor)
        unet = load(bundles["int8"], "unet", LoadOptions(threads=1))
        errors.append(float(np.square(unet(**inputs) - exact).mean()))
        assert isinstance(unet, OpenVinoComponent)
        kinds = Counter(node.get_type_name() for node in unet._model.get_ops())
        roundings.append(kinds["FakeQuantize"])
    assert roundings[0] - roundings[1] == 2 * kinds["ScaledDotProductAttention"] > 0
    # The other layers' rounding is most of the error: which is smaller depends on the processor's kernels.
    assert errors[0] != errors[1]
    assert 0 < errors[1] < 1.05 * errors[0]


def test_the_mapped_weights_are_given_back(fp32: Path) -> None:
    """After compiling, next to nothing of the file is resident: the engine has its own copy."""
    weights = (fp32 / "unet" / "openvino_model.bin").resolve()
    unet: Any = get_runtime("openvino").load(fp32, "unet", LoadOptions(threads=1))
    unet.prepare({"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 77, 128)})
    resident = [m.rss for m in psutil.Process().memory_maps() if m.path == str(weights)]
    assert resident
    assert sum(resident) < 0.2 * weights.stat().st_size


def test_low_memory_gives_them_back_in_every_call(fp32: Path) -> None:
    """Same numbers, also in other shapes, for which the file is read again."""
    weights = str((fp32 / "unet" / "openvino_model.bin").resolve())
    rng = np.random.default_rng(0)
    calls = [
        {
            "sample": rng.standard_normal((batch, 4, 8, 8), np.float32),
            "timestep": np.array([500]),
            "encoder_hidden_states": rng.standard_normal((batch, 77, 128), np.float32),
        }
        for batch in (1, 2, 1)
    ]
    load = get_runtime("openvino").load
    usual = load(fp32, "unet", LoadOptions(threads=1))
    expected = [usual(**call) for call in calls]
    del usual  # with its mapping
    frugal = load(fp32, "unet", LoadOptions(threads=1, low_memory=True))
    for call, numbers in zip(calls, expected, strict=True):
        assert np.array_equal(frugal(**call), numbers)
        mapped = [m.rss for m in psutil.Process().memory_maps(grouped=False) if m.path == weights]
        assert mapped
        assert not any(mapped)


def test_one_model_leaves_the_pages_of_another(fp32: Path) -> None:
    """What another model has mapped may be unmapped at any time, and the addresses taken by other memory."""
    path = fp32 / "unet" / "openvino_model.xml"
    weights = path.with_suffix(".bin").resolve()
    first, second = (ov.Core().read_model(path) for _ in range(2))
    mapped = MappedWeights(first, weights)
    del first  # its mapping stays as long as `mapped`
    assert all(node.data.tobytes() for node in second.get_ops() if node.get_type_name() == "Constant")  # reads them
    with mapped.trimmed():
        pass
    trimmed, other = sorted(m.rss for m in psutil.Process().memory_maps(grouped=False) if m.path == str(weights))
    assert trimmed == 0
    assert other > 0.9 * weights.stat().st_size


def test_the_cache_is_opt_in(fp32: Path, tmp_path: Path) -> None:
    request = Request("a red flower", steps=1)
    usual = open_pipeline(fp32, threads=1).generate(request)
    cached = [open_pipeline(fp32, threads=1, cache=tmp_path / "cache").generate(request) for _ in range(2)]
    kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(kept) == 3
    assert sum(p.stat().st_size for p in kept) < 0.2 * Bundle.open(fp32).size_bytes  # the weights are not kept twice
    for image in cached:
        assert np.abs(image.astype(int) - usual).max() <= 1
