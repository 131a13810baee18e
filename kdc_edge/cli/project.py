"""The project folder: `kdc-edge.toml` for settings, `runs/` for training, `bundles/` for artifacts.

Every flag has its key: `[train] steps = 500` is `kdc-edge train --steps 500`; a flag given by hand wins.
"""

from __future__ import annotations

import os
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdc_edge.errors import InputError, require
from kdc_edge.files import read_bounded
from kdc_edge.text import encodable, visible

if TYPE_CHECKING:
    from kdc_edge.checkpoints import Additions

SETTINGS = Path("kdc-edge.toml")
RUNS = Path("runs")
BUNDLES = Path("bundles")
LATEST = RUNS / "latest"
MAX_SETTINGS_BYTES = 2**20


def say(text: str) -> None:
    """Talk, as opposed to data: one line on stderr."""
    print(visible(text), file=sys.stderr, flush=True)


def _load_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Make the settings file's section the command's defaults; unknown keys are refused."""
    if (path is None and not SETTINGS.exists()) or path == Path(os.devnull):
        return None
    path = path or SETTINGS
    try:
        settings = tomllib.loads(read_bounded(path, MAX_SETTINGS_BYTES, InputError).decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give --config the name of a TOML file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no TOML file: {error}") from None
    commands = getattr(context.parent.command, "commands", {}) if context.parent else {}
    for name, section in settings.items():
        if name not in commands or not isinstance(section, dict):
            raise InputError(f"{path}: {name} is no section: use [train], [export], [generate], [bench], ...")
    section = {key.replace("-", "_"): value for key, value in settings.get(str(context.info_name), {}).items()}
    flags = {o.removeprefix("--").replace("-", "_"): p for p in context.command.params for o in p.opts}
    for key in section:
        if key not in flags or key == "config":
            raise InputError(f"{path}: [{context.info_name}] has no setting {key}: see kdc-edge {context.info_name} -h")
    context.default_map = {str(flags[key].name): _listed(flags[key], value) for key, value in section.items()}
    return path


def _listed(parameter: Any, value: object) -> object:
    """One value of a flag that may be repeated needs no brackets."""
    several = getattr(parameter, "multiple", False) or parameter.nargs == -1
    return [value] if several and not isinstance(value, list) else value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.toml", is_eager=True, callback=_load_settings,
        help=f"Settings; kdc-edge.toml in this folder when there is one. None: {os.devnull}.",
    ),
]  # fmt: skip


def need_training(purpose: str) -> None:
    """Raise MissingPackageError unless what `kdc-edge[train]` brings is here."""
    for package in ("torch", "diffusers", "transformers", "safetensors"):
        require(package, extra="train", purpose=purpose)


def need_export(purpose: str) -> None:
    """Raise MissingPackageError unless what `kdc-edge[export]` brings is here."""
    for package in ("torch", "diffusers", "transformers", "optimum", "onnx", "onnxscript", "onnxruntime"):
        require(package, extra="export", purpose=purpose)


def new_run() -> Path:
    """The next free place in runs/."""
    number = 1
    while (RUNS / f"{number:03d}").exists():
        number += 1
    return RUNS / f"{number:03d}"


def take_run() -> Path:
    """The next free place in runs/ as an empty folder: commands that start at once take different ones."""
    while True:
        with suppress(FileExistsError):
            (run := new_run()).mkdir(parents=True)
            return run


def give_back(run: Path) -> None:
    """Remove the folder of a run that came to nothing; nothing happens where it holds something."""
    with suppress(OSError):
        run.rmdir()
        run.parent.rmdir()


def point_latest(run: Path) -> None:
    """Let runs/latest name this run, when it lies in runs/."""
    if run.resolve().parent != RUNS.resolve():
        return
    link = RUNS / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(run.name)
    link.replace(LATEST)


def latest_checkpoint() -> Path:
    """The checkpoint of the latest run in this project."""
    checkpoint = LATEST / "checkpoint"
    if not checkpoint.is_dir():
        raise InputError("no finished run in runs/: name a checkpoint, or make one with kdc-edge train")
    return checkpoint


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in: RUN/checkpoint, RUN/checkpoints/TASK; None where there is none."""
    home = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return home if (home / "config.json").is_file() else None


