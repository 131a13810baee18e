"""kdc_edge.image: PNG and its parameters, pixels, PSNR, grids."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdc_edge.errors import InputError
from kdc_edge.image import (
    format_parameters,
    grid,
    parse_parameters,
    psnr_db,
    read_parameters,
    save_png,
    to_pixels,
)

PIXELS = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
USUAL: dict[str, object] = {
    "prompt": "a red flower",
    "negative_prompt": "blurry",
    "Steps": 20,
    "Sampler": "DPM++ 2M",
    "CFG scale": 7.5,
    "Seed": 1,
    "Size": "512x512",
    "Model": "garden",
}


def test_the_chunk_reads_as_user_interfaces_write_it() -> None:
    assert format_parameters(USUAL) == (
        "a red flower\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 1, Size: 512x512, Model: garden"
    )
    assert format_parameters({"prompt": "x", "Model": 'a, b: "c"'}) == 'x\nModel: "a, b: \\"c\\""'


def test_pixels_and_parameters_come_back(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", PIXELS, USUAL)
    assert read_parameters(tmp_path / "a.png") == {name: str(value) for name, value in USUAL.items()}
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), PIXELS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_png_without_parameters_says_nothing(tmp_path: Path) -> None:
    save_png(str(tmp_path / "a.png"), PIXELS)
    assert read_parameters(str(tmp_path / "a.png")) == {}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("红色的花 🌸 زهرة حمراء", "红色的花 🌸 زهرة حمراء"),
        ("une fleur fanée, élégante", "une fleur fanée, élégante"),
        ("two\nlines", "two lines"),
        ("win\r\ndows", "win dows"),
        ("tab\tnul\x00bell\x07del\x7fnel\x85", "tab nul bell del nel "),
        ("half \ud83d of one", "half ? of one"),
        ("Negative prompt: not really", "Negative prompt: not really"),
        ("Steps: 1, Seed: 2, Size: 3x3", "Steps: 1, Seed: 2, Size: 3x3"),
        ("", ""),
        ('"quoted", (weight:1.3) [a|b] \\', '"quoted", (weight:1.3) [a|b] \\'),
    ],
)
def test_odd_prompts_survive(tmp_path: Path, written: str, read: str) -> None:
    for parameters in (
        {"prompt": written},
        {"prompt": written, "Seed": 1},
        {"prompt": "x", "negative_prompt": written, "Seed": 1, "Model": written},
    ):
        save_png(tmp_path / "a.png", PIXELS, parameters)
        expected = {name: read if value == written else str(value) for name, value in parameters.items()}
        if not expected.get("negative_prompt", "x"):
            del expected["negative_prompt"]  # an empty one is not written
        assert read_parameters(tmp_path / "a.png") == expected


ANY_TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_ /-]{0,10}[A-Za-z0-9_]", fullmatch=True)


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT, ANY_TEXT.filter(bool), st.dictionaries(NAMES, ANY_TEXT, max_size=5))
def test_any_text_survives(prompt: str, negative: str, others: dict[str, str]) -> None:
    parameters = {**others, "prompt": prompt, "negative_prompt": negative}
    assert parse_parameters(format_parameters(parameters)) == parameters


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_any_chunk_can_be_read(text: str) -> None:
    assert "prompt" in parse_parameters(text)


def test_a_crafted_chunk_is_refused_in_one_pass() -> None:
    """Each setting could be read in two ways by a pattern that goes back: 2**60 of them would not end."""
    settings_line = 'ab: "c: 1, dd: 2", ' * 60 + "!"
    assert parse_parameters("x\n" + settings_line) == {"prompt": "x\n" + settings_line}


def test_a_chunk_of_another_program_is_read() -> None:
    text = (
        "masterpiece,\nbest flower\nNegative prompt: bad,\nworse\n"
        "Steps: 30, Sampler: Euler a, Schedule type: Karras, Size: 512x768, "
        'Lora hashes: "a: 1, b: 2", Version: v1.9'
    )
    assert parse_parameters(text) == {
        "prompt": "masterpiece,\nbest flower",
        "negative_prompt": "bad,\nworse",
        "Steps": "30",
        "Sampler": "Euler a",
        "Schedule type": "Karras",
        "Size": "512x768",
        "Lora hashes": "a: 1, b: 2",
        "Version": "v1.9",
    }


@pytest.mark.parametrize("name", ["", "x", "a:b", "a,b", "a\nb", " a"])
def test_a_name_that_cannot_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot be read back"):
        format_parameters({"prompt": "x", name: 1})


@pytest.mark.parametrize(
    "pixels",
    [PIXELS.astype(np.float32), PIXELS[:, :, :2], PIXELS[0], PIXELS[None], np.zeros((0, 4, 3), np.uint8)],
)
def test_other_pixels_are_refused_and_nothing_is_written(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8 pixels"):
        save_png(tmp_path / "a.png", pixels, None)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_png(path, PIXELS, USUAL)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_png(path, PIXELS[::-1], None)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        save_png(tmp_path / "file" / "a.png", PIXELS, None)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BOMB = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 30_000_000))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as a PNG"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "cannot be read as a PNG"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as a PNG"),
        (png(4, 4)[:20], "cannot be read as a PNG"),
        (png(10_000, 10_000), "absurd number of pixels"),  # a warning to Pillow
        (png(100_000, 100_000), "absurd number of pixels"),  # an error to Pillow
        (png(4, 4, BOMB), "cannot be read as a PNG"),
    ],
)
def test_a_file_that_is_no_honest_png_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_parameters(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match="cannot be read as a PNG"):
            read_parameters(path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120))
def test_a_damaged_png_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    save_png(path, PIXELS, USUAL)
    content = path.read_bytes()
    path.write_bytes(content[:at] + noise + content[at + len(noise) :])
    try:
        assert isinstance(read_parameters(path), dict)
    except InputError as error:
        line = str(error)
    else:
        line = ""
    assert "\n" not in line


def test_to_pixels_equals_diffusers() -> None:
    images = torch.randn((3, 3, 16, 24), generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :4] = torch.tensor([-1.0, 1.0, float("inf"), -float("inf")])
    images[1] = torch.linspace(-1.1, 1.1, 3 * 16 * 24).reshape(3, 16, 24)
    theirs = VaeImageProcessor().postprocess(images, output_type="pil")
    ours = to_pixels(images.numpy())
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, np.stack([np.asarray(image) for image in theirs]))


def test_to_pixels_refuses_what_is_no_number() -> None:
    with pytest.raises(InputError, match="no numbers"):
        to_pixels(np.full((1, 3, 2, 2), np.nan, np.float32))


def test_psnr_is_its_definition() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr_db(a, a) == math.inf
    assert psnr_db(a, np.full_like(a, 255)) == pytest.approx(0.0)
    assert psnr_db(a, np.full_like(a, 1)) == pytest.approx(20 * math.log10(255))
    assert psnr_db(np.full_like(a, 3), np.full_like(a, 1)) == pytest.approx(20 * math.log10(255 / 2))


def test_psnr_refuses_other_images() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    for other in (a[:2], a.astype(np.float32)):
        with pytest.raises(InputError, match="two uint8 images"):
            psnr_db(a, other)


def test_grid_places_images_row_by_row() -> None:
    images = [np.full((2, 3, 3), shade, np.uint8) for shade in (10, 20, 30)]
    sheet = grid(images, columns=2)
    assert sheet.shape == (4, 6, 3)
    assert [int(sheet[y, x, 0]) for y in (0, 2) for x in (0, 3)] == [10, 20, 30, 255]
    assert np.array_equal(grid(np.stack(images), columns=3)[:, 3:6], images[1])


@pytest.mark.parametrize(
    ("images", "columns"),
    [([], 2), ([PIXELS], 0), ([PIXELS, PIXELS[:2]], 2)],
    ids=["none", "columns", "sizes"],
)
def test_a_grid_that_cannot_be_is_refused(images: list[np.ndarray], columns: int) -> None:
    with pytest.raises(InputError, match="a grid needs"):
        grid(images, columns)
