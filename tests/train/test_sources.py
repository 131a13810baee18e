"""Data in the layouts that people have, wrong files among them: each is handled or named, and all of them train."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
import threading
import zlib
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from kdc_edge.errors import InputError
from kdc_edge.train import processes
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.flower_names import FLOWER_NAMES
from kdc_edge.train.data.images import LeftOut, read_image
from kdc_edge.train.data.source import Sample, Selection, Source, fill, read_samples
from kdc_edge.train.data.sources import SOURCES, open_source
from kdc_edge.train.data.tasks import parse_tasks
from kdc_edge.train.loop import Trainer


def plain(color: tuple[int, int, int], size: tuple[int, int] = (80, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or plain((200, 30, 30))).save(path, **options)
    return path


def everything(source: Source, start: int = 0, **options: object) -> tuple[list[Sample], Counter[str]]:
    """What is read from number `start` on, and how often each reason left something out."""
    pending = islice(source.pending(Selection(**({"size": 64} | options))), start, None)  # type: ignore[arg-type]
    items = list(read_samples(pending))
    return [i for i in items if isinstance(i, Sample)], Counter(i.reason for i in items if isinstance(i, LeftOut))


def class_folders(root: Path) -> Path:
    for name, color in (("red_rose", (200, 20, 20)), ("blue bell", (20, 20, 200))):
        for i in range(4):
            save(root / name / f"{i}.jpg", plain(color))
    (root / "empty").mkdir()
    (root / "red_rose" / "notes.txt").write_text("not an image")
    (root / "red_rose" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    whole = save(root / "red_rose" / "cut.png", Image.effect_noise((64, 64), 50)).read_bytes()
    (root / "red_rose" / "cut.png").write_bytes(whole[: len(whole) // 2])
    save(root / "blue bell" / "tiny.png", plain((0, 0, 0), (8, 8)))
    (root / "blue bell" / "weights.pkl").write_bytes(pickle.dumps([1]))
    return root


def flowers(root: Path) -> Path:
    """Oxford's layout: twelve images, four of them the test part; number 3 is missing."""
    for i in range(1, 13):
        if i != 3:
            save(root / "jpg" / f"image_{i:05d}.jpg", plain((i * 20, 60, 90)))
    labels = np.array([[1, 77, 102, *[5] * 9]], dtype=np.uint8)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels})
    parts = {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6, 7, 8]], "tstid": [[9, 10, 11, 12]]}
    scipy.io.savemat(root / "setid.mat", parts)
    return root


def butterflies(root: Path) -> Path:
    rows = [["class id", "filepaths", "labels", "data set"]]
    for part, count in (("train", 4), ("valid", 1), ("test", 2)):
        for number, species in enumerate(("ADONIS", "RED POSTMAN")):
            for i in range(count):
                save(root / part / species / f"{i}.jpg")
                rows.append([str(number), f"{part}/{species}/{i}.jpg", species, part])
    rows[1][2] = "ADONIS BLUE"
    with (root / "butterflies and moths.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def metadata_folder(root: Path) -> Path:
    lines = []
    for i in range(6):
        save(root / "images" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"images/{i}.png", "text": f"image   number {i}\n"}))
    lines[2:2] = ["no json", "[1]", "", json.dumps({"file_name": "images/none.png", "text": "gone"})]
    lines.append(json.dumps({"file_name": 5, "text": "x"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def tars(root: Path) -> str:
    root.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(root / f"part-{number}.tar", "w") as tar:
            for i in range(3):
                content = io.BytesIO()
                plain((90, 20 * i, 90)).save(content, "JPEG")
                broken = number == 1 and i == 2
                for name, data in (("jpg", b"nothing" if broken else content.getvalue()), ("txt", b"a violet square")):
                    info = tarfile.TarInfo(f"{number}{i}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{root}/part-*.tar"


def parquet(root: Path) -> str:
    import datasets

    rows: dict[str, list[object]] = {
        "image": [plain((20 * i, 90, 20)) for i in range(6)],
        "label": [0, 1, 0, 1, 0, 1],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["oak", "red_elm"])})
    root.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "train-00000-of-00001.parquet")
    return str(root)


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


def captions(source: Source) -> dict[str, str]:
    return {s.name: s.caption for s in everything(source)[0]}


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


def test_oxford_flowers_have_their_official_names_and_parts(tmp_path: Path) -> None:
    source = open_source(f"oxford-flowers:{flowers(tmp_path)}")
    samples, left = everything(source)
    assert [s.name for s in samples] == [f"jpg/image_{i:05d}.jpg" for i in (1, 2, 4, 5, 6, 7, 8)]
    assert left == {"missing": 1}
    assert samples[0].caption == "a photo of a pink primrose, a type of flower"
    assert samples[1].caption == "a photo of a passion flower, a type of flower"
    assert len(everything(source, part="test")[0]) == 4


def test_the_flowers_names_are_torchvisions() -> None:
    from torchvision.datasets import Flowers102

    theirs = [name.lower().rstrip("?") for name in Flowers102.classes]
    assert len(FLOWER_NAMES) == 102
    different = {a: b for a, b in zip(FLOWER_NAMES, theirs, strict=True) if a != b}
    assert different == {}


def test_labels_beyond_the_102_flowers_are_refused(tmp_path: Path) -> None:
    flowers(tmp_path)
    scipy.io.savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[103]])})
    with pytest.raises(InputError, match="has the label 103"):
        open_source(f"oxford-flowers:{tmp_path}")


