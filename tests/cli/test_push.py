"""kdc-edge push: the card with the measurements of this bundle, and no other's. tests/core/test_hub.py pushes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdc_edge.bench.record import Report, to_json
from kdc_edge.bundle import Bundle
from kdc_edge.cli.app import app
from kdc_edge.errors import InputError
from tests.bench.rows import MACHINE, make_row


def test_a_dry_run_prints_the_card_with_the_bundles_own_rows(bundle: Path, tmp_path: Path) -> None:
    made = Bundle.open(bundle).manifest
    own = {"target": made.target, "precision": made.precision}
    rows = (
        make_row("mine", 0.5, checkpoint_sha256=made.provenance.checkpoint_sha256, **own),
        make_row("another-checkpoints", 0.5, checkpoint_sha256="1" * 64, **own),
    )
    report = tmp_path / "bench.json"
    report.write_text(to_json(Report(MACHINE, rows)))
    arguments = ["push", str(bundle), "someone/flowers", "--dry-run", "--bench", str(report)]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "## Measured\n\n| Bundle |" in shown
    assert "| mine |" in shown
    assert "another-checkpoints" not in shown
    assert r"- Machine: A \<fast\> processor, 2 cores" in shown
    assert shown.rstrip().splitlines()[-1] == "vae_decoder/model.onnx"
    report.write_text(to_json(Report(MACHINE, rows[1:])))
    with pytest.raises(InputError, match=r"has no row of .*: measure it with kdc-edge bench"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
