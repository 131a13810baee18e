"""Image folders as people write them: metadata files, text files beside the images, class folders, splits."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kdc_edge.errors import InputError
from kdc_edge.train.data.sources import open_source
from tests.train.layouts import captions, class_folders, everything, metadata_folder, plain, save


def test_class_folders_name_their_images_and_bad_files_are_counted(tmp_path: Path) -> None:
    source = open_source(f"imagefolder:{class_folders(tmp_path)}")
    samples, left = everything(source)
    assert Counter(s.caption for s in samples) == {"a photo of a red rose": 4, "a photo of a blue bell": 4}
    assert left == {"cannot be read as an image": 2, "smaller than 16 pixels": 1}
    assert source.notes() == [
        "1 pickles or arrays were not opened: images alone are read", "class empty has no images",
        "captions: 11 from folder names",
        "such as 0.jpg: 'a photo of a blue bell'; 0.jpg: 'a photo of a red rose'; cut.png: 'a photo of a red rose'",
    ]  # fmt: skip
    assert all(s.image.shape == (64, 64, 3) and s.image.dtype == np.uint8 for s in samples)


def test_metadata_gives_captions_and_its_bad_lines_are_counted(tmp_path: Path) -> None:
    source = open_source(f"imagefolder:{metadata_folder(tmp_path)}", caption="a sketch: {name}")
    samples, left = everything(source)
    assert [s.caption for s in samples] == [f"a sketch: image number {i}" for i in range(6)]
    assert left == {"missing": 1}
    assert sum(int(note.split()[1]) for note in source.notes() if "lines left out" in note) == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file": "0.png", "caption": "x"}, "line 1 has the columns file, caption: file_name and text are needed"),
        ({"file_name": "../secret.png", "text": "x"}, "leaves the folder"),
        ({"file_name": "/etc/secret.png", "text": "x"}, "leaves the folder"),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, row: dict[str, str], words: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=words):
        open_source(f"imagefolder:{tmp_path}")


def rows_of(*rows: tuple[str, str], kind: str = "jsonl", text: str = "text") -> str:
    if kind == "jsonl":
        return "".join(json.dumps({"file_name": f, text: t}, ensure_ascii=False) + "\n" for f, t in rows)
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([("file_name", text), *rows])
    return content.getvalue()


def folder_of(root: Path, *names: str, **files: str | bytes) -> Path:
    """Images by these names, and a metadata file of each kind."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        save(root / name)
    for kind, content in files.items():
        path = root / f"metadata.{kind}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


AB = (("a.png", "a red square"), ("b.png", 'a "second", square'))
AS_WRITTEN = {
    "jsonl": rows_of(*AB),
    "csv": rows_of(*AB, kind="csv"),
    "csv with semicolons": 'file_name;text\na.png;a red square\nb.png;"a ""second"", square"\n',
    "csv with another column": 'id,File_Name,caption\n1,a.png,a red square\n2,b.png,"a ""second"", square"\n',
    "jsonl, column caption": rows_of(*AB, text="caption"),
    "csv, column prompt": rows_of(*AB, kind="csv", text="prompt"),
    "jsonl, byte order mark": "\ufeff" + rows_of(*AB),
    "csv, byte order mark": "\ufeff" + rows_of(*AB, kind="csv"),
    "jsonl, Windows line ends": rows_of(*AB).replace("\n", "\r\n"),
    "csv, Windows line ends": rows_of(*AB, kind="csv").replace("\n", "\r\n"),
    "jsonl, several captions": '{"file_name": "a.png", "text": ["a red square", "x"]}\n' + rows_of(AB[1]),
}


@pytest.mark.parametrize("where", [".", "train"])
@pytest.mark.parametrize("kind", AS_WRITTEN)
def test_metadata_is_read_as_people_write_it(tmp_path: Path, kind: str, where: str) -> None:
    suffix = "csv" if kind.startswith("csv") else "jsonl"
    folder_of(tmp_path / where, "a.png", "b.png", **{suffix: AS_WRITTEN[kind]})
    source = open_source(f"imagefolder:{tmp_path}")
    prefix = "" if where == "." else "train/"
    assert captions(source) == {f"{prefix}{name}": text for name, text in AB}
    assert f"captions: 2 from {prefix}metadata.{suffix}" in source.notes()
    assert source.notes()[-1] == "such as a.png: 'a red square'; b.png: 'a \"second\", square'"