def test_butterflies_are_named_by_the_csv_and_tested_on_the_rest(tmp_path: Path) -> None:
    source = open_source(f"butterflies:{butterflies(tmp_path)}")
    captions = Counter(s.caption for s in everything(source)[0])
    assert captions["a photo of an adonis blue, a type of butterfly"] == 1
    assert captions["a photo of a red postman, a type of butterfly"] == 4
    assert len(everything(source, part="test")[0]) == 6


def test_tar_files_are_streamed_and_a_pass_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source = open_source(f"webdataset:{tars(tmp_path / 'tars')}")
    samples, left = everything(source)
    assert [s.caption for s in samples] == ["a violet square"] * 5
    assert left == {"cannot be read as an image": 1}
    rest, _ = everything(source, start=3)
    assert [s.name for s in rest] == [s.name for s in samples[3:]]


def test_a_data_set_in_parquet_has_its_class_names(tmp_path: Path) -> None:
    source = open_source(f"hf:{parquet(tmp_path / 'trees')}", caption="a photo of a {name}")
    samples, _ = everything(source, samples=3)
    assert len(samples) == 3
    assert {s.caption for s in samples} == {"a photo of an oak", "a photo of a red elm"}
    with pytest.raises(InputError, match="has no split 'night': choose from train"):
        open_source(f"hf:{tmp_path / 'trees'}:night")


