"""Small data sets in every layout that is read, and what a source gives of them."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from kdc_edge.train.data.images import LeftOut
from kdc_edge.train.data.source import Sample, Selection, Source, read_samples


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


def captions(source: Source) -> dict[str, str]:
    return {s.name: s.caption for s in everything(source)[0]}


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
