"""kdc-edge generate: several images in one process, and names that are never taken twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdc_edge.cli import generate
from kdc_edge.cli.generate import free_name, prompts_and_seeds
from kdc_edge.image import read_parameters
from kdc_edge.prompts import read_prompts
from tests.cli.test_commands import complaint, run


def test_names_keep_letters_of_every_script_and_count_up(tmp_path: Path) -> None:
    words = {
        "一朵红花": "一朵红花",
        "蓝色的蝴蝶": "蓝色的蝴蝶",
        "लाल फूल": "लाल-फूल",
        "Красный цветок!": "красный-цветок",
    }
    prompts = [*words, "/../..", "🌸", "a" * 500, "花" * 500]
    names = [free_name(tmp_path, prompt, 2**64 - 1).name for prompt in prompts]
    assert names[:4] == [f"{stem}-{2**64 - 1}.png" for stem in words.values()]
    assert names[4:6] == [f"image-{2**64 - 1}.png"] * 2
    assert all(len(name.encode()) < 200 for name in names)
    for expected in ("a-red-flower-1.png", "a-red-flower-1-2.png", "a-red-flower-1-3.png"):
        path = free_name(tmp_path, "a red flower", 1)
        assert path == tmp_path / expected
        path.touch()


def test_one_seed_counts_up_and_several_hold_for_each_prompt() -> None:
    assert list(prompts_and_seeds(["a", "b"], None, [5])) == [("a", 5), ("b", 6)]
    assert list(prompts_and_seeds(["a", "b"], 2, [5])) == [("a", 5), ("a", 6), ("b", 7), ("b", 8)]
    assert list(prompts_and_seeds(["a", "b"], None, [5, 1])) == [("a", 5), ("a", 1), ("b", 5), ("b", 1)]
    assert list(prompts_and_seeds(["a"], 2, [5, 1])) == [("a", 5), ("a", 1)]


def test_several_images_are_those_of_their_seeds(bundle_fp32: Path, tmp_path: Path) -> None:
    options = ("--bundle", bundle_fp32, "--steps", 2)
    (tmp_path / "prompts.txt").write_text("一朵红花\n\na blue fish\n", "utf-8")
    done = run("generate", "--prompts", "prompts.txt", "--images", 2, "--seed", 3, *options, cwd=tmp_path)
    paths = done.stdout.splitlines()
    assert paths == ["一朵红花-3.png", "一朵红花-4.png", "a-blue-fish-5.png", "a-blue-fish-6.png"]
    assert "8/8 image 4 of 4" in done.stderr  # progress over the whole
    assert read_parameters(tmp_path / paths[2])["Seed"] == "5"
    again = run("generate", "a blue fish", "--seed", "5,6", *options, cwd=tmp_path).stdout.splitlines()
    assert again == ["a-blue-fish-5-2.png", "a-blue-fish-6-2.png"]
    alone = run("generate", "a blue fish", "--seed", 6, "--out", "new/folder", *options, cwd=tmp_path).stdout.strip()
    assert alone == "new/folder/a-blue-fish-6.png"
    images = [np.asarray(Image.open(tmp_path / path), int) for path in (paths[3], again[1], alone)]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - images[2]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--images", 0], "--images 0 is too few"),
        (["x", "--images", 10**9], "--images 1000000000 is too many"),
        (["x", "--images", 2, "--out", "x.png"], "is one file for 2 images: name a folder"),
        (["x", "--images", 3, "--seed", "1,2"], "--images 3 and 2 seeds contradict each other"),
        (["x", "--seed", "1,,2"], "--seed '1,,2' is not understood"),
        (["x", "--seed", "5,-1"], "the seed is -1"),
        (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_what_is_refused(bundle: Path, tmp_path: Path, arguments: list[object], words: str) -> None:
    assert words in complaint("generate", *arguments, "--bundle", bundle, cwd=tmp_path)


def test_a_prompts_file_from_windows_holds_the_prompts_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red flower\r\n\r\n  \r\na blue fish\r\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["a red flower", "a blue fish"]
    (tmp_path / "prompts.txt").write_text("a red flower", "utf-16")
    assert "save it as UTF-8" in complaint("generate", "--prompts", "prompts.txt", cwd=tmp_path)


def test_a_place_that_cannot_be_written_is_refused_before_an_image_is_made(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for out in ("folder.png", "/dev/null", "/dev/null/x.png", "/proc/x.png", "x" * 300 + ".png", "x" * 251 + ".png"):
        done = run("generate", "x", "--out", out, "--bundle", bundle, cwd=tmp_path, code=1)
        assert "cannot be written" in done.stderr
        assert len(done.stderr.splitlines()) == 1  # no step was taken
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_folder_that_is_there_may_have_a_point_in_its_name(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "images-0.2").mkdir()
    done = run("generate", "x", "--steps", 1, "--out", "images-0.2", "--bundle", bundle, cwd=tmp_path)
    assert done.stdout == "images-0.2/x-0.png\n"


def test_a_name_that_another_process_takes_meanwhile_is_left_to_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x-0.png").write_bytes(b"of another process")
    answers = iter([tmp_path / "x-0.png"])  # free when it was looked at
    monkeypatch.setattr(generate, "free_name", lambda *asked: next(answers, None) or free_name(*asked))
    done = run("generate", "x", "--steps", 1, "--bundle", bundle, cwd=tmp_path)
    assert done.stdout == "x-0-2.png\n"
    assert (tmp_path / "x-0.png").read_bytes() == b"of another process"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0-2.png", "x-0.png"]


def test_a_tilde_is_the_home_folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "b").symlink_to(bundle)
    (work / "kdc-edge.toml").write_text('[generate]\nbundle = "~/b"\n')
    run("generate", "x", "--steps", 1, "--out=~/x.png", cwd=work)
    assert (home / "x.png").is_file()
    assert [path.name for path in work.iterdir()] == ["kdc-edge.toml"]


def test_closed_streams_lose_their_lines_alone(bundle: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kdc_edge",
        "generate",
        "x",
        "--steps",
        "1",
        "--bundle",
        str(bundle),
        "-o",
        "x.png",
    ]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], cwd=tmp_path, check=True)
    Image.open(tmp_path / "x.png").load()


def test_a_prompt_or_a_file_of_them(tmp_path: Path) -> None:
    assert "give a prompt" in run("generate", cwd=tmp_path, code=2).stderr
    assert "put quotes around the prompt" in run("generate", "a", "red", "flower", cwd=tmp_path, code=2).stderr
    assert "give a prompt" in run("generate", "x", "--prompts", "y.txt", cwd=tmp_path, code=2).stderr
