"""Flags are made from fields: the same defaults, and one more field is one more flag, key, check and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from kdc_edge.cli.app import app as cli
from kdc_edge.cli.settings import flags
from kdc_edge.cli.train import train
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.manifest import Model
from kdc_edge.settings import setting, settings_of
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.quality.report import model_card
from tests.cli.test_commands import complaint, run

TASKS = (Task("flowers", "garden:flowers"),)
RESULTS: dict[str, Any] = {
    "tasks": ["flowers"], "metric": "prompt_accuracy", "prompt_accuracy": [[0.5]], "average": 0.5,
    "backward_transfer": None, "forgetting_max_minus_last": None, "values": [[{"exact": 0.25}]], "conditions": "none",
}  # fmt: skip


@dataclass(frozen=True)
class MoreConfig(TrainConfig):
    """One setting more, declared in one place."""

    colour_jitter: float = setting(0.0, "Offset of the noise of each channel.", "Data", ge=0, lt=1)


@dataclass(frozen=True)
class ChoiceConfig(TrainConfig):
    order: Literal["random", "fixed"] = setting("random", "Order of the samples.", "Data")


def parameters(command: Callable[..., None]) -> dict[str, Any]:
    app = typer.Typer(add_completion=False)
    app.command("train")(command)
    return {str(p.name): p for p in typer.main.get_command(app).params}


@pytest.fixture
def more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`kdc-edge train` with one setting more, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(add_completion=False)
    app.callback()(lambda: None)
    app.command("train")(flags(MoreConfig, teacher="garden")(train.__wrapped__))  # type: ignore[attr-defined]
    runner = CliRunner(env={"COLUMNS": "200"})
    return lambda *arguments: runner.invoke(app, ["train", *map(str, arguments)])


def test_every_flags_default_is_its_fields() -> None:
    found = parameters(train)
    for s in settings_of(TrainConfig):
        assert found[s.name].opts[0] == s.option
        if s.default is not MISSING:
            assert found[s.name].default == s.default, s.option
    assert {s.name for s in settings_of(TrainConfig) if s.default is MISSING} == {"teacher"}
    assert found["teacher"].default == "garden"


def test_the_help_has_a_panel_for_each_group(tmp_path: Path) -> None:
    text = run("train", "--help", cwd=tmp_path).stdout
    groups = list(dict.fromkeys(s.group for s in settings_of(TrainConfig)))
    assert sorted(groups, key=lambda group: text.index(f" {group} ─")) == groups
    assert groups[:3] == ["Student", "Data", "Optimization"]
    assert "cosine|constant" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--steps", 0], 1, "--steps 0 is too few: use 1 or more"),
        (["--weight-feature", "nan"], 1, "--weight-feature nan is out of range: use 0 or more"),
        (["--learning-rate", "inf"], 1, "--learning-rate inf is out of range"),
        (["--schedule", "cosin"], 2, "did you mean cosine? Choose from cosine, constant"),
        (["--log-with", "paper"], 2, "choose from none, tensorboard, wandb, trackio"),
    ],
)
def test_bounds_and_choices_are_one_line(tmp_path: Path, arguments: list[object], code: int, words: str) -> None:
    assert words in complaint("train", *arguments, cwd=tmp_path, code=code)


def test_bounds_and_choices_hold_for_keys_too(tmp_path: Path) -> None:
    (tmp_path / "kdc-edge.toml").write_text("[train]\nweight-soft = -1.0\n")
    assert "--weight-soft -1.0 is too small: use 0 or more" in complaint("train", cwd=tmp_path)
    (tmp_path / "kdc-edge.toml").write_text("[train]\nreplay-policy = 'balance'\n")
    assert "did you mean balanced?" in complaint("train", cwd=tmp_path, code=2)


def test_one_more_field_is_one_more_flag(more: Callable[..., Any]) -> None:
    text = more("--help").stdout
    assert "--colour-jitter" in text
    assert "Offset of the noise of each channel (0 to below 1)." in text


def test_one_more_field_is_checked_planned_and_a_key(more: Callable[..., Any]) -> None:
    found = more("--colour-jitter", 1).exception
    assert isinstance(found, InputError)
    assert str(found) == "--colour-jitter 1.0 is out of range: use 0 to below 1"
    assert "--colour-jitter 0.25" in more("--colour-jitter", 0.25, "--dry-run").stdout
    Path("kdc-edge.toml").write_text("[train]\ncolour-jitter = 0.5\n")
    assert "--colour-jitter 0.5" in more("--dry-run").stdout


def test_one_more_field_is_saved_compared_and_in_the_card(more: Callable[..., Any]) -> None:
    config = MoreConfig(teacher=GARDEN_TEACHER, tasks=TASKS, colour_jitter=0.25)
    home = Path("runs/001")
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(config.as_json()))
    assert MoreConfig.load(home) == config
    assert "--colour-jitter 0.25" in more("--resume", "--out", home, "--dry-run").stdout  # from the file
    for plan in ((), ("--dry-run",)):
        refused = more("--resume", "--out", home, "--colour-jitter", 0.75, *plan).exception
        assert isinstance(refused, KdcError)
        assert "--colour-jitter is 0.75 and the run was started with 0.25" in str(refused)
    assert "| Data | `--colour-jitter` | 0.25 |" in model_card(config, model(), RESULTS)


def test_one_more_choice_is_checked() -> None:
    with pytest.raises(InputError, match="--order 'fixd' is unknown, did you mean fixed"):
        ChoiceConfig(teacher=GARDEN_TEACHER, tasks=TASKS, order="fixd")  # type: ignore[arg-type]


def test_a_card_is_filled_in() -> None:
    card = model_card(TrainConfig(teacher=GARDEN_TEACHER, tasks=TASKS), model(), RESULTS)
    assert card.startswith('---\nlibrary_name: diffusers\npipeline_tag: text-to-image\nbase_model: "garden-teacher"\n')
    assert "$" not in card
    assert "| Distillation | `--temperature` | 2.0 |" in card
    assert "| flowers | 0.5 |" in card
    assert "| flowers | exact 0.25 |" in card
    assert "- average: 0.5\n" in card
    assert "backward" not in card
    assert "task after task, with latent replay.\n" in card
    words = [({"replay": 0}, "without replay"), ({"strategy": "ewc"}, "with elastic weight consolidation")]
    for changes, expected in words:
        config = TrainConfig(teacher=GARDEN_TEACHER, tasks=TASKS, **changes)  # type: ignore[arg-type]
        assert f"task after task, {expected}.\n" in model_card(config, model(), RESULTS)


def test_a_flag_that_was_not_given_leaves_a_resumed_run_as_it_was(tmp_path: Path) -> None:
    """Parts of a configuration too: one weight of the loss by hand keeps the others."""
    home = tmp_path / "run"
    home.mkdir()
    config = TrainConfig(teacher=GARDEN_TEACHER, tasks=TASKS, steps=7, save_every=3)
    (home / "config.json").write_text(json.dumps(config.as_json() | {"loss": {"soft": 0.5, "task": 0.25}}))
    plan = run("train", "--resume", "--out", home, "--weight-task", 0.25, "--keep", 9, "--dry-run", cwd=tmp_path).stdout
    assert "--steps 7 --weight-task 0.25 --weight-soft 0.5 --save-every 3 --keep 9" in plan


def test_the_quickstart_has_defaults_of_its_own() -> None:
    command = typer.main.get_command(cli).commands["quickstart"]  # type: ignore[attr-defined]
    found = {p.name: p.default for p in command.params}
    assert found["steps"] == 250
    assert found["batch_size"] == 16
    assert "learning_rate" not in found


def test_annotations_are_evaluated_once() -> None:
    """typer asks for them three times; as text they take a tenth of the start of every command."""
    commands = [info.callback for info in cli.registered_commands]
    assert len(commands) > 10
    assert not [a for c in commands if c is not None for a in c.__annotations__.values() if isinstance(a, str)]


def model() -> Model:
    return read_model(GARDEN_TEACHER)


def test_a_run_that_begins_with_few_steps_takes_the_stages_settings_unless_others_are_given(tmp_path: Path) -> None:
    few = ["train", "--objective", "phased", "--task", "flowers=garden:flowers", "--dry-run"]
    said = run(*few, "--warmup", 7, cwd=tmp_path)
    assert "--learning-rate 0.0003" in said.stdout
    assert "--huber 0.03" in said.stdout
    assert "--warmup 7" in said.stdout
    assert "--ema-decay 0.98, for few steps" in said.stderr
    assert "--learning-rate" not in run("train", "--task", "flowers=garden:flowers", "--dry-run", cwd=tmp_path).stdout


def test_every_switch_can_be_turned_off_again() -> None:
    """A run that goes on has the settings that it was started with, such as --cuda-graphs on another machine."""
    commands = typer.main.get_command(cli).commands  # type: ignore[attr-defined]
    known = {str(p.name): p for p in commands["train"].params}
    switches = [s for s in settings_of(TrainConfig) if s.kind is bool]
    assert {"cuda_graphs", "compile", "inherit"} <= {s.name for s in switches}
    assert all(known[s.name].secondary_opts for s in switches)
