"""The README does what it says: its commands run, its table is the code's, its images exist."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdc_edge.formats import formats_table
from kdc_edge.image import read_parameters
from tests.cli.test_commands import run
from tests.traced_module import small_presets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()
]

# The same commands, with less work.
SHORT = """
[train]
steps = 2
batch-size = 2
samples = 8
eval-images = 2
eval-steps = 1
replay = 4
[eval]
images = 2
[bench]
steps = 2
repeats = 1
warmup = 0
"""


@pytest.mark.usefixtures("traced_once")
def test_the_bare_workflow_and_every_other_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed one after the other in a folder that was empty but for the settings that shorten them."""
    (tmp_path / "kdc-edge.toml").write_text(SHORT)
    monkeypatch.setattr("kdc_edge.presets.PRESETS", small_presets())
    ours = [shlex.split(c)[1:] for c in COMMANDS if c.startswith("kdc-edge ")]
    done = [run(*arguments, cwd=tmp_path) for arguments in ours]
    assert [words[0] for words in ours[:4]] == ["train", "export", "generate", "bench"]
    trained, exported, generated, benched = done[:4]
    assert "taking the garden" in trained.stderr
    assert trained.stdout.strip() == "runs/001/checkpoint"
    assert "no precision given: fp16" in exported.stderr
    assert exported.stdout.strip() == "bundles/onnx-fp16"
    image = tmp_path / generated.stdout.strip()
    assert np.asarray(Image.open(image)).shape == (64, 64, 3)
    assert ours[2][1] in read_parameters(image).values()
    assert "onnx-fp16" in benched.stdout

    assert (tmp_path / "runs" / "latest").resolve() == tmp_path / "runs" / "002"
    assert json.loads(run("info", "bundles/onnx-fp16", "--json", cwd=tmp_path).stdout)["precision"] == "fp16"
    # The Python lines, in the same folder.
    (python,) = re.findall(r"```python\n(.*?)```", README, re.S)
    with contextlib.chdir(tmp_path):
        exec(python, {})
    assert np.asarray(Image.open(tmp_path / "flower.png")).shape == (64, 64, 3)
    # A flag given by hand wins over the file.
    found = run("bench", "--steps", 3, "--format", "json", "bundles/onnx-fp16", cwd=tmp_path).stdout
    rows = json.loads(found)["rows"]
    assert [(row["steps"], row["repeats"], row["failure"]) for row in rows] == [(3, 1, None)]


def test_the_other_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    others = [c.split() for c in COMMANDS if not c.startswith("kdc-edge ")]
    assert others
    for words in others:
        assert words[0] == "make"
        assert re.search(rf"^{words[1]}:", makefile, re.M)


def test_the_table_of_formats_is_the_codes() -> None:
    assert formats_table() in README
