"""Child processes that open fakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that sets what child processes open: a function of rows.py, by name. First that is `open_fake`."""

    def use(name: str) -> None:
        monkeypatch.setenv("KDC_EDGE_TEST_OPENER", name)

    monkeypatch.setattr("kdc_edge.bench.runner.WORKER", "tests.bench.fake_worker")
    use("open_fake")
    return use