def test_a_data_set_without_captions_names_its_columns(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [plain((0, 0, 0))], "weight": [1.0]}
    features = datasets.Features({"image": datasets.Image(), "weight": datasets.Value("float32")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="has the columns image, weight: none is a caption"):
        open_source(f"hf:{tmp_path}")


def test_oddities_are_handled(tmp_path: Path) -> None:
    """Rotated by EXIF, four inks, sixteen bits, a palette with a transparent colour, grey."""
    half = Image.new("RGB", (64, 64), (255, 0, 0))
    half.paste((0, 0, 255), (0, 0, 64, 32))  # blue above red
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    found = read_image(save(tmp_path / "turned.png", half, exif=exif), size=64)
    assert found[10, 10].tolist() == [255, 0, 0]

    assert (
        abs(
            read_image(save(tmp_path / "inks.jpg", half.convert("CMYK")), size=64)[50, 5].astype(int) - [255, 0, 0]
        ).max()
        < 40
    )
    deep = Image.fromarray(np.full((64, 64), 32896, np.uint16))
    assert np.unique(read_image(save(tmp_path / "deep.png", deep), size=64)).tolist() == [128]
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert read_image(save(tmp_path / "clear.png", clear), size=64).min() == 255
    assert read_image(save(tmp_path / "palette.gif", half.convert("P")), size=64)[50, 5].tolist() == [255, 0, 0]
    assert read_image(save(tmp_path / "grey.png", half.convert("L")), size=64).shape == (64, 64, 3)


def test_decompression_bombs_are_left_out(tmp_path: Path) -> None:
    """A few kilobytes of PNG that say they are 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (40_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(LeftOut) as caught:
        read_image(tmp_path / "bomb.png", size=64)
    assert caught.value.reason == "more than 100 million pixels"


def test_reading_is_repeatable_seeded_and_goes_on_from_any_entry(tmp_path: Path) -> None:
    for text in (f"imagefolder:{class_folders(tmp_path)}", "garden:fish", "garden:flowers+fish"):
        source = open_source(text)
        names = [[s.name for s in everything(source, samples=6, seed=3)[0]] for _ in range(2)]
        assert names[0] == names[1]
        rest = [s.name for s in everything(source, samples=6, seed=3, start=4)[0]]
        assert rest == names[0][-len(rest) :]


def test_samples_are_read_ahead_by_several_threads_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 2)
    both, read = threading.Barrier(2), list[int]()

    def pending(number: int) -> Sample:
        both.wait(timeout=60)  # for another one that is read at the same time
        read.append(number)
        if number == 3:
            raise LeftOut("3", "no image")
        return Sample(str(number), np.zeros((1, 1, 3), np.uint8), "")

    items = read_samples(partial(pending, number) for number in range(1000))
    assert [next(items).name for _ in range(6)] == ["0", "1", "2", "3", "4", "5"]
    items.close()  # type: ignore[attr-defined]
    assert len(read) <= 12  # and no more than was ahead


@pytest.mark.parametrize(("here", "most"), [("1", 4), ("2", 2), ("8", 1)])
def test_processes_on_one_machine_divide_its_cores(monkeypatch: pytest.MonkeyPatch, here: str, most: int) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    all_of_them, threads = threading.Barrier(most), set[int]()

    def pending() -> Sample:
        threads.add(threading.get_ident())
        all_of_them.wait(timeout=60)
        return Sample("", np.zeros((1, 1, 3), np.uint8), "")

    assert len(list(read_samples([pending] * 4 * most))) == 4 * most
    assert len(threads) == most


@pytest.mark.parametrize(
    ("text", "caption", "words"),
    [
        ("imagefolder:nowhere", None, "is no folder"),
        ("imagefolder:", None, "names nothing"),
        ("imagefolder:.", "a photo", "has no {name}"),
        ("garden:fish", "a {name}", "captions of their own"),
        ("oxford-flowers:.", None, "imagelabels.mat is missing"),
        ("butterflies:.", None, "holds no images to train on"),
        ("webdataset:no-*.tar", None, "matches no file"),
        ("ftp:x", None, "choose from garden, imagefolder"),
    ],
)
def test_sources_that_cannot_be_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, caption: str | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words.replace("{", r"\{")):
        open_source(text, caption=caption)


def test_a_changed_image_changes_the_fingerprint(tmp_path: Path) -> None:
    before = open_source(f"imagefolder:{class_folders(tmp_path)}").fingerprint()
    assert open_source(f"imagefolder:{tmp_path}").fingerprint() == before
    save(tmp_path / "red_rose" / "0.jpg", plain((1, 2, 3), (90, 90)))
    assert open_source(f"imagefolder:{tmp_path}").fingerprint() != before


def test_captions_by_task_and_for_all() -> None:
    tasks = parse_tasks(["a=garden:fish", "b=garden:flowers"])
    assert [t.caption for t in tasks] == [None, None]
    with pytest.raises(InputError, match="captions of their own"):
        parse_tasks(["a=garden:fish", "b=garden:flowers"], ["b=a {name}"])


def test_every_layout_trains_a_few_steps(tmp_path: Path) -> None:
    """Two each; quality is the held-out loss where no judge reads the images and no weight file is here."""
    sources = (
        f"imagefolder:{class_folders(tmp_path / 'folders')}",
        f"oxford-flowers:{flowers(tmp_path / 'flowers')}",
        f"butterflies:{butterflies(tmp_path / 'butterflies')}",
        f"hf:{parquet(tmp_path / 'trees')}",
        f"webdataset:{tars(tmp_path / 'tars')}",
    )
    assert {s.split(":")[0] for s in sources} == SOURCES.keys() - {"garden"}
    tasks = parse_tasks([f"t{i}={source}" for i, source in enumerate(sources)])
    config = TrainConfig(
        teacher=GARDEN_TEACHER, student="garden-student", tasks=tasks, steps=1, batch_size=4, replay=4,
        eval_images=2, eval_steps=2, log_with="none",
    )  # fmt: skip
    said: list[str] = []
    trainer = Trainer(config, tmp_path / "run", say=said.append)
    for task in tasks:
        latents = trainer.teacher.latents(task)
        for _ in range(2):
            assert trainer._step(task, latents).losses["total"] > 0
    assert any("3 of 11 images left out: 2 cannot be read as an image, 1 smaller than" in line for line in said)
    score = trainer.evaluate(tasks[1:2])[tasks[1].name]
    assert (score.metric, score.quality) == ("-loss", -score.values["loss"])
    assert score.values["loss"] > 0


def test_a_source_without_a_test_part_has_a_tenth_of_it_set_aside(tmp_path: Path) -> None:
    """Seeded, said, of 20 images or more; training does not see it."""
    for i in range(20):
        save(tmp_path / "photos" / "rose" / f"{i:02d}.png", plain((i, 0, 0)))
    source = open_source(f"imagefolder:{tmp_path / 'photos'}")
    train, test = ({s.name for s in everything(source, part=part)[0]} for part in ("train", "test"))
    assert (len(train), len(test), train & test) == (18, 2, set())
    assert "no test part: 2 of 20 images are set aside, to evaluate on" in source.notes()
    (tmp_path / "photos" / "rose" / "00.png").unlink()
    few = open_source(f"imagefolder:{tmp_path / 'photos'}")
    assert not few.has_test_part
    assert len(everything(few)[0]) == 19


def test_samples_of_a_stream_are_drawn_over_the_whole(tmp_path: Path) -> None:
    """A split is often sorted by class; a pass goes on where it stopped."""
    with tarfile.open(tmp_path / "sorted.tar", "w") as tar:
        for i in range(30):
            image = save(tmp_path / f"{i:02d}.png", plain((i, 0, 0)))
            text = tmp_path / f"{i:02d}.txt"
            text.write_text(f"class {i // 10}")
            tar.add(image, image.name)
            tar.add(text, text.name)
    source = open_source(f"webdataset:{tmp_path / 'sorted.tar'}")
    drawn, _ = everything(source, samples=9)
    assert {s.caption for s in drawn} == {"class 0", "class 1", "class 2"}
    assert [s.name for s in everything(source, samples=9, start=4)[0]] == [s.name for s in drawn[4:]]
    assert {s.name for s in everything(source, samples=9, seed=1)[0]} != {s.name for s in drawn}
    train, test = ({s.name for s in everything(source, part=part)[0]} for part in ("train", "test"))
    assert (len(train), len(test), train & test) == (27, 3, set())
    assert source.notes() == ["no test part: 3 of 30 rows are set aside, to evaluate on"]


@pytest.mark.parametrize(
    ("template", "name", "caption"),
    [
        ("a photo of a {name}", "orchid", "a photo of an orchid"),
        ("A {name}, a flower", "English rose", "An English rose, a flower"),
        ("a {name}", "unicorn", "a unicorn"),
        ("a {name}", "rose", "a rose"),
        ("an old {name}", "oak", "an old oak"),
        ("the extra{name}", "oak", "the extraoak"),
    ],
)
def test_captions_have_the_article_that_fits(template: str, name: str, caption: str) -> None:
    assert fill(template, "", name) == caption


def test_several_templates_are_spread_over_the_images_of_a_task(tmp_path: Path) -> None:
    for i in range(16):
        save(tmp_path / "photos" / "rose" / f"{i}.png")
    (task,) = parse_tasks([f"a=imagefolder:{tmp_path / 'photos'}"], ["a=a {name}", "a=one {name}"])
    assert task.caption == ("a {name}", "one {name}")
    found = Counter(s.caption for s in everything(task.open())[0])
    assert set(found) == {"a rose", "one rose"}
    assert found == Counter(s.caption for s in everything(task.open())[0])
    with pytest.raises(InputError, match=r"'plain' has no \{name\}"):
        parse_tasks([f"a=imagefolder:{tmp_path / 'photos'}"], ["a {name}", "plain"])


def test_a_random_crop_is_one_square_of_an_image_and_stays_where_it_is(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 250, dtype=np.uint8), (50, 1)))
    for i in range(6):
        save(tmp_path / "photos" / "rose" / f"{i}.png", ramp)
    source = open_source(f"imagefolder:{tmp_path / 'photos'}")
    found = [[s.image[0, 0, 0] for s in everything(source, crop=crop)[0]] for crop in ("center", "random", "random")]
    assert set(found[0]) == {found[0][0]}
    assert len(set(found[1])) > 3
    assert found[1] == found[2] != [s.image[0, 0, 0] for s in everything(source, crop="random", seed=1)[0]]


def test_tasks_by_class_range_of_one_source(tmp_path: Path) -> None:
    """Flowers are numbered from 0 in the official order; folders by their names."""
    root = flowers(tmp_path / "flowers")
    assert [s.name for s in everything(open_source(f"oxford-flowers:{root}#0-0"))[0]] == ["jpg/image_00001.jpg"]
    rest = open_source(f"oxford-flowers:{root}#1-101")
    assert len(everything(rest)[0]) == 6
    assert rest.has_test_part
    assert rest.caption_classes()["a photo of a passion flower, a type of flower"] == "passion flower"
    whole, part = (open_source(f"oxford-flowers:{root}{ending}") for ending in ("", "#0-101"))
    assert everything(whole)[0][3].caption == everything(part)[0][3].caption
    assert rest.fingerprint() != whole.fingerprint()
    assert "classes 1 to 101 of 102: hard-leaved pocket orchid, " in " ".join(rest.notes())
    folders = class_folders(tmp_path / "photos#0-0")  # a folder's own name
    assert len(everything(open_source(f"imagefolder:{folders}"))[0]) == 8
    assert set(captions(open_source(f"imagefolder:{folders}#1-1")).values()) == {"a photo of a red rose"}
    for what, words in (
        (f"oxford-flowers:{root}#100-102", "has the classes 0 to 101: #100-102 cannot be taken"),
        (f"oxford-flowers:{root}#1-3", "has no images to train on in the classes 1 to 3"),
        ("garden:flowers#0-1", "which garden: does not have"),
        (f"imagefolder:{metadata_folder(tmp_path / 'rows')}#0-1", "has no classes: #0-1 cannot be taken"),
    ):
        with pytest.raises(InputError, match=words):
            open_source(what)
