"""The README does what it says: its commands run, its table is the code's, its pictures exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from kdc_edge.formats import markdown_table
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()
]

SHORT = """
[train]
steps = 1
batch-size = 2
samples = 6
eval-pictures = 2
[bench]
steps = 1
repeats = 1
warmup = 0
"""


def test_commands_of_the_tool_run_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "kdc-edge.toml").write_text(SHORT)  # the same commands, with less work
    ours = [shlex.split(c)[1:] for c in COMMANDS if c.startswith("kdc-edge ")]
    assert len(ours) >= 8
    for arguments in ours:
        run(*arguments, cwd=tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_the_other_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    others = [c.split() for c in COMMANDS if not c.startswith("kdc-edge ")]
    assert others
    for words in others:
        assert words[0] == "make"
        assert re.search(rf"^{words[1]}:", makefile, re.M)


def test_the_table_of_formats_is_the_codes() -> None:
    assert markdown_table() in README


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link
