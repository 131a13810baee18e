"""The fuzzer: a few hundred inputs in every run, as many as KDC_EDGE_FUZZ says with `-m security`."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdc_edge.bench.record import read_report
from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import read_model
from kdc_edge.export.coreml.mixed import read_recipe
from kdc_edge.image import read_parameters, save_png
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.evaluator import Evaluator
from kdc_edge.runtimes.mil.program import read_program
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.data.images import LeftOut, read_image
from kdc_edge.train.runs.states import Position, load_state, save_state
from kdc_edge.train.strategies.buffer import ReplayBuffer
from tests.cli.test_commands import run
from tests.security.fuzz import NASTY, Fuzzer, Target, mutate_bytes, mutate_json
from tests.train.layouts import plain

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("KDC_EDGE_FUZZ_SEED", "16"))
COUNT = int(os.environ.get("KDC_EDGE_FUZZ", "10000"))
TOML = b'[bench]\nsteps = 20\nguidance = 7.5\nprompt = "a red flower"\n[train]\ntask = ["a=garden:fish"]\nlr = 1e-4\n'
RECIPE = b'{"bits": {"conv_in.weight": 4, "conv_out.weight": 8}, "size_bytes": 100, "psnr_db": 40.5}'


def head(data: bytes, rng: random.Random) -> bytes:
    return mutate_bytes(data, rng, head=3000)


class Wrong(Exception):
    """A command line that ended otherwise than with a line and 1 or 2."""


def typed(folder: Path, *arguments: object) -> Callable[[], None]:
    """A command whose work cannot begin: there is no such bundle. What it says is judged here."""

    def read() -> None:
        words = (folder / "options").read_bytes().decode("utf-8", "replace").replace("\0", " ").split("\n")
        done = run(*(arguments or words), cwd=folder, code=None)
        lines = done.stderr.splitlines()
        sound = done.returncode in (0, 1, 2) and all(line.isprintable() and len(line) <= 500 for line in lines)
        if not sound or "Traceback" in done.stderr or "please report it" in done.stderr:
            raise Wrong(f"{done.args}: {done.returncode}: {done.stderr}")

    return read


def options(_: bytes, rng: random.Random) -> bytes:
    """A command, options that it may have, and values that it cannot want, one a line."""
    command = rng.choice(("generate", "bench", "export", "info", "verify", "train --resume", "fit", "init")).split()
    names = (
        "--bundle", "--steps", "--guidance", "--seed", "--scheduler", "--width", "--device", "--engine", "--out",
        "--threads", "--target", "--precision", "--calibration-samples", "--max-size", "--preset", "--from", "--config",
        "--json", "-h", "--", "--guidance-interval", "--cache", "--static", "--unet-batch", "--task", "--teacher",
        "--student", "--version",
    )  # fmt: skip
    words = [*command, "nowhere"]
    for _ in range(rng.randint(0, 4)):
        words += [
            rng.choice(names),
            str(rng.choice((*NASTY, "nan", "-inf", "1e9", "unet=GPU", "0:1", "300MB"))).replace("\n", " "),
        ]
    return "\n".join(words).encode("utf-8", "replace")


def targets(folder: Path, bundle: Path) -> list[Target]:
    """Copies of sound files, and their readers."""
    own, checkpoint, state = folder / "bundle", folder / "checkpoint", folder / "run"
    shutil.copytree(bundle, own)
    shutil.copytree(GARDEN_TEACHER, checkpoint)
    save_state(state, Position(total=5), {"student/a": torch.zeros(3)}, ReplayBuffer(5, policy="balanced"), keep=2)
    files = {"kdc-edge.toml": TOML, "recipe.json": RECIPE, "options": b"info"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    shutil.copy(ROOT / "docs" / "benchmarks" / "482m.json", folder / "bench.json")
    save_png(folder / "made.png", np.asarray(plain((200, 30, 30))), {"prompt": "x", "Steps": 5})

    def checkpoint_json() -> None:
        NoiseSchedule.from_config(read_model(checkpoint).scheduler)
        Tokenizer.from_folder(checkpoint / "tokenizer")

    def network(name: str) -> Callable[[], object]:
        return lambda: open_pipeline(own).components[name]

    found = [
        Target("manifest", own / "kdc-edge.json", lambda: open_pipeline(own).check(Request("x")), mutate_json),
        *(
            Target(f"network {name}", own / name / "model.onnx", network(name), refused=True)
            for name in ("text_encoder", "unet", "vae_decoder")
        ),
        Target("vocabulary", own / "tokenizer" / "merges.txt", lambda: open_pipeline(own), refused=True),
        *(
            Target("checkpoint JSON", checkpoint / name, checkpoint_json, mutate_json)
            for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model_index.json",
                         "tokenizer/tokenizer_config.json", "tokenizer/vocab.json")
        ),
        Target("safetensors", checkpoint / "vae" / "diffusion_pytorch_model.safetensors", checkpoint_json, head),
        Target("recipe", folder / "recipe.json", lambda: read_recipe(folder / "recipe.json"), mutate_json),
        Target("bench JSON", folder / "bench.json", lambda: read_report(folder / "bench.json"), mutate_json),
        Target("TOML", folder / "kdc-edge.toml", typed(folder, "bench", "nowhere")),
        Target("options", folder / "options", typed(folder), options),
        Target("PNG parameters", folder / "made.png", lambda: read_parameters(folder / "made.png")),
        *(
            Target("run state", next((state / "state").iterdir()) / name, lambda: load_state(state), mutate)
            for name, mutate in (("state.json", mutate_json), ("tensors.safetensors", head),
                                 ("replay.safetensors", head))
        ),
    ]  # fmt: skip
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        path = folder / f"image.{kind.lower()}"
        plain((200, 30, 30)).save(path, kind)
        read = lambda path=path: read_image(path, size=64)  # noqa: E731 - a line in a table
        found.append(Target(f"image {kind}", path, read, allowed=(LeftOut,)))
    return found


def test_damaged_inputs_are_taken_or_refused_in_a_line(bundle: Path, tmp_path: Path) -> None:
    found = Fuzzer(targets(tmp_path, bundle), SEED).run(270)
    assert found["faults"] == []


@pytest.mark.security
def test_thousands_of_damaged_inputs(bundle: Path, coreml_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    from kdc_edge.export.targets import ExportRequest, export_checkpoint

    folder = tmp_path / "all"
    folder.mkdir()
    openvino = export_checkpoint(ExportRequest(checkpoint, tmp_path / "openvino", "openvino", "fp16", verify=False))
    found = targets(folder, bundle)
    for name in ("openvino_model.xml", "openvino_model.bin"):
        read = lambda: open_pipeline(openvino.root).components["unet"]  # noqa: E731
        found.append(Target(f"OpenVINO {name[-3:]}", openvino.root / "unet" / name, read, refused=True))
    apple = Path(shutil.copytree(coreml_bundle, tmp_path / "apple"))
    _, program = Bundle.open(apple).component("unet")
    assert program.as_posix().endswith(PROGRAM)
    loaded = lambda: open_pipeline(apple, engine="mil").components["unet"]  # noqa: E731
    found.append(Target("mlpackage", program, loaded, refused=True))
    found.append(Target("ML Program", program, lambda: Evaluator(read_program(program))))
    figures = Fuzzer(found, SEED).run(COUNT)
    print(figures)
    assert figures["faults"] == []


def test_the_fuzzer_finds_what_is_wrong(tmp_path: Path) -> None:
    """It sees an unforeseen error, a silent change and a line that is none."""
    path = tmp_path / "a"
    path.write_bytes(io.BytesIO(b"abc" * 100).getvalue())

    def fail() -> None:
        raise KeyError("x")

    assert len(Fuzzer([Target("a", path, fail)], 0).run(3)["faults"]) == 3
    assert Fuzzer([Target("a", path, path.read_bytes, refused=True)], 0).run(3)["faults"]
    assert path.read_bytes() == b"abc" * 100