def test_names_in_metadata_are_files_names_of_every_kind(tmp_path: Path) -> None:
    names = [
        "x/y/a.png",
        "x/z/a.png",
        "gr\u00f6\u00dfe \u82b1 1.JPG",
        "\u5199\u771f\u30001.png",
        "12:30.png",
        "line\nbreak.png",
    ]
    folder_of(tmp_path, *names, jsonl=rows_of(*((n.replace("/", "\\"), f"{i}") for i, n in enumerate(names))))
    source = open_source(f"imagefolder:{tmp_path}")
    assert captions(source) == {name: f"{i}" for i, name in enumerate(names)}
    assert all("\n" not in note for note in source.notes())
    assert source.fingerprint() == open_source(f"imagefolder:{tmp_path}").fingerprint()


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names of files are Unicode there")
def test_names_that_are_no_utf8_are_read_too(tmp_path: Path) -> None:
    save(tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xe9t\xe9.png"))
    source = open_source(f"imagefolder:{tmp_path}")
    samples, left = everything(source, crop="random")
    assert [s.caption for s in samples] == ["a photo of a caf?"]
    assert not left
    assert source.fingerprint() == open_source(f"imagefolder:{tmp_path}").fingerprint()


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "nul\0.png", "", "."])
def test_a_row_without_a_files_name_is_left_out_and_counted(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, "a.png", jsonl=rows_of((name, "odd"), ("a.png", "x"), ("C:\\images\\a.png", "y")))
    source = open_source(f"imagefolder:{tmp_path}")
    samples, left = everything(source)
    assert [s.caption for s in samples] == ["x"]
    noted = sum("1 lines left out: file_name is no file's name (line 1 is the first)" in n for n in source.notes())
    assert noted + sum(left.values()) == 2  # a path on another machine is a missing file


def test_rows_and_images_that_have_no_other_half_are_said(tmp_path: Path) -> None:
    lines = rows_of(("a.png", "one"), ("a.png", "three"), ("b.png", ""), ("b.png", " "))
    folder_of(tmp_path, "a.png", "b.png", "more/c.png", jsonl=lines + '{"file_name": "b.png", "text": null}\n')
    source = open_source(f"imagefolder:{tmp_path}")
    assert [s.caption for s in everything(source)[0]] == ["one", "three"]
    assert source.notes()[:-2] == [
        "metadata.jsonl: 3 lines left out: no caption (line 3 is the first)",
        "1 images have several rows in metadata.jsonl: each row is a sample",
        "2 images have no row in metadata.jsonl: left out",
        "captions are those of metadata.jsonl, not the names of folders",
    ]


def test_of_two_metadata_files_one_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", jsonl=rows_of(AB[0]), csv=rows_of(("a.png", "another"), kind="csv"))
    source = open_source(f"imagefolder:{tmp_path}")
    assert captions(source) == {"a.png": "a red square"}
    assert "metadata.csv is not read: metadata.jsonl is" in source.notes()


def test_metadata_that_links_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = save(tmp_path / "secret.png")
    folder_of(tmp_path / "data", jsonl=rows_of(("link.png", "x")))
    (tmp_path / "data" / "link.png").symlink_to(secret)
    with pytest.raises(InputError, match="is a link out of its folder"):
        open_source(f"imagefolder:{tmp_path / 'data'}")


def test_text_files_beside_images_are_captions(tmp_path: Path) -> None:
    """Flat, as kohya's scripts and people have them; and in class folders, whose names serve the rest."""
    folder_of(tmp_path, "flat.png", "bare.png", "10_oak/a.png", "10_oak/b.png", "2_red elm/c.jpg")
    (tmp_path / "flat.txt").write_bytes("\ufeffa flat\r\nsquare\r\n".encode())
    (tmp_path / "10_oak" / "a.txt").write_text("an oak, old")
    (tmp_path / "10_oak" / "b.txt").write_text(" \n")
    source = open_source(f"imagefolder:{tmp_path}")
    assert captions(source) == {
        "flat.png": "a flat square", "10_oak/a.png": "an oak, old", "10_oak/b.png": "a photo of an oak",
        "2_red elm/c.jpg": "a photo of a red elm",
    }  # fmt: skip
    notes = " | ".join(source.notes())
    assert "kohya" in notes
    assert "1 images in" in notes
    assert "captions: 2 from text files, 2 from folder names" in notes


def test_splits_are_no_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/oak/a.png", "train/elm/b.png", "test/oak/c.png", "validation/elm/d.png")
    source = open_source(f"imagefolder:{tmp_path}")
    assert captions(source) == {"train/elm/b.png": "a photo of an elm", "train/oak/a.png": "a photo of an oak"}
    assert len(everything(source, part="test")[0]) == 2
    folder_of(tmp_path / "vehicles", "train/a.png", "bus/b.png")
    assert captions(open_source(f"imagefolder:{tmp_path / 'vehicles'}"))["train/a.png"] == "a photo of a train"
    folder_of(tmp_path / "bare", "train/a.png")
    with pytest.raises(InputError, match="a text file beside each image, or one folder a class"):
        open_source(f"imagefolder:{tmp_path / 'bare'}")


def test_the_first_frame_of_an_animation_is_taken_and_said(tmp_path: Path) -> None:
    red, blue = plain((255, 0, 0), (64, 64)), plain((0, 0, 255), (64, 64))
    for name in ("a.gif", "b.webp", "c.tif"):
        save(tmp_path / "k" / name, red, save_all=True, append_images=[blue])
    save(tmp_path / "k" / "still.gif", red)
    source = open_source(f"imagefolder:{tmp_path}")
    assert "3 animated images: the first frame of each is taken" in source.notes()
    for sample in everything(source)[0]:
        np.testing.assert_allclose(sample.image.mean((0, 1)), [255, 0, 0], atol=6)
