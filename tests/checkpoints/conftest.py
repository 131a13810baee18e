"""Small models of both generations, each with the single file of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.original import make_pipeline, original_state, save


@dataclass(frozen=True)
class Model:
    """diffusers' pipeline, and its weights as a single file."""

    pipeline: Any
    file: Path


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Assembled folders go to a cache of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDC_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _make(folder: Path, version: int, prediction: str) -> Model:
    pipeline = make_pipeline(version, prediction)
    pipeline.set_progress_bar_config(disable=True)
    return Model(pipeline, save(original_state(pipeline, ema=version == 1), folder / f"sd{version}.safetensors"))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _make(tmp_path_factory.mktemp("sd1"), 1, "epsilon")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _make(tmp_path_factory.mktemp("sd2"), 2, "v_prediction")
