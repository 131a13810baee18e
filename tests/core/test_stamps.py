"""A large file is read once; whatever changes it is seen."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from kdc_edge import stamps
from kdc_edge.stamps import LEAST_BYTES, known_sha256

CONTENT = bytes(LEAST_BYTES)
CHANGED = b"x" + CONTENT[1:]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDC_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stamps, "SETTLED_NS", -1)  # the files of these tests are new
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT)
    return path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def never(_: Path) -> str:
    raise AssertionError("the file is read again")


def test_an_unchanged_file_is_read_once(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_sha256(file) == digest(CONTENT)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(stamps, "sha256", never)
    assert known_sha256(file) == digest(CONTENT)


def test_a_change_is_seen_with_the_old_size_and_time(cache: Path, file: Path) -> None:
    before = file.stat()
    assert known_sha256(file) == digest(CONTENT)
    assert cache.is_dir()
    file.write_bytes(CHANGED)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known_sha256(file) == digest(CHANGED)


def test_a_file_in_its_place_is_another_one(cache: Path, file: Path) -> None:
    before = file.stat()
    assert known_sha256(file) == digest(CONTENT)
    other = file.with_suffix(".new")
    other.write_bytes(CHANGED)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert known_sha256(file) == digest(CHANGED)
    assert len(list(cache.iterdir())) == 1


def test_what_was_written_a_moment_ago_is_not_kept(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "SETTLED_NS", 10**12)
    assert known_sha256(file) == digest(CONTENT)
    assert not cache.exists()


def test_small_files_are_read_and_a_damaged_stamp_too(cache: Path, file: Path) -> None:
    small = file.with_name("config.json")
    small.write_bytes(b"{}")
    assert known_sha256(small) == digest(b"{}")
    assert not cache.exists()
    known_sha256(file)
    (stamp,) = cache.iterdir()
    stamp.write_text("[", "utf-8")
    assert known_sha256(file) == digest(CONTENT)


def test_a_cache_that_cannot_be_written_is_no_failure(cache: Path, file: Path) -> None:
    cache.parent.write_text("no folder", "utf-8")
    assert known_sha256(file) == digest(CONTENT)
