"""The quickstart's whole way in the smallest size, and the page that it writes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdc_edge.cli.quickstart_training import Watch, _Beside
from kdc_edge.errors import KdcError
from tests.cli.test_commands import complaint, run
from tests.traced_module import FOLDER, python_module_with_traces, small_presets


class Text(HTMLParser):
    """The page's words, headings and images."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.images = 0
        self._heading = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._heading = tag == "h2"
        self.images += tag == "img" and (dict(attrs)["src"] or "").startswith("data:image/png;base64,")

    def handle_data(self, data: str) -> None:
        if self._heading and data.strip():
            self.headings.append(data.strip())
            self._heading = False


@pytest.mark.usefixtures("traced_once")
def test_quickstart_goes_from_teacher_to_report(
    tmp_path: Path, traced_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(traced_folder))
    monkeypatch.setattr("kdc_edge.cli.quickstart_training.python_module", python_module_with_traces)
    monkeypatch.setattr("kdc_edge.presets.PRESETS", small_presets())
    done = run(
        "quickstart", "--out", "demo", "--steps", 2, "--batch-size", 2, "--samples", 8, "--eval-images", 2,
        "--eval-steps", 1, "--repeats", 1, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.strip() == "demo/report.html"
    page = (tmp_path / "demo" / "report.html").read_text("utf-8")
    text = Text(page)
    assert text.headings == [
        "In short", "Images", "Few steps", "Learning", "Remembering", "The proof", "Speed and size"
    ]  # fmt: skip
    assert text.images == 6 * 4  # teacher, two students; 20, 4 and 2 steps; two prompts a task
    assert not re.search(r"(src|href)=\"https?:", page)
    assert "forgetting" in page

    matrices = [
        json.loads((tmp_path / "demo" / "runs" / run_name / "results.json").read_text("utf-8"))["prompt_accuracy"]
        for run_name in ("replay", "no-replay")
    ]
    assert matrices[0][0] == matrices[1][0]  # the first task is shared
    for name in ("onnx-fp16", "few-steps"):
        assert (tmp_path / "demo" / "bundles" / name / "kdc-edge.json").is_file()
    rows = json.loads((tmp_path / "demo" / "bench.json").read_text("utf-8"))["rows"]
    assert [row["failure"] for row in rows] == [None] * 4
    assert [(row["name"], row["steps"], row["guidance"]) for row in rows[1:]] == [
        ("onnx-fp16", 20, 4.0), ("few-steps", 4, 1.0), ("few-steps", 2, 1.0)
    ]  # fmt: skip
    assert all(row["prompt_quality"]["prompts"] == 4 for row in rows[1:])
    manifest = json.loads((tmp_path / "demo" / "bundles" / "few-steps" / "kdc-edge.json").read_text("utf-8"))
    assert manifest["model"]["sampling"] == {"scheduler": "ddim", "steps": 4, "guidance": 1.0}
    assert manifest["components"]["vae_decoder"]["class_name"] == "AutoencoderTiny"

    assert "holds other files" in complaint("quickstart", "--out", "demo", cwd=tmp_path)


def test_a_failure_of_the_process_beside_is_told(tmp_path: Path) -> None:
    """Whatever is begun in it after that."""
    said: list[str] = []

    def begin_twice() -> None:
        with _Beside(Watch(said.append, said.append)) as beside:
            beside.train(tmp_path / "nothing")
            beside._child.wait(60)
            beside.train(tmp_path / "more")

    with pytest.raises(KdcError, match=r"config\.json"):
        begin_twice()
    assert said == []
