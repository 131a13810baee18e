"""The page of kdc-edge serve in a real browser: it fits, can be read, draws what is typed, says what was blanked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdc_edge.manifest import Sampling
from kdc_edge.pipeline import Pipeline
from kdc_edge.runtimes import open_pipeline
from kdc_edge.serve.worker import Worker
from tests.report.browser import Browser
from tests.report.test_in_browser import PALE
from tests.serve.client import listening

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(bundle: Path) -> Iterator[str]:
    """The address of a server of a few-step student, whose safety checker flags every second image."""
    opened = open_pipeline(bundle, threads=1)
    scores = itertools.cycle([np.full((1, 17), -1.0), np.full((1, 17), 0.1)])
    checked = {**opened.components, "safety_checker": lambda **_: next(scores)}
    model = opened.model.model_copy(update={"sampling": Sampling(scheduler="ddim", steps=2, guidance=1.0)})
    worker = Worker(Pipeline(model, opened.tokenizer, checked), name="garden")
    with listening(worker) as address:
        yield address
    worker.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


def wait_for(browser: Browser, expression: str, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := browser.evaluate(expression)):
        assert time.monotonic() < end, f"{expression} did not come true"
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])
def test_the_page_fits_its_window_and_can_be_read(browser: Browser, page: str, width: int, dark: bool) -> None:
    browser.open(f"{page}/", width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(PALE) == []
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels?.length && !e.ariaLabel)"
    assert browser.evaluate(f"{unnamed}.map(e => e.id)") == []
    assert browser.complaints == []


def test_what_is_typed_is_drawn_and_what_is_blanked_is_said(browser: Browser, page: str) -> None:
    browser.open(f"{page}/", width=1280)
    browser.evaluate("at('steps').value = 1; at('guidance').value = 1; at('live').checked = decided = true; 0")
    browser.evaluate("at('prompt').focus(); 0")
    browser.send("Input.insertText", text="a red flower")
    wait_for(browser, "at('past').hidden === false")
    wait_for(browser, "at('status').textContent.includes(' s, seed 1, 1 steps')")
    assert "blanked" not in browser.evaluate("at('status').textContent")
    browser.evaluate("at('again').click(); 0")
    wait_for(browser, "at('status').textContent.includes('1 steps, blanked by the safety checker')")
    browser.evaluate("document.querySelector('#history button:last-child').click(); 0")  # the first one again
    assert browser.evaluate("at('prompt').value") == "a red flower"
    browser.evaluate("at('guidance').value = 3; at('draw').click(); 0")
    wait_for(
        browser,
        "at('status').textContent.includes('1 steps. guidance 3 is given to a student that was trained without')",
    )
    assert browser.complaints == []
