"""A table of finished runs: every metric of every task at the end, their teacher, average and forgetting.

python -m kdc_edge.train.tools.table runs/kdc-diff runs/no-replay > table.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kdc_edge.errors import InputError
from kdc_edge.files import read_json
from kdc_edge.text import markdown_table


def make_table(runs: Sequence[Path]) -> str:
    """Markdown, a row for the first run's teacher and one for each run. Raises InputError for a run without results."""
    found = {run.name: _results(run) for run in runs}
    first = next(iter(found.values()))
    tasks = first["tasks"]
    for name, results in found.items():
        if results["tasks"] != tasks:
            raise InputError(f"{name} learnt {', '.join(results['tasks'])}, not {', '.join(tasks)}: compare runs alike")
    metrics = list(dict.fromkeys(m for r in found.values() for values in r["values"][-1] for m in values or {}))
    header = ("", *(f"{task}: {metric}" for task in tasks for metric in metrics), "average", "forgetting")
    teacher = first["baseline_values"].get("teacher", {})
    rows = [("teacher", *(_cell(teacher.get(t, {}).get(m), None) for t in tasks for m in metrics), "", "")]
    for name, results in found.items():
        last = zip_longest(results["values"][-1], results["standard_errors"][-1])
        cells = [_cell((values or {}).get(m), (errors or {}).get(m)) for values, errors in last for m in metrics]
        rows.append((name, *cells, *(_cell(results[key], None) for key in ("average", "forgetting_max_minus_last"))))
    kinds = "; ".join(dict.fromkeys(first["references"].values()))
    notes = f"± standard errors over images. {first['conditions']}; {kinds}. Average and forgetting: {first['metric']}."
    return f"{markdown_table(header, rows)}\n{notes}\n"


def _results(run: Path) -> dict[str, Any]:
    path = run / "results.json"
    if not path.is_file():
        raise InputError(f"{run} is not finished, it has no results.json: kdc-edge train --resume --out {run} first")
    return read_json(path, InputError)


def _cell(value: float | None, error: float | None) -> str:
    return "" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A table of finished runs.")
    parser.add_argument("runs", type=Path, nargs="+")
    print(make_table(parser.parse_args().runs))


if __name__ == "__main__":
    main()
