"""Files are whole or not there."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from blake3 import blake3

from kdc_edge.errors import BundleError, InputError
from kdc_edge.files import BLOCK, atomic_folder, hash_file, inside, parse_size, read_json, sha256, write_atomic


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_atomic(tmp_path / "new" / "a.txt", "one")
    write_atomic(tmp_path / "new" / "a.txt", b"two")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"two"
    assert left_over(tmp_path / "new") == ["a.txt"]


def test_write_atomic_names_a_folder_in_its_place(tmp_path: Path) -> None:
    for path in (tmp_path, Path()):
        with pytest.raises(IsADirectoryError):
            write_atomic(path, "x")


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a.txt", "old")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text("utf-8") == "old"
    assert left_over(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_folder_keeps_the_old_folder_on_any_error(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    with atomic_folder(out, marker="mark") as folder:
        (folder / "mark").write_text("first")

    def fail() -> None:
        with atomic_folder(out, marker="mark") as folder:
            (folder / "mark").write_text("second")
            raise error

    with pytest.raises(error):
        fail()
    assert (out / "mark").read_text("utf-8") == "first"
    assert left_over(tmp_path) == ["out"]


def test_atomic_folder_replaces_its_own_kind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("first", "second"):
        with atomic_folder(out, marker="mark") as folder:
            (folder / "mark").write_text(content)
            (folder / content).touch()
    assert left_over(out) == ["mark", "second"]
    assert left_over(tmp_path) == ["out"]


def test_atomic_folder_puts_the_old_one_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with atomic_folder(out, marker="mark") as folder:
        (folder / "mark").write_text("first")
    replace = Path.replace
    monkeypatch.setattr("kdc_edge.files._exchange", lambda *_: False)  # a system that cannot

    def fail_for_part(self: Path, target: Path) -> Path:
        if ".part-new" in self.name:
            raise OSError("busy")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_for_part)
    with pytest.raises(OSError, match="busy"), atomic_folder(out, marker="mark") as folder:
        (folder / "mark").write_text("second")
    assert (out / "mark").read_text("utf-8") == "first"
    assert left_over(tmp_path) == ["out"]


def test_atomic_folder_where_no_folder_can_be_made_raises_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([FileNotFoundError])  # as in /proc; asked again, StopIteration

    def mkdir(path: Path, **_: object) -> None:
        if path.name == ".out.part-new":
            raise next(answers)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(FileNotFoundError), atomic_folder(Path("out")):
        pass


def test_atomic_folder_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"), atomic_folder(tmp_path, marker="mark"):
        pytest.fail("the work should not start")
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "thesis.txt"):
        pytest.fail("the work should not start")
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert left_over(tmp_path / "empty") == ["a"]


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a\\b", "C:/a", "a\0b", "x" * 300])
def test_inside_refuses(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="names the path"):
        inside(tmp_path, name, BundleError)


def test_inside_refuses_links_out_and_circles(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    (root / "circle").symlink_to("circle")
    (root / "in").symlink_to(root / "there.txt")
    with pytest.raises(BundleError, match="link out of its folder"):
        inside(root, "out/secret.txt", BundleError)
    with pytest.raises(BundleError):
        inside(root, "circle/a", BundleError)
    assert inside(root, "in", BundleError) == root / "in"


def test_read_json_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(BundleError, match="is missing"):
        read_json(path, BundleError)
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5_000):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="cannot be read as JSON"):
            read_json(path, BundleError)
    path.write_text("[1]")
    with pytest.raises(BundleError, match="JSON object"):
        read_json(path, BundleError)
    monkeypatch.setattr("kdc_edge.files.MAX_JSON_BYTES", 2)
    with pytest.raises(BundleError, match="larger than"):
        read_json(path, BundleError)


def test_hashes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")  # FIPS 180-2, appendix B.1; the BLAKE3 reference's b3sum
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(file) == expected
    expected3 = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert hash_file(file, "sha256", "blake3") == {"sha256": expected, "blake3": expected3}


def test_a_file_of_several_blocks_has_the_hashes_of_its_whole(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(2 * BLOCK + 1)
    (tmp_path / "a").write_bytes(content)
    expected = {"blake3": blake3(content).hexdigest(), "sha256": hashlib.sha256(content).hexdigest()}
    assert hash_file(tmp_path / "a", "blake3", "sha256") == expected


def test_sizes_are_read_in_decimal_and_binary_units() -> None:
    assert parse_size("1.5GB", "--max-size") == 1_500_000_000
    assert parse_size(" 300 MiB", "--max-size") == 300 * 2**20
    for text in ("much", "300", "-1MB", "1e3MB", "300KB", "0MB", "0.0000001MB"):
        with pytest.raises(InputError, match=f"--max-memory '{text}' is no size: use 300MB"):
            parse_size(text, "--max-memory")
