"""Recipes: their settings, who wins over them; and the reproduction, followed on small folders in the real layouts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from kdc_edge.settings import arguments, settings_of
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.recipes import FAMILY_DEFAULTS, RECIPES, Recipe
from kdc_edge.train.tools.table import make_table
from tests.cli.test_commands import complaint, run
from tests.train.layouts import butterflies, flowers

SCRIPT = Path(__file__).parents[2] / "examples" / "reproduce.sh"
STUB = """#!/bin/sh
printf '%s\\n' "$(basename "$0")" "$@" "" >> calls
"""


def plan(*flags: object, cwd: Path) -> str:
    task = "--task", "flowers=garden:flowers"
    return run("train", *task, *flags, "--dry-run", cwd=cwd).stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_recipes_settings_are_settings(recipe: Recipe) -> None:
    assert recipe.settings.keys() <= {s.name for s in settings_of(TrainConfig)}
    given = {"teacher": GARDEN_TEACHER, **recipe.settings}
    made = TrainConfig(tasks=(Task("a", "garden:fish"),), **arguments(TrainConfig, given))
    assert made.batch_size % made.accumulate == 0


def test_flags_and_keys_win_over_a_recipe_which_is_named(tmp_path: Path) -> None:
    """The garden's student stands in for the recipe's, which does not fit the garden's teacher."""
    garden = "--student", "garden-student"
    (tmp_path / "kdc-edge.toml").write_text("[train]\nseed = 5\n")
    said = plan("--recipe", "kdc-diff", *garden, "--steps", 7, cwd=tmp_path)
    for words in (
        "--learning-rate 5e-05",
        "--steps 7",
        "--seed 5",
        "--weight-soft 4096.0",
        "recipe kdc-diff: KDC-Diff",
    ):
        assert words in said
    assert "did you mean kdc-diff?" in complaint("train", "--recipe", "kdc-dif", cwd=tmp_path, code=2)
    assert "recipe" not in plan(*garden, cwd=tmp_path)


def test_a_large_student_has_defaults_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILY_DEFAULTS, "garden", FAMILY_DEFAULTS["sd1"])
    said = plan("--ema-decay", 0.9, cwd=tmp_path)
    for words in ("--learning-rate 5e-05", "--save-every 1000", "--ema-decay 0.9"):
        assert words in said


def test_the_reproduction_goes_from_the_teachers_fine_tuning_to_the_table(tmp_path: Path) -> None:
    """The script's own commands, which stand-ins record, one after the other in this process."""
    home = tmp_path / "bin"
    home.mkdir()
    for name in ("kdc-edge", "python"):
        (home / name).write_text(STUB)
        (home / name).chmod(0o755)
    tiny = "--samples 4 --steps 1 --batch-size 2 --accumulate 1 --eval-images 2 --eval-steps 1 --log-with none"
    settings = {
        "PATH": f"{home}:{os.environ['PATH']}", "TEACHER": "garden", "OUT": "out",
        "FLOWERS": str(flowers(tmp_path / "flowers")), "BUTTERFLIES": str(butterflies(tmp_path / "butterflies")),
        "TEACHER_FLAGS": f"--student garden-teacher --no-baselines {tiny}",
        "STUDENT_FLAGS": f"--student garden-student {tiny}",
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    subprocess.run(["sh", SCRIPT], cwd=tmp_path, env=os.environ | settings, check=True)
    calls = [call.splitlines() for call in (tmp_path / "calls").read_text().split("\n\n") if call]
    assert [call[0] for call in calls] == ["kdc-edge"] * 3 + ["python"]
    for _, *arguments_ in calls[:3]:
        run(*arguments_, cwd=tmp_path)
    _, _, module, *runs = calls[3]
    assert module == "kdc_edge.train.tools.table"
    table = make_table([tmp_path / name for name in runs])
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| teacher", "| kdc-diff", "| no-replay"]
    assert "flowers: loss" in table
    tuned = json.loads((tmp_path / "out" / "teacher" / "checkpoint" / "unet" / "config.json").read_text())
    assert tuned["layers_per_block"] == 2
    card = (tmp_path / "out" / "kdc-diff" / "checkpoint" / "README.md").read_text()
    assert "Recipe kdc-diff: KDC-Diff (arXiv 2505.06995)" in card
