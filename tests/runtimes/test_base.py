"""Engines: the same contract, the same numbers, and one line for what they refuse."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from kdc_edge.bundle import Bundle
from kdc_edge.components import Execution, SupportsExplain
from kdc_edge.errors import BundleError, CheckpointError, InputError, MissingPackageError
from kdc_edge.manifest import MANIFEST, list_files
from kdc_edge.request import Request
from kdc_edge.runtimes import LoadOptions, get_runtime, open_pipeline
from kdc_edge.runtimes.base import COMPONENTS

Floats = NDArray[np.float32]


def some_inputs(component: str, batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    if component == "text_encoder":
        return {"input_ids": random.integers(0, 600, (batch, 77))}
    sample = random.standard_normal((batch, 4, height, width), np.float32)
    if component == "vae_decoder":
        return {"latent_sample": sample}
    hidden = random.standard_normal((batch, 77, 128), np.float32)
    return {"sample": sample, "timestep": np.array([7]), "encoder_hidden_states": hidden}


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (2, 8, 24), (3, 24, 16)])
def test_onnxruntime_equals_torch_at_any_size(
    checkpoint: Path, bundle_fp32: Path, component: str, batch: int, height: int, width: int
) -> None:
    inputs = some_inputs(component, batch, height, width)
    expected = get_runtime("torch").load(checkpoint, component)(**inputs)
    found = get_runtime("onnxruntime").load(bundle_fp32, component, LoadOptions(device="cpu", threads=1))(**inputs)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_inputs_are_cast(bundle: Path) -> None:
    runtime = get_runtime("onnxruntime")
    unet = runtime.load(bundle, "unet")
    inputs = some_inputs("unet", 1, 8, 8)
    expected = unet(**inputs)
    loose = {name: value.astype(np.float64) for name, value in inputs.items()}
    np.testing.assert_allclose(unet(**loose), expected, atol=1e-6)


def test_torch_makes_the_images_of_diffusers(checkpoint: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    reference = StableDiffusionPipeline.from_pretrained(checkpoint)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        "a red flower", num_inference_steps=4, guidance_scale=3.0, height=64, width=96,
        generator=torch.Generator().manual_seed(5), output_type="np",
    ).images[0]  # fmt: skip
    request = Request("a red flower", steps=4, guidance=3.0, seed=5, sampler="ddim", height=64, width=96)
    pixels = open_pipeline(checkpoint).generate(request)
    assert pixels.shape == (64, 96, 3)
    assert np.abs(pixels - expected * 255.0).max() <= 1.5


def test_a_bundle_makes_the_same_image_without_torch(bundle: Path, checkpoint: Path) -> None:
    request = Request("a red flower", steps=2, guidance=1.0, seed=3)
    program = f"""if True:
        import sys
        from pathlib import Path
        from kdc_edge.runtimes import open_pipeline
        from kdc_edge.request import Request
        pipeline = open_pipeline(Path({str(bundle)!r}), threads=1)
        pixels = pipeline.generate({request!r})
        assert not {{"torch", "diffusers", "transformers"}} & sys.modules.keys()
        sys.stdout.buffer.write(pixels.tobytes())
    """
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert result.stderr == b""
    found = np.frombuffer(result.stdout, np.uint8).reshape(64, 64, 3).astype(int)
    assert np.abs(found - open_pipeline(checkpoint).generate(request)).max() <= 2


def test_devices(bundle: Path, checkpoint: Path) -> None:
    for name, folder in (("onnxruntime", bundle), ("torch", checkpoint)):
        runtime = get_runtime(name)
        assert runtime.name == name
        assert runtime.version
        assert runtime.devices()[0].name == "CPU"
        with pytest.raises(InputError, match="has no device 'abacus' here: choose from CPU"):
            runtime.load(folder, "unet", LoadOptions(device="abacus"))


def test_what_the_engine_chose_is_told(bundle: Path, checkpoint: Path) -> None:
    found = {}
    for name, folder in (("onnxruntime", bundle), ("torch", checkpoint)):
        unet = get_runtime(name).load(folder, "unet", LoadOptions(device="CPU"))
        assert isinstance(unet, SupportsExplain)
        found[name] = unet.explain()
    assert found == {"onnxruntime": Execution("CPUExecutionProvider", None), "torch": Execution("CPU", "fp32")}


def test_what_cannot_be_opened(bundle: Path, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="engine 'abacus' is unknown"):
        get_runtime("abacus")
    with pytest.raises(InputError, match="torch cannot run onnx-fp16: choose from onnxruntime"):
        open_pipeline(bundle, engine="torch")
    with pytest.raises(InputError, match="which only torch runs"):
        open_pipeline(checkpoint, engine="onnxruntime")
    with pytest.raises(InputError, match="0 threads are too few"):
        open_pipeline(bundle, threads=0)


def test_a_missing_engine_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "kdc_edge.runtimes.onnxruntime", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install 'kdc-edge\[onnx\]'"):
        get_runtime("onnxruntime")
    monkeypatch.undo()
    importlib.import_module("kdc_edge.runtimes.onnxruntime")


def test_a_damaged_graph_is_refused_in_one_line(own_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = own_bundle / "unet" / "model.onnx"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"unet/model\.onnx has changed since it was exported"):
        get_runtime("onnxruntime").load(own_bundle, "unet")
    with pytest.raises(BundleError, match=r"unet/model\.onnx is refused by onnxruntime") as caught:
        get_runtime("onnxruntime").load(own_bundle, "unet", LoadOptions(check=False))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_weights_out_of_the_folder_are_refused(own_bundle: Path) -> None:
    path = own_bundle / "text_encoder" / "model.onnx"
    (own_bundle.parent / "secret.bin").write_bytes(bytes(10_000_000))
    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    onnx.external_data_helper.set_external_data(weights, "../../secret.bin", 0, len(weights.raw_data))
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((own_bundle / MANIFEST).read_text("utf-8"))
    manifest["files"] = {name: info.model_dump() for name, info in list_files(own_bundle).items()}
    (own_bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="is refused by onnxruntime"):
        get_runtime("onnxruntime").load(own_bundle, "text_encoder")


def test_wrong_inputs_are_refused(bundle: Path) -> None:
    unet = get_runtime("onnxruntime").load(bundle, "unet")
    inputs = some_inputs("unet", 1, 8, 8)
    with pytest.raises(BundleError, match="takes sample, timestep, encoder_hidden_states where sample"):
        unet(sample=inputs["sample"])
    with pytest.raises(BundleError, match="cannot compute this"):
        unet(**inputs | {"encoder_hidden_states": np.zeros((1, 77, 5), np.float32)})


def test_checkpoints_that_torch_cannot_read(own_checkpoint: Path, checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    runtime = get_runtime("torch")
    with pytest.raises(InputError, match="no component 'image_encoder'"):
        runtime.load(checkpoint, "image_encoder")
    weights = own_checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "conv_in.weight"}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of UNet2DConditionModel, such as conv_in\.weight"):
        runtime.load(own_checkpoint, "unet")
    weights.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        runtime.load(own_checkpoint, "unet")
    shutil.rmtree(own_checkpoint / "unet")
    with pytest.raises(CheckpointError, match="incomplete"):
        runtime.load(own_checkpoint, "unet")


def test_the_manifest_describes_the_graph(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for name in COMPONENTS:
        info, path = opened.component(name)
        graph = onnx.load(path).graph
        for listed, values in ((info.inputs, graph.input), (info.outputs, graph.output)):
            found = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
            assert found == {tensor: info.shape for tensor, info in listed.items()}


def test_threads_of_torch_hold_wherever_it_computes() -> None:
    """torch has a number for each thread of a program: a worker's would not be that of the one who opened it."""
    import torch

    from kdc_edge.runtimes.torch import TorchComponent

    counted: list[int] = []

    class Network(torch.nn.Linear):
        def decode(self, latents: torch.Tensor, return_dict: bool) -> list[torch.Tensor]:
            counted.append(torch.get_num_threads() + int(return_dict))
            return [latents]

    decoder = TorchComponent("vae_decoder", Network(1, 1), threads=1)

    def call() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        decoder(latent_sample=np.zeros((1, 1), np.float32))
        torch.set_num_threads(before)

    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert counted == [1, 1]
