"""kdc-edge push: a bundle or a checkpoint to the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from kdc_edge.cli.project import Config, say


def push(
    folder: Annotated[Path, Argument(metavar="BUNDLE|CHECKPOINT", help="The folder.")],
    name: Annotated[str, Argument(metavar="OWNER/NAME", help="The repository; made where there is none.")],
    private: Annotated[bool, Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, Option(help="Branch, made where there is none; the main one by default.")] = None,
    licence: Annotated[
        str | None,
        Option("--licence", "--license", metavar="ID", help="Licence by the hub's name, such as apache-2.0."),
    ] = None,
    base_model: Annotated[
        str | None,
        Option(metavar="OWNER/NAME", help="The teacher on the hub; taken from the folder where it is known."),
    ] = None,
    measurements: Annotated[
        Path | None,
        Option("--bench", metavar="FILE.json", help="A report of kdc-edge bench --format json for the card."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the model card and the files; push nothing.")] = False,
    config: Config = None,
) -> None:
    """Push a bundle or a checkpoint to the Hugging Face hub, with a model card."""
    del config
    from kdc_edge import hub
    from kdc_edge.hub_card import make_card

    measured = _measurements(measurements, folder) if measurements else ""
    card = make_card(folder, name, licence=licence, base_model=base_model, measurements=measured)
    if dry_run:
        typer.echo(card)
        for file in hub.files_to_push(folder):
            typer.echo(file)
        return
    typer.echo(hub.push(folder, name, card=card, private=private, revision=revision))
    say(f"to use it: kdc-edge generate PROMPT --bundle {hub.PREFIX}{name}{f'@{revision}' if revision else ''}")


def _measurements(path: Path, folder: Path) -> str:
    """The rows of a report that measure this folder, as a table with its conditions. Raises InputError."""
    from kdc_edge.bench.record import read_report
    from kdc_edge.bench.tables import as_markdown
    from kdc_edge.bench.values import show
    from kdc_edge.bundle import Bundle, kind_of
    from kdc_edge.errors import InputError
    from kdc_edge.hub import label

    report = read_report(path)
    if kind_of(folder) == "checkpoint":
        same = [row for row in report.rows if row.target is None and row.name == label(folder)]
    else:
        made = Bundle.open(folder).manifest
        wanted = (made.target, made.precision, made.provenance.checkpoint_sha256)
        same = [row for row in report.rows if (row.target, row.precision, row.checkpoint_sha256) == wanted]
    if not same:
        measure = f"kdc-edge bench {shlex.quote(str(folder))} --format json"
        raise InputError(f"--bench {path} has no row of {folder}: measure it with {measure}")
    return as_markdown(show(same), report.environment)
