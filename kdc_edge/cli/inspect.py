"""kdc-edge verify, info, formats: inspect bundles and checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from kdc_edge.cli.options import Json
from kdc_edge.cli.project import all_bundles, open_folder
from kdc_edge.text import visible

MAX_FACT_CHARS = 1000


def verify(
    bundles: Annotated[list[Path] | None, Argument(help="Default: all in bundles/.")] = None,
) -> None:
    """Check every file of a bundle against its hash."""
    from kdc_edge.bundle import Bundle
    from kdc_edge.hub import local

    for path in bundles or all_bundles():
        typer.echo(f"{visible(str(path))}: {Bundle.open(local(path)).verify()} files unchanged")


def info(
    folder: Annotated[Path, Argument(help="A bundle, a checkpoint, or a .safetensors file.")],
    as_json: Json = False,
) -> None:
    """Describe a bundle or a checkpoint."""
    from kdc_edge.bundle import Bundle, kind_of
    from kdc_edge.diffusers_folder import read_model
    from kdc_edge.hub import local
    from kdc_edge.text import megabytes, printable

    folder = open_folder(local(folder))
    if kind_of(folder) == "checkpoint":
        model = read_model(folder)
        facts = {"kind": "checkpoint", **model.model_dump(exclude={"scheduler"})}
    else:
        bundle = Bundle.open(folder)
        manifest = bundle.manifest
        if as_json:
            typer.echo(json.dumps(manifest.model_dump(mode="json"), indent=2))
            return
        model = manifest.model
        facts = {"kind": f"bundle {manifest.name}", **model.model_dump(exclude={"scheduler"})}
        for part, component in manifest.components.items():
            inputs = ", ".join(f"{n} {t.dtype}{t.shape}" for n, t in component.inputs.items())
            kept = f", kept in {component.precision}" if component.precision else ""
            facts[part] = f"{component.class_name or 'network'} of {inputs}{kept}"
        facts["size"] = megabytes(bundle.size_bytes)
        for check in manifest.parity.checks if manifest.parity else ():
            facts[f"parity {check.what}"] = check.text
        if manifest.parity:
            facts["compared with"] = manifest.parity.reference
        facts["proved by"] = manifest.parity.conditions if manifest.parity else "no proof: --no-verify was given"
        if manifest.provenance.training:
            facts["training"] = manifest.provenance.training
        facts["made by"] = manifest.provenance.command
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        typer.echo(f"{printable(name.replace('_', ' '), 40):>20}  {printable(str(value), MAX_FACT_CHARS)}")


def formats(as_json: Json = False) -> None:
    """List the export formats; --json adds the PSNR thresholds of the proof."""
    from kdc_edge.formats import FORMATS

    if as_json:
        typer.echo(json.dumps([asdict(f) for f in FORMATS], indent=2))
        return
    for f in FORMATS:
        typer.echo(
            f"--target {f.target} --precision {f.precision}: {f.description}; {f.bytes_per_weight:g} bytes per weight"
        )
