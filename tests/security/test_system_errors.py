"""What the system refuses, and what ends a command, is one line and an exit code: no traceback, no half file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kdc_edge.errors import BundleError, KdcError, explain
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from tests.cli.test_commands import complaint, run
from tests.forks import Fork

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
MAIN = "from kdc_edge.cli import main; print('ready', flush=True); main()"
# A disk that is full after so many bytes of a file.
FULL_AT = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); from kdc_edge.cli import main; main()"
)


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A shell's line in which `kdc-edge` is ours."""
    whole = f"kdc-edge() {{ {sys.executable} -c 'from kdc_edge.cli import main; main()' \"$@\"; }}; {command}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", whole], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("kdc-edge formats > /dev/full", "No space left on device: make room"),
        ("kdc-edge --help > /dev/full", "No space left on device: make room"),
        ("kdc-edge formats --json | true", "the output was closed"),
    ],
)
def test_an_output_that_takes_nothing(tmp_path: Path, command: str, words: str) -> None:
    done = shell(command, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"kdc-edge: {words}")


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["export", GARDEN_TEACHER, "--target", "openvino", "--no-verify", "--out", "x"], []),
        (["init", "--preset", "garden-student", "--from", "garden", "--out", "x"], []),
        (["generate", "x", "--bundle", "bundle", "--steps", 1, "--cache", "x"], ["bundle"]),
    ],
)
def test_a_full_disk_is_not_a_damaged_bundle(
    bundle: Path, tmp_path: Path, arguments: list[object], left: list[str]
) -> None:
    if left:
        shutil.copytree(bundle, tmp_path / "bundle")
    child = Fork(FULL_AT.format(300_000), *arguments, cwd=tmp_path, output=tmp_path / "said")
    assert child.wait() == 1
    last = child.err.splitlines()[-1]
    assert last.startswith("kdc-edge: ")
    assert "make room on" in last
    assert "Traceback" not in child.err
    found = [p.name for p in tmp_path.iterdir() if not p.name.startswith("said.")]
    assert [name for name in found if name != "x" or any((tmp_path / name).iterdir())] == left


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/mnt/a"),
            "/mnt/a: Read-only file system: choose another place",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied: choose another place"),
        (OSError(errno.EIO, "Input/output error", "a"), "a: Input/output error: check the disk"),
        (
            shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
            "b: No space left on device: make",
        ),
        (MemoryError(), "too little memory"),
        (RuntimeError("CUDA out of memory. Tried to"), "too little memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "please report it"),
        (ValueError("bad\n\x1b[31mvalue"), r"ValueError: bad \x1b[31mvalue"),
        (ImportError("libfoo.so: cannot open"), "install it again"),
        (BundleError("x" * 5000 + ": export it again"), "export it again"),
    ],
)
def test_whatever_is_raised_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("kdc_edge.bundle.Bundle.open", fail)
    said = complaint("info", tmp_path, cwd=tmp_path)
    assert words in said
    assert said.isprintable()
    assert len(said) <= 500
    assert "Traceback (most recent call last)" in run("info", tmp_path, "--debug", cwd=tmp_path, code=1).stderr


def test_a_fault_that_nobody_foresaw_is_not_blamed_on_the_user() -> None:
    assert "please report it" in explain(KeyError("x"))
    assert explain(KdcError("said")) == "said"


@pytest.mark.parametrize("argument", ["x\x1b[31m", "x\ny", "\u202ex", "x" * 9_000])
def test_names_from_outside_are_shown_not_obeyed(tmp_path: Path, argument: str) -> None:
    for command, code in ((["info", argument], 1), ([argument], 2), (["formats", argument], 2)):
        said = run(*command, cwd=tmp_path, code=code).stderr
        assert said.endswith("\n")
        assert said[:-1].isprintable()
        assert len(said) <= 500


def test_debug_is_a_word_behind_two_dashes(tmp_path: Path) -> None:
    assert "--debug" in run("info", "--", "--debug", cwd=tmp_path, code=1).stderr


def ended(arguments: list[str], how: signal.Signals, after_sec: float, cwd: Path, code: str = MAIN) -> tuple[int, str]:
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        time.sleep(after_sec)
        running.send_signal(how)
        said = running.communicate()[1]
    return running.returncode, said