def open_folder(folder: Path, additions: Additions | None = None) -> Path:
    """A bundle as it is; a checkpoint, or a single file, as a diffusers folder with what is put to it."""
    from kdc_edge.bundle import kind_of
    from kdc_edge.checkpoints import Additions, open_checkpoint
    from kdc_edge.checkpoints.assemble import is_single_file

    if kind_of(folder) == "checkpoint" or is_single_file(folder):
        return open_checkpoint(folder, additions or Additions(), say=say)
    if additions:
        raise InputError("a bundle is fixed: give --vae, --lora, --embedding and --prediction-type to kdc-edge export")
    return folder


def find_checkpoint(what: Path, task: str | None = None) -> Path:
    """A checkpoint's folder; of a run the final one, that after a task, or one written of its newest state."""
    if task is None and ((what / "model_index.json").is_file() or not (what / "config.json").is_file()):
        return what
    if (what.parent / "model_index.json").is_file():
        raise InputError(f"{what} is one network of a checkpoint: name the checkpoint's folder, {what.parent}")
    need_training("the checkpoint of a run")
    from kdc_edge.train.config import TrainConfig

    names = [known.name for known in TrainConfig.load(what).tasks]
    final, kept = what / "checkpoint", {name: what / "checkpoints" / name for name in names}
    kept[names[-1]] = final
    if task is not None:
        found = [name for name, folder in kept.items() if folder.is_dir()]
        if task not in found:
            raise InputError(f"{what} has no checkpoint of --task {task}: it has {', '.join(found) or 'none yet'}")
        return kept[task]
    if final.is_dir():
        return final
    from kdc_edge.train.runs.snapshot import write_snapshot

    folder = write_snapshot(what)
    say(f"{what} is not finished: taking its newest state, {folder}")
    return folder


def all_bundles() -> list[Path]:
    """Every bundle in bundles/, in order of name."""
    from kdc_edge.bundle import find_bundles

    found = find_bundles(BUNDLES)
    if not found:
        raise InputError("no bundles in bundles/: name one, or make one with kdc-edge export --target onnx")
    return found


def bundles_in(given: Path) -> list[Path]:
    """A bundle itself, or every bundle in a folder of them; what is neither is refused when it is opened."""
    from kdc_edge.bundle import find_bundles, kind_of
    from kdc_edge.hub import local

    given = local(given)
    return [given] if kind_of(given) else find_bundles(given) or [given]


def best_bundle() -> Path:
    """The bundle for this machine, and a line on which it is: the smallest whose images are as good as PyTorch's.

    Bundles whose engine is not installed are left out; reference engines, and bundles whose proof shows less than
    GOOD_PSNR_DB, or that have none, come last. Where bundles/ has none, the demonstration that ships.
    """
    import importlib.util

    from kdc_edge.bundle import DEMO_BUNDLE, Bundle, find_bundles
    from kdc_edge.formats import GOOD_PSNR_DB, find_format
    from kdc_edge.runtimes.base import preferred_engine

    found = find_bundles(BUNDLES)
    if not found:
        say(
            "no bundle in bundles/: taking the demonstration that ships with kdc-edge, which draws flowers, butterflies"
            " and fish of 64x64 pixels; kdc-edge export makes a bundle of your checkpoint"
        )
        return DEMO_BUNDLE
    ranked: list[tuple[bool, bool, int, Path]] = []
    for path in found:
        bundle = Bundle.open(path)
        engine = preferred_engine(find_format(bundle.manifest.target, bundle.manifest.precision))
        check = bundle.manifest.image_parity
        good = check is not None and check.reaches(GOOD_PSNR_DB)
        if importlib.util.find_spec(engine.package):
            ranked.append((engine.reference, not good, bundle.size_bytes, path))
    if not ranked:
        raise InputError("no bundle in bundles/ has its engine installed here: see kdc-edge devices")
    best = min(ranked)[-1]
    say(f"no bundle given: {best}, the smallest of good images that runs here")
    return best


def command_line() -> str:
    """The command as it was typed, for the record."""
    import shlex

    return encodable(shlex.join(["kdc-edge", *sys.argv[1:]]))
