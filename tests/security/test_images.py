"""Images and rows from anywhere: bounded in bytes, and a bad one costs itself."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdc_edge import image_files
from kdc_edge.errors import InputError
from kdc_edge.train.data.images import LeftOut, read_image
from kdc_edge.train.data.sources import open_source
from tests.train.layouts import everything, plain


def png(width: int, height: int, bits: int, kind: int, rows: int) -> bytes:
    """A PNG of so many empty rows that says it has `height`."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    channels = {2: 3, 6: 4}[kind]
    data = zlib.compress(bytes((1 + width * channels * bits // 8) * rows))
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([bits, kind, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("bits", "kind"), [(16, 6), (16, 2), (8, 6)])
def test_what_unpacks_to_too_many_bytes_is_left_out_before_it_is_unpacked(bits: int, kind: int) -> None:
    """99 million pixels, fewer than the limit of pixels; the whole data is there, so that a decoder would go on."""
    with pytest.raises(LeftOut) as caught:
        read_image(png(9_900, 10_000, bits, kind, 8), size=64)
    assert caught.value.reason == "unpacks to more than 256 MiB"


def test_a_tiff_is_bounded_by_its_own_bits() -> None:
    buffer = io.BytesIO()
    Image.new("F", (9_000, 9_000)).save(buffer, "TIFF", compression="tiff_deflate")
    with pytest.raises(LeftOut) as caught:
        read_image(buffer.getvalue(), size=64)
    assert caught.value.reason == "unpacks to more than 256 MiB"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "F", "I"])
def test_strips_compute_what_the_whole_image_would(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (60, 40, 4), np.uint8)
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(noise).convert(mode)
    elif mode == "P":
        image = Image.fromarray(noise[..., :3]).convert("P")
        image.info["transparency"] = 3
    else:
        kinds = {"I;16": np.uint16, "F": np.float32, "I": np.int32}
        image = Image.fromarray((noise[..., 0].astype(np.int64) * 200).astype(kinds[mode]))
    found = []
    for pixels in (7, 10**9):
        monkeypatch.setattr(image_files, "STRIP_PIXELS", pixels)
        found.append(read_image(image.copy(), size=32))
    assert np.array_equal(*found)
    assert found[0].std() > 0


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def jpeg() -> bytes:
    buffer = io.BytesIO()
    plain((90, 20, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_bad_member_of_a_tar_costs_that_member(tmp_path: Path) -> None:
    members = [
        ("0.jpg", b"nothing"), ("0.txt", b"x"),
        ("1.jpg", jpeg()), ("1.json", b"{"),
        ("2.jpg", jpeg()), ("2.json", b"[" * 100_000),
        ("3.jpg", jpeg()), ("3.txt", b"\xff\xfe"), ("3.npy", b"no array"), ("3.pyd", b"\x80\x04no pickle."),
        ("no-dot", b""), (".hidden", b""),
        ("4.png", jpeg()), ("4.txt", b"of another kind"), ("4.txt", b"of another kind"),
        ("5.jpg", jpeg()), ("5.txt", b"a violet square"),
    ]  # fmt: skip
    tar(tmp_path / "a.tar", members)
    whole = tar(tmp_path / "b.tar", members).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 1000)
    tar(tmp_path / "d.tar", members[-2:])
    samples, left = everything(open_source(f"webdataset:{tmp_path}/*.tar"))
    assert [s.caption for s in samples[:3]] == ["\ufffd\ufffd", "of another kind", "a violet square"]
    assert samples[-1].caption == "a violet square"
    assert left["no caption in its row"] >= 2
    assert left["the tar breaks off: ReadError"] == 2


def test_files_that_are_no_tars_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 1000)
    with pytest.raises(InputError, match="are these tar files"):
        open_source(f"webdataset:{tmp_path}/*.tar")


@pytest.mark.parametrize(
    "head",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "a: [" * 20_000,
        "license: mit\nnames: " + "x" * 200_000,
        "a: \x00",
    ],
)
def test_a_data_card_is_bounded(tmp_path: Path, head: str) -> None:
    """A billion laughs in a few lines."""
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Flowers\n")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": "x"}))
    with pytest.raises(InputError, match=r"README\.md has a head"):
        open_source(f"hf:{tmp_path}")
