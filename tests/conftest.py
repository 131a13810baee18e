"""Fixtures that several rooms' tests stand on: a complete checkpoint in small, and its bundles.

The weights are random and seeded. Tracing for ONNX takes most of an export's time, so a network of one shape is traced
once in a session (`traced_once`), whichever worker or test comes to it first.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import locale
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.report.browser import CHROMIUM
from tests.traced_module import SMALL_STAGES

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from kdc_edge.export.components import ExportComponent

SHORT_ROOMS = ("core", "report", "runtimes", "serve")
TOKENIZER = Path(__file__).parent.parent / "train" / "assets" / "garden-teacher" / "tokenizer"


def pytest_report_header() -> list[str]:
    return [] if CHROMIUM else ["NOT TESTED: pages in a browser, for there is no Chromium (apt-get install chromium)"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests in a browser run wherever there is one, and the order keeps the workers busy.

    Training comes first: at the start both would wait for one export of the shared bundle. Short files come last.
    """
    rooms = {"train": 0} | dict.fromkeys(SHORT_ROOMS, 2)
    items.sort(key=lambda item: rooms.get(item.path.parent.name, 1))
    if CHROMIUM is None:
        left_out = [item for item in items if item.get_closest_marker("browser")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def make_checkpoint(folder: Path) -> Path:
    """A diffusers folder in the garden's sizes with random weights; its U-Net has two of the student's stages."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    from kdc_edge.presets import find_preset
    from kdc_edge.train.garden.teacher import make_scheduler, make_text_encoder, make_vae

    disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**{**find_preset("garden-student").unet, **SMALL_STAGES}),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)  # transformers 5 saves no vocab.json
    return folder


@pytest.fixture(autouse=True)
def _locale() -> None:
    """The environment's locale: something in a run of all tests resets the C library's, which text is decoded by."""
    locale.setlocale(locale.LC_ALL, "")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder stays as it was, in child processes too; one for all workers of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDC_EDGE_CACHE", str(_shared(tmp_path_factory) / "cache"))
        yield


@pytest.fixture(scope="module", autouse=True)
def _skip_old_objects() -> None:
    """Leave the objects from before a file's tests out of garbage collection: the libraries have half a million."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "garden")


@pytest.fixture(scope="session")
def traced_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the graphs of `traced_once` lie; of all workers."""
    folder = _shared(tmp_path_factory) / "traced"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def traced_once(traced_folder: Path) -> Iterator[None]:
    """From here on, an export in this process takes the graph of a network of its shape, with its own weights in it."""
    from kdc_edge.export.onnx import export as onnx

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "trace", cached_trace(traced_folder))
        yield


def cached_trace(folder: Path) -> Callable[..., ir.Model]:
    """What takes the place of the export's `trace`: graphs of networks of a shape that was traced before, in `folder`.

    A graph is traced with weights that are all different, so that each of its tensors is recognised by its values.
    """
    import onnx_ir as ir
    import torch
    from filelock import FileLock

    from kdc_edge.export.onnx import export as onnx

    original = onnx.trace

    def trace(part: ExportComponent, sizes: Mapping[str, int] | None = None) -> ir.Model:
        kept = folder / f"{_shape_hash(part, sizes)}.onnx"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                module = copy.deepcopy(part.module)
                generator = torch.Generator().manual_seed(0)
                with torch.no_grad():
                    for tensor in module.state_dict().values():
                        if tensor.is_floating_point():
                            tensor.normal_(generator=generator)
                model = original(dataclasses.replace(part, module=module), sizes)
                for value in model.graph.initializers.values():
                    value.metadata_props["weight"] = _origin(value.const_value.numpy(), module.state_dict())
                new = kept.with_suffix(".new")  # whoever dies here
                ir.save(ir.external_data.load_to_model(model), new)
                new.replace(kept)
        model, weights = ir.load(kept), part.module.state_dict()
        for value in model.graph.initializers.values():
            if name := value.metadata_props.pop("weight"):
                array = weights[name.removesuffix(".T")].numpy()
                array = array.T.copy() if name.endswith(".T") else array
                value.const_value = ir.tensor(array.reshape(value.const_value.shape.numpy()), name=value.name)
        return model

    return trace


def _origin(array: np.ndarray, weights: Mapping[str, torch.Tensor]) -> str:
    """The weight that a graph's tensor is, with ".T" where it is transposed; "" for a constant of the tracer."""
    for name, weight in weights.items():
        if weight.numel() == array.size and weight.is_floating_point():
            if np.array_equal(weight.numpy().ravel(), array.ravel()):
                return name
            if weight.ndim == 2 and np.array_equal(weight.numpy().T, array):
                return f"{name}.T"
    return ""


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all workers of this session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def _shape_hash(part: ExportComponent, sizes: Mapping[str, int] | None) -> str:
    """Of all that a trace depends on but the weights: layers, how their attention is computed, buffers, fixed sizes."""
    processors = [type(m.processor).__name__ for m in part.module.modules() if hasattr(m, "processor")]
    found = hashlib.sha256(repr((part.name, part.module, processors, sizes)).encode())
    for name, tensor in part.module.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(b"" if tensor.is_floating_point() else tensor.numpy().tobytes())
    return found.hexdigest()


def shared_bundle(factory: pytest.TempPathFactory, checkpoint: Path, target: str, precision: str) -> Path:
    """A bundle of all workers: the first that asks exports it. Not to be written to."""
    from filelock import FileLock

    from kdc_edge.export.targets import ExportRequest, export_checkpoint

    out = _shared(factory) / f"{target}-{precision}"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            export_checkpoint(ExportRequest(checkpoint, out, target, precision, command="a test"))
    return out


@pytest.fixture(scope="session")
def bundle_fp32(checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    return shared_bundle(tmp_path_factory, checkpoint, "onnx", "fp32")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """fp16, the default precision."""
    return shared_bundle(tmp_path_factory, checkpoint, "onnx", "fp16")


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def coreml_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp16, for Core ML, with Resources/; of all workers."""
    from filelock import FileLock

    from kdc_edge.export.targets import CoreMLOptions, ExportRequest, export_checkpoint

    out = _shared(tmp_path_factory) / "coreml-fp16"
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            export_checkpoint(ExportRequest(checkpoint, out, "coreml", "fp16"), CoreMLOptions(swift=True))
    return out
