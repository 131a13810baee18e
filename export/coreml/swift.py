"""Resources/ for Apple's Swift package: the vocabulary, and the compiled models or the commands that compile them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from kdc_edge.errors import InputError
from kdc_edge.export.coreml.swift_tokens import read_swift_vocabulary
from kdc_edge.text import last_line
from kdc_edge.tokenizer import save_vocabulary

VOCABULARY = ("vocab.json", "merges.txt")
COMPILER = ("xcrun", "coremlcompiler", "compile")


def lay_out_resources(folder: Path) -> None:
    """Resources/ in the bundle: the vocabulary, and the compiled models where this machine can compile.

    Elsewhere compile.sh holds the commands for a Mac. It writes to a folder of its caller's: a bundle stays as it is.
    """
    resources = folder / "Resources"
    resources.mkdir()
    words = read_swift_vocabulary(folder / "tokenizer")
    save_vocabulary(resources, words.vocab, words.merges)
    packages = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.mlpackage"))
    if sys.platform == "darwin":
        for package in packages:
            _compile(folder / package, resources)
        return
    lines = [
        "#!/bin/sh",
        "# On a Mac with Xcode: compile.sh DIR puts all that Apple's StableDiffusion package reads into DIR.",
        "set -eu",
        'bundle=$(cd "$(dirname "$0")/.." && pwd)',
        "out=${1:?usage: compile.sh DIR}",
        'mkdir -p "$out"',
        *(f'cp "$bundle/Resources/{name}" "$out"' for name in VOCABULARY),
        *(f'{shlex.join(COMPILER)} "$bundle/{package}" "$out"' for package in packages),
    ]
    (resources / "compile.sh").write_text("\n".join(lines) + "\n", "utf-8")


def _compile(package: Path, resources: Path) -> None:
    try:
        done = subprocess.run([*COMPILER, str(package), str(resources)], capture_output=True, text=True, check=False)
    except OSError:
        raise InputError(
            "--swift compiles with xcrun, which comes with Xcode: install Xcode, or leave it out"
        ) from None
    if done.returncode:
        reason = last_line(done.stderr, "no reason given")
        raise InputError(f"{shlex.join(COMPILER)} cannot compile {package.name}: {reason}")
