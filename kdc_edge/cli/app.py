"""The commands, put together."""

from __future__ import annotations

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
    "train": ["kdc-edge train --student kdc-482m --teacher ./sd15 --task roses=./roses --task tulips=./tulips"],
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
app.command("quickstart")(quickstart.quickstart)
app.command("train", epilog=_examples("train"))(train.train)
app.command("train-decoder")(train_decoder.train_decoder)
app.command("init")(init.init)
app.command("export", epilog=_examples("export"))(export.export)
app.command("generate", epilog=_examples("generate"))(generate.generate)
app.command("serve")(serve.serve)
app.command("bench", epilog=_examples("bench"))(bench.bench)
app.command("fit")(fit.fit)
app.command("eval")(evaluate.evaluate)
app.command("verify")(inspect.verify)
app.command("info")(inspect.info)
app.command("push")(push.push)
app.command("devices")(devices.devices)
app.command("formats")(inspect.formats)


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
