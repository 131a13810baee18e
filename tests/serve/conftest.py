"""A worker of the tiny bundle, and a client of its server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from kdc_edge.pipeline import Pipeline
from kdc_edge.runtimes import open_pipeline
from kdc_edge.serve.app import make_app
from kdc_edge.serve.worker import Worker


@pytest.fixture(scope="package")
def pipeline(bundle: Path) -> Pipeline:
    return open_pipeline(bundle, threads=1)


@pytest.fixture
def worker(pipeline: Pipeline) -> Iterator[Worker]:
    worker = Worker(pipeline, name="garden", waiting=2)
    yield worker
    worker.close()


@pytest.fixture
def client(worker: Worker) -> Iterator[TestClient]:
    with TestClient(make_app(worker)) as client:
        yield client
