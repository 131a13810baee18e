"""The settings of a run: one declaration each, checked in one line, saved and loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from kdc_edge.errors import CheckpointError, InputError, UsageError
from kdc_edge.files import write_atomic
from kdc_edge.settings import settings_of
from kdc_edge.train.config import LossWeights, TrainConfig, check_same
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.garden.assets import GARDEN_TEACHER
from kdc_edge.train.strategies.buffer import ReplayBuffer

CONFIG = TrainConfig(teacher=Path("teacher"), tasks=(Task("flowers", "garden:flowers"),))


def test_a_run_may_be_resumed_where_its_teacher_lies_elsewhere(tmp_path: Path) -> None:
    """Of another installation's garden without a flag; of another folder that is gone by --teacher."""
    moved = replace(CONFIG, teacher=Path("/elsewhere/kdc_edge/train/assets/garden-teacher"))
    write_atomic(tmp_path / "config.json", json.dumps(moved.as_json()))
    assert TrainConfig.load(tmp_path).teacher == GARDEN_TEACHER
    here = replace(CONFIG, teacher=tmp_path)
    check_same(here, replace(CONFIG, teacher=tmp_path / "gone").as_json())
    with pytest.raises(InputError, match="--teacher is"):
        check_same(here, replace(CONFIG, teacher=tmp_path.parent).as_json())


def test_the_declaration_needs_neither_torch_nor_pydantic() -> None:
    code = "import sys, kdc_edge.train.config, kdc_edge.cli.train\n"
    code += "print([m for m in ('torch', 'numpy', 'PIL', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_setting_has_help_a_group_and_a_name_of_its_own() -> None:
    settings = settings_of(TrainConfig)
    assert len({s.name for s in settings}) == len(settings) > 30
    assert all(s.help.endswith(".") and s.group for s in settings)
    assert {s.name for s in settings} >= {"steps", "weight_task", "temperature"}
    assert next(s for s in settings if s.name == "weight_task").of(CONFIG) == CONFIG.loss.task


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "--steps 0 is too few: use 1 or more"),
        ({"eval_images": 1}, "--eval-images 1 is too few: use 2 or more"),
        ({"samples": 0}, "--samples 0 is too few: use 1 or more"),
        ({"replay_mb": -0.5}, "--replay-mb -0.5 is too small: use 0 or more"),
        ({"replay_ratio": 1.0}, "--replay-ratio 1.0 is out of range: use 0 to below 1"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0 is out of range: use above 0 to below 1"),
        ({"replay_weight": math.inf}, "--replay-weight inf is out of range: use 0 or more"),
        ({"caption_dropout": math.nan}, "--caption-dropout nan is out of range: use 0 to below 1"),
    ],
)
def test_values_out_of_bounds_are_one_line_that_names_the_flag(change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as found:
        replace(CONFIG, **change)
    assert str(found.value) == words
    assert found.value.exit_code == 1


def test_the_parts_of_the_loss_are_checked_alike() -> None:
    with pytest.raises(InputError, match=r"^--weight-task nan is out of range: use 0 or more$"):
        LossWeights(task=math.nan)
    with pytest.raises(InputError, match=r"^--temperature 0 is out of range: use above 0$"):
        LossWeights(temperature=0)


def test_an_unknown_choice_is_wrong_usage_and_the_nearest_is_named() -> None:
    with pytest.raises(UsageError) as found:
        replace(CONFIG, schedule="cosin")
    assert str(found.value) == "--schedule 'cosin' is unknown, did you mean cosine? Choose from cosine, constant"
    assert found.value.exit_code == 2
    with pytest.raises(UsageError, match=r"^--optimizer 'x' is unknown: choose from adamw, adamw8bit$"):
        replace(CONFIG, optimizer="x")


def test_a_saved_configuration_is_loaded_as_it_was(tmp_path: Path) -> None:
    config = replace(CONFIG, cache=Path("cache"), loss=LossWeights(soft=0.5), samples=7)
    (tmp_path / "config.json").write_text(json.dumps(config.as_json()))
    assert TrainConfig.load(tmp_path) == config
    least = {"teacher": "teacher", "student": "garden-student", "tasks": config.as_json()["tasks"]}
    (tmp_path / "config.json").write_text(json.dumps(least))  # of a version with fewer settings
    assert TrainConfig.load(tmp_path) == CONFIG


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"speed": 11}, "speed: Unexpected"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"schedule": "cosin"}, "schedule: Input should be 'cosine' or 'constant'"),
        ({"loss": {"tusk": 1}}, "loss.tusk: Unexpected"),
        ({"tasks": []}, "there is nothing to learn"),
        ({"tasks": None}, "tasks: Input should be a valid tuple"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.as_json() | change))
    with pytest.raises(CheckpointError, match=r"config.json is no run's configuration: " + words):
        TrainConfig.load(tmp_path)


def test_a_run_goes_on_with_the_settings_that_decide_its_weights() -> None:
    saved = CONFIG.as_json()
    check_same(replace(CONFIG, save_every=7, keep=9, device="cpu", log_with="none", cache=Path("there")), saved)
    with pytest.raises(InputError, match=r"^--weight-soft is 2.0 and the run was started with 1.0: resume"):
        check_same(replace(CONFIG, loss=LossWeights(soft=2.0)), saved)
    with pytest.raises(InputError, match=r"^--task is fish=garden:fish and the run was started with flowers=garden:"):
        check_same(replace(CONFIG, tasks=(Task("fish", "garden:fish"),)), saved)


def test_flags_and_table_show_what_was_set() -> None:
    config = replace(CONFIG, inherit=False, compile=True, loss=LossWeights(feature=0.5), cache=Path("/home/me/cache"))
    assert config.as_flags() == ("--teacher teacher --no-inherit --cache /home/me/cache --weight-feature 0.5 --compile")
    rows = {flag: value for _, flag, value in config.table()}
    assert (rows["`--weight-feature`"], rows["`--steps`"]) == ("0.5", "300")
    assert not {"`--cache`", "`--warmup`"} & rows.keys()  # free, automatic


def test_a_buffer_without_a_count_is_saved_and_loaded(tmp_path: Path) -> None:
    ReplayBuffer(None, capacity_bytes=1000).save(tmp_path / "buffer")
    found = ReplayBuffer.load(tmp_path / "buffer")
    assert (found.capacity, found.capacity_bytes) == (None, 1000)


@dataclass(frozen=True)
class Undeclared(TrainConfig):
    speed: Literal["slow"] = "slow"  # declared without setting(): no flag, as `tasks`


def test_only_declared_settings_are_flags() -> None:
    assert [s.name for s in settings_of(Undeclared)] == [s.name for s in settings_of(TrainConfig)]
