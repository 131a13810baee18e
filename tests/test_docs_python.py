"""The code blocks of docs/python.md, one after the other in a folder with a bundle."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text("utf-8")
BLOCKS = re.findall(r"(<!-- not run by tests: .*? -->\n)?```python\n(.*?)```", PAGE, re.S)


def test_the_blocks_run(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bundle, tmp_path / "bundles" / "onnx-fp16")
    names: dict[str, object] = {"__name__": "docs"}
    with contextlib.chdir(tmp_path):
        for left_out, block in BLOCKS:
            if not left_out:
                exec(compile(block, "docs/python.md", "exec"), names)
    assert (tmp_path / "flower.png").is_file()
    assert (tmp_path / "preview.png").is_file()
    assert "8/8" in capsys.readouterr().out


def test_the_other_blocks_are_python() -> None:
    left_out = [block for marked, block in BLOCKS if marked]
    assert len(left_out) == 2
    for block in left_out:
        compile(block, "docs/python.md", "exec")
