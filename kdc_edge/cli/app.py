"""The commands, put together."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from inspect import signature as signature_of
from pathlib import Path
from typing import Any

import typer

from kdc_edge.cli import (
    bench,
    devices,
    evaluate,
    export,
    fit,
    generate,
    init,
    inspect,
    push,
    quickstart,
    serve,
    train,
    train_decoder,
)

EXAMPLES = {  # at the end of a command's help
    "train": [
        "kdc-edge train --teacher sd15 --student kdc-482m --task roses=imagefolder:roses --task fish=imagefolder:fish"
    ],
    "export": ["kdc-edge export -t openvino -p int8", "kdc-edge export -t coreml --with safety_checker --swift"],
    "generate": [
        'kdc-edge generate "a red flower with five petals" -n 4 -o images',
        'kdc-edge generate "a blue flower" --image flower.png --strength 0.6',
    ],
    "bench": ["kdc-edge bench bundles/onnx-int8 bundles/openvino-int8 --format html --out bench.html"],
}


def _examples(command: str) -> str | None:
    return "\n\n".join(["Examples:", *EXAMPLES[command]]) if command in EXAMPLES else None


app = typer.Typer(
    name="kdc-edge",
    help="Distil a Stable Diffusion student, export it with proof, run it on the device without PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _at_home(value: Any) -> Any:
    """`~` in a path as the home folder, also where no shell put it in: in kdc-edge.toml, and behind `--out=`."""
    if isinstance(value, list | tuple):
        return type(value)(map(_at_home, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value  # noqa: PTH111 (no home: as it is)


def _add(name: str, command: Callable[..., Any]) -> None:
    @functools.wraps(command)
    def run(**values: Any) -> Any:
        return command(**{key: _at_home(value) for key, value in values.items()})

    # Evaluated once: typer asks for the annotations three times, at every start.
    signature = signature_of(command, eval_str=True)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    app.command(name, epilog=_examples(name))(run)


_add("quickstart", quickstart.quickstart)
_add("train", train.train)
_add("train-decoder", train_decoder.train_decoder)
_add("init", init.init)
_add("export", export.export)
_add("generate", generate.generate)
_add("serve", serve.serve)
_add("bench", bench.bench)
_add("fit", fit.fit)
_add("eval", evaluate.evaluate)
_add("verify", inspect.verify)
_add("info", inspect.info)
_add("push", push.push)
_add("devices", devices.devices)
_add("formats", inspect.formats)


def _version(asked: bool) -> None:
    if asked:
        from kdc_edge.version import __version__

        typer.echo(f"kdc-edge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show a failure's traceback; with any command, at any place."),
) -> None:
    del version, debug  # main takes --debug out
