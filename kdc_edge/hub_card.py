"""The model card of what is pushed to the hub: a YAML header that the hub reads, and what was measured.

text = make_card(Path("bundles/onnx-int8"), "someone/flowers", licence="apache-2.0")
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from kdc_edge.bundle import Bundle, kind_of
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import read_bounded
from kdc_edge.hub import CARD, HUB_ID, hub_id
from kdc_edge.manifest import Manifest
from kdc_edge.text import markdown_table, megabytes

HEADER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
BASE_MODEL = re.compile(r"^base_model: *[\"']?([^\"'\n]+)[\"']? *$", re.MULTILINE)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
MAX_CARD_BYTES = 2**20


def make_card(
    folder: Path, name: str, *, licence: str | None = None, base_model: str | None = None, measurements: str = ""
) -> str:
    """README.md of a bundle or a checkpoint for the repository `name`; `measurements` is a Markdown section's text.

    The licence is the bundle's own where it has one, the base model the hub id that the checkpoint came from, where
    that is known. Raises InputError for a licence or a base model that the hub would refuse.
    """
    if licence is not None and not LICENCE.fullmatch(licence):
        raise InputError(
            f"--licence {licence!r:.80} is no identifier of the hub: use apache-2.0, mit, other or the like"
        )
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise InputError(f"--base-model {base_model!r:.200} is no hub id: use OWNER/NAME")
    if kind_of(folder) == "checkpoint":
        read_model(folder)
        written = _own_card(folder)
        own_header = HEADER.match(written)
        found = BASE_MODEL.search(own_header[1]) if own_header else None
        base_model = base_model or (hub_id(found[1]) if found else None)
        body = HEADER.sub("", written, count=1).strip() or f"# {_title(name)}\n\nA checkpoint of Stable Diffusion."
        tags = ["stable-diffusion", "kdc-edge"]
        return _header("diffusers", tags, licence, base_model) + body + _section("Measured on devices", measurements)
    manifest = Bundle.open(folder).manifest
    licence, base_model = licence or manifest.licence, base_model or hub_id(manifest.provenance.checkpoint)
    header = _header(
        "kdc-edge", ["kdc-edge", "stable-diffusion", manifest.target, manifest.precision], licence, base_model
    )
    return header + _describe(manifest, name, licence) + _section("Measured", measurements)


def _header(library: str, tags: list[str], licence: str | None, base_model: str | None) -> str:
    """YAML; a JSON value is one."""
    fields = {
        "library_name": library, "pipeline_tag": "text-to-image", "license": licence, "base_model": base_model,
        "tags": tags,
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in fields.items() if value is not None]
    return f"---\n{''.join(lines)}---\n\n"


def _describe(manifest: Manifest, name: str, licence: str | None) -> str:
    model, made, size_bytes = manifest.model, manifest.provenance, sum(f.size_bytes for f in manifest.files.values())
    facts = [
        ("format", manifest.name),
        ("U-Net", f"{model.unet_parameters:,} parameters{f', {model.preset}' if model.preset else ''}"),
        ("weights", "random: for measurements; the images are noise" if model.random_weights else "trained"),
        ("images", f"{model.image_size} x {model.image_size} pixels"),
        ("size", megabytes(size_bytes)),
        ("licence", licence or "not stated: that of the base model and of the training data applies"),
        ("checkpoint", f"{made.checkpoint}, SHA-256 {made.checkpoint_sha256}"),
        (
            "made",
            f"{made.created} with {', '.join(f'{package} {version}' for package, version in made.packages.items())}",
        ),
    ]
    if model.sampling:
        sampling = model.sampling
        facts.insert(4, ("sampling", f"{sampling.scheduler}, {sampling.steps} steps, guidance {sampling.guidance:g}"))
    usage = (
        f"    pip install 'kdc-edge[{manifest.target},hub]'\n"
        f'    kdc-edge generate "a red flower" --bundle hf:{name}\n'
    )
    return (
        f"# {_title(name)}\n\nA text-to-image bundle of kdc-edge, which runs without PyTorch.\n\n{usage}\n"
        f"{markdown_table(('', ''), facts)}\n## Equality with PyTorch\n\n{_parity(manifest)}"
    )


def _parity(manifest: Manifest) -> str:
    if manifest.parity is None:
        return "Not proved: the bundle was exported with `--no-verify`.\n"
    rows = [(check.what, check.text, f"{check.threshold_db:g} dB") for check in manifest.parity.checks]
    table = markdown_table(("compared", "PSNR", "at least"), rows)
    return f"{table}\nReference: {manifest.parity.reference}. Conditions: {manifest.parity.conditions}.\n"


def _section(title: str, text: str) -> str:
    return f"\n\n## {title}\n\n{text.strip()}\n" if text else "\n"


def _title(name: str) -> str:
    return name.rpartition("/")[2]


def _own_card(folder: Path) -> str:
    """README.md of a checkpoint, as training wrote it; empty where there is none."""
    if not (folder / CARD).is_file():
        return ""
    return read_bounded(folder / CARD, MAX_CARD_BYTES, CheckpointError).decode(errors="replace").replace("\r\n", "\n")
