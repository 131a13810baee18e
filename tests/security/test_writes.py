"""What is written is whole or not there, whoever dies, waits or looks on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kdc_edge import files
from kdc_edge.errors import InputError
from kdc_edge.files import atomic_folder, recover_folder, write_atomic

# Writes OUT as often as asked; says "in" within the block, and ends when its input does.
WRITER = """
import sys
from pathlib import Path
from kdc_edge import files
if sys.argv[3] == "two-renames":
    files._exchange = lambda *_: False
for number in range(int(sys.argv[2])):
    with files.atomic_folder(Path(sys.argv[1]), marker="mark") as folder:
        for name in ("mark", *"abcdef"):
            (folder / name).write_text(str(number))
        if sys.argv[2] == "1":
            print("in", flush=True)
            sys.stdin.read()
"""
SLOW_RENAMES = """
import os, sys, time
from pathlib import Path
from kdc_edge import files
files._exchange = lambda *_: False
replace = Path.replace
def slow(self, target):
    if self.name.endswith(".part-new"):
        print("between", flush=True)
        time.sleep(600)
    return replace(self, target)
Path.replace = slow
with files.atomic_folder(Path(sys.argv[1]), marker="mark") as folder:
    (folder / "mark").write_text("second")
"""


def make(out: Path, content: str = "first") -> Path:
    with atomic_folder(out, marker="mark") as folder:
        (folder / "mark").write_text(content)
    return out


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@contextmanager
def child(code: str, *arguments: object, word: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has come to say `word`; killed at the end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == f"{word}\n"
        yield running
        running.kill()


def test_a_second_writer_is_told_at_once(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with child(WRITER, out, 1, "exchange", word="in") as first:
        begin = time.monotonic()
        with pytest.raises(InputError, match="is being written by another process"), atomic_folder(out, marker="mark"):
            pytest.fail("the work should not start")
        assert time.monotonic() - begin < 1
        make(tmp_path / "other")  # another place is free, and leaves the first one's part alone
        first.communicate("")
    assert (out / "mark").read_text("utf-8") == "0"
    assert names(tmp_path) == ["other", "out"]


def test_what_a_killed_process_left_goes_with_the_next_write_beside_it(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with child(WRITER, out, 1, "exchange", word="in") as running:
        running.send_signal(signal.SIGKILL)
    assert names(tmp_path) == [".out.part-new", "out"]
    assert (out / "mark").read_text("utf-8") == "first"
    make(tmp_path / "other")
    assert names(tmp_path) == ["other", "out"]


def test_a_folder_that_a_killed_process_left_aside_comes_back(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with child(SLOW_RENAMES, out, word="between") as running:
        assert names(tmp_path) == [".out.part-new", ".out.part-old"]
        recover_folder(out)  # its writer lives
        assert names(tmp_path) == [".out.part-new", ".out.part-old"]
        running.send_signal(signal.SIGKILL)
    recover_folder(out)
    assert (out / "mark").read_text("utf-8") == "first"
    assert names(tmp_path) == ["out"]


def test_readers_see_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """Two hundred replacements, looked at all the time: never absent, never of two minds."""
    if not files._exchange(make(tmp_path / "a"), make(tmp_path / "b")):
        pytest.fail("this file system cannot exchange two folders: run the tests on one that can")
    out, seen = make(tmp_path / "out", "0"), 0
    with subprocess.Popen([sys.executable, "-c", WRITER, str(out), "200", "exchange"]) as running:
        while running.poll() is None:
            folder = os.open(out, os.O_RDONLY)  # FileNotFoundError would end the test
            os.close(folder)
            seen += 1
        assert running.returncode == 0
    assert seen > 200
    assert {(out / name).read_text("utf-8") for name in ("mark", *"abcdef")} == {"199"}
    assert names(tmp_path) == ["a", "b", "out"]


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    make(tmp_path / "disk" / "bundle")
    (tmp_path / "out").symlink_to("disk/bundle")
    make(tmp_path / "out", "second")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "bundle" / "mark").read_text("utf-8") == "second"
    assert names(tmp_path) == ["disk", "out"]


def test_what_came_to_the_place_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    def work() -> None:
        with atomic_folder(tmp_path / "out", marker="mark") as folder:
            (folder / "mark").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").touch()

    with pytest.raises(InputError, match="holds other files"):
        work()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["thesis.txt"]


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.txt", [str(i) * 50_000 for i in range(8)]
    (tmp_path / ".a.txt.part").write_text("left by a kill, and longer" * 10_000)
    threads = [threading.Thread(target=write_atomic, args=(path, text)) for text in texts * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text("utf-8") in texts
    assert names(tmp_path) == ["a.txt"]
