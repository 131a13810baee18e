"""Data sources of every other kind, and what all have in common: parts, tasks, captions, crops, threads."""

from __future__ import annotations

import tarfile
import threading
import zlib
from collections import Counter
from functools import partial
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
from kdc_edge.train.data.source import Sample, fill, read_samples
from kdc_edge.train.data.sources import SOURCES, open_source
from kdc_edge.train.data.tasks import parse_tasks
from kdc_edge.train.loop import Trainer
from tests.train.layouts import (
    butterflies,
    captions,
    class_folders,
    everything,
    flowers,
    metadata_folder,
    parquet,
    plain,
    save,
    tars,
)


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


def test_a_pattern_of_tar_files_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars(tmp_path / "tars")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(everything(open_source("webdataset:~/tars/part-*.tar"))[0]) == 5


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
    both.abort()  # nobody comes for the one that waits alone
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


def test_a_class_range_has_a_tenth_of_its_own_images_set_aside(tmp_path: Path) -> None:
    """Whatever else the source has, then or later; the counts that are said are the range's."""
    root = tmp_path / "photos"
    for name, first in (("aster", 0), ("bell", 20), ("clover", 40)):
        for i in range(first, first + 20):
            save(root / name / f"{i:02d}.png", plain((i, 0, 0)))

    def parts(classes: str) -> list[set[str]]:
        source = open_source(f"imagefolder:{root}#{classes}")
        assert "no test part: 2 of 20 images are set aside, to evaluate on" in source.notes()
        return [{s.name for s in everything(source, part=part)[0]} for part in ("train", "test")]

    found = [parts(classes) for classes in ("0-0", "1-1", "2-2")]
    assert [[len(part) for part in two] for two in found] == [[18, 2]] * 3
    assert [train & test for train, test in found] == [set()] * 3
    save(root / "daisy" / "60.png", plain((60, 0, 0)))
    assert parts("1-1") == found[1]


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