@pytest.mark.parametrize("after_sec", [0.02, 0.1, 0.3, 0.9])
@pytest.mark.parametrize(
    ("how", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_at_any_moment_is_a_line(
    tmp_path: Path, how: signal.Signals, code: int, word: str, after_sec: float
) -> None:
    """While typer is imported, while torch is, and while there is work."""
    arguments = ["export", str(GARDEN_TEACHER), "--target", "openvino", "--out", "out"]
    found, said = ended(arguments, how, after_sec, tmp_path)
    assert (found, said.splitlines()[-1:]) == (code, [f"kdc-edge: {word}"])
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_an_import_swallows_still_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    monkeypatch.setattr("kdc_edge.bundle.Bundle.open", swallow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        assert run("info", tmp_path, cwd=tmp_path, code=130).stderr == "kdc-edge: interrupted\n"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("whole", "limit_sec", "imported"),
    [("imported_while_ended", 20.0, True), ("imported_while_ended", 0.1, False), ("torch", 20.0, False)],
)
def test_an_import_that_must_be_whole_is_not_cut_short_unless_it_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: str, limit_sec: float, imported: bool
) -> None:
    (tmp_path / "imported_while_ended.py").write_text(
        "import os, pathlib, signal, time\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.5)\n"
        "pathlib.Path('imported').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("kdc_edge.cli.signals.WHOLE_IMPORTS", {whole})
    monkeypatch.setattr("kdc_edge.cli.signals.LONGEST_IMPORT_SEC", limit_sec)
    monkeypatch.setattr("kdc_edge.bundle.Bundle.open", lambda _: (__import__("imported_while_ended"), time.sleep(20)))
    (tmp_path / "cwd").mkdir()
    assert run("info", tmp_path, cwd=tmp_path / "cwd", code=143).stderr == "kdc-edge: terminated\n"
    sys.modules.pop("imported_while_ended", None)
    assert (tmp_path / "cwd" / "imported").exists() == imported


@pytest.mark.parametrize(
    ("how", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_a_call_that_python_cannot(tmp_path: Path, how: signal.Signals, code: int, word: str) -> None:
    """Such as that of an engine at a large size, here one that would take hours."""
    stuck = (
        "import hashlib, kdc_edge.bundle, kdc_edge.cli.signals\n"
        "kdc_edge.cli.signals.LONGEST_CALL_SEC = 0.2\n"
        "def stuck(_):\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
        "kdc_edge.bundle.Bundle.open = stuck\n"
        "kdc_edge.cli.main()"
    )
    assert ended(["info", "x"], how, 0.1, tmp_path, stuck) == (code, f"kdc-edge: {word}\n")


def test_a_signal_of_a_forked_child_does_not_end_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(_: object) -> None:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGTERM, lambda *_: None)
            os.write(write, b"ready")
            time.sleep(60)
            os._exit(0)
        os.read(read, 5)
        os.kill(child, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise BundleError("the parent goes on")

    monkeypatch.setattr("kdc_edge.cli.signals.LONGEST_CALL_SEC", 0.1)
    monkeypatch.setattr("kdc_edge.bundle.Bundle.open", fork)
    assert complaint("info", tmp_path, cwd=tmp_path) == "kdc-edge: the parent goes on"


def test_signals_are_taken_on_windows_too(tmp_path: Path) -> None:
    """Where nothing forks, and a pipe is told of no signal."""
    lacking = (
        "import os, signal, sys\n"
        "import kdc_edge.files, typer\n"  # which have their own ways there
        "sys.platform = 'win32'\n"
        "del os.register_at_fork, os.set_blocking, signal.set_wakeup_fd\n"
        "from kdc_edge.cli.signals import Signals\n"
        "ends = Signals()\n"
        "ends.listen()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "except SystemExit:\n"
        "    ends.restore()\n"
        "    print(ends.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", lacking], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("143\n", "")


class Finalized:
    """An object that is told to end while the interpreter removes it, where no exception can be raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))


def test_a_signal_that_a_finalizer_swallows_still_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(_: object) -> None:
        Finalized()
        time.sleep(20)
        raise AssertionError("the command went on")

    monkeypatch.setattr("kdc_edge.bundle.Bundle.open", swallow)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run("info", tmp_path, cwd=tmp_path, code=143).stderr == "kdc-edge: terminated\n"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("content", "words"),
    [("a = " + "[" * 100_000, "is no TOML file"), ("x" * (2**20 + 1), "is larger than 1 MiB"), ("\x1b[31m", "no TOML")],
)
def test_settings_that_cannot_be_read(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "kdc-edge.toml").write_text(content)
    said = complaint("train", cwd=tmp_path)
    assert words in said
    assert said.isprintable()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_settings_that_never_end(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "kdc-edge.toml")
    assert "is a device or a pipe" in run("train", cwd=tmp_path, code=1).stderr


def test_what_a_bundle_says_of_itself_is_shown(own_bundle: Path, tmp_path: Path) -> None:
    path = own_bundle / "kdc-edge.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["provenance"]["command"] = "\x1b]0;title\x07 \x9b31m \u202e red"
    path.write_text(json.dumps(manifest))
    for arguments in (["info", own_bundle], ["info", own_bundle, "--json"]):
        shown = run(*arguments, cwd=tmp_path).stdout
        assert "title" in shown
        assert all(line.isprintable() for line in shown.splitlines())
