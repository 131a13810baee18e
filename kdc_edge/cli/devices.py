"""kdc-edge devices: this machine, its engines and their devices, and how to install missing ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from kdc_edge.cli.options import Json

if TYPE_CHECKING:
    from kdc_edge.hardware import Accelerator, Machine


def devices(as_json: Json = False) -> None:
    """Show the processor, memory, engines and devices of this machine, and how to install missing ones."""
    from kdc_edge.hardware import find_accelerators, this_machine

    machine, engines = this_machine(), find_engines()
    lacking = missing(engines, find_accelerators())
    if as_json:
        typer.echo(json.dumps({**asdict(machine), "engines": engines, "missing": lacking}, indent=2))
    else:
        typer.echo("\n".join(describe(machine, engines, lacking)))


def find_engines() -> list[dict[str, Any]]:
    """Each engine with its version and devices, or the reason why it cannot run here (`missing`)."""
    from kdc_edge.errors import InputError, MissingPackageError
    from kdc_edge.runtimes import ENGINES, get_runtime
    from kdc_edge.text import one_line

    found: list[dict[str, Any]] = []
    for name, engine in ENGINES.items():
        row: dict[str, Any] = {"engine": name, "reference": engine.reference}
        try:
            runtime = get_runtime(name)
            row |= {"version": runtime.version, "devices": [asdict(d) for d in runtime.devices()]}
        except MissingPackageError:
            row["missing"] = f"not installed: pip install 'kdc-edge[{engine.extra}]'"
        except InputError as error:  # of another system
            row["missing"] = str(error).removeprefix(f"{name} ")
        except Exception as error:  # a broken package must not hide the others
            row["missing"] = f"cannot be loaded ({one_line(error)}): pip install --force-reinstall {engine.package}"
        found.append(row)
    return found


def missing(engines: Sequence[dict[str, Any]], accelerators: Sequence[Accelerator]) -> list[str]:
    """Missing engines, and missing devices for hardware that is here, a line each with the command that installs it."""
    lines = [f"{row['engine']}: {row['missing']}" for row in engines if "missing" in row]
    there = {(row["engine"], d["name"].split(".")[0]) for row in engines for d in row.get("devices", ())}
    loaded = {row["engine"] for row in engines if "devices" in row}
    return lines + [
        f"{a.engine} {a.device}: the {a.name} here is not used: {a.hint}"
        for a in accelerators
        if a.engine in loaded and (a.engine, a.device) not in there
    ]


def describe(machine: Machine, engines: Sequence[dict[str, Any]], lacking: Sequence[str]) -> list[str]:
    """The same as text, a line each."""
    from kdc_edge.hardware import describe_feature
    from kdc_edge.text import gigabytes

    processor = machine.processor
    rows = [
        ("processor", f"{processor.name}, {processor.architecture}, {machine.cores or 'unknown'} cores"),
        ("features", "unknown: this system does not report them"),
        ("memory", f"{gigabytes(machine.memory_bytes)}, {gigabytes(machine.available_bytes)} available"),
        ("system", f"{machine.os}, Python {machine.python}"),
    ]
    if processor.features is not None:
        rows[1] = (
            "features",
            ", ".join(f"{n} ({describe_feature(n)})" for n in processor.features) or "none that engines use",
        )
        if processor.absent:
            rows.insert(2, ("absent", ", ".join(processor.absent)))
    lines = [f"{name:<10} {value}" for name, value in rows]
    for row in engines:
        if "devices" in row:
            listed = "; ".join(f"{d['name']} ({d['description']})" for d in row["devices"])
            proves = ", for proofs only, not measured" if row["reference"] else ""
            lines.append(f"engine     {row['engine']} {row['version']}: {listed}{proves}")
    return lines + [f"missing    {line}" for line in lacking]
