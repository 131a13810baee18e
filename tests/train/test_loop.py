"""Training: exact resume, replay in the batches, what is refused, and the numbers of forgetting."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.runtimes.torch import load_network
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import Quality, TrainConfig, learning_rate
from kdc_edge.train.data.tasks import Task, parse_task
from kdc_edge.train.loop import TaskDone, Trainer
from kdc_edge.train.quality.matrix import (
    QUALITIES,
    average,
    backward_transfer,
    choose_metric,
    forgetting,
    forward_transfer,
    quality_matrix,
    signed_forgetting,
)
from kdc_edge.train.runs.continuing import branch_run, continue_run
from kdc_edge.train.runs.states import load_state, save_state
from kdc_edge.train.stepping import StepDone
from tests.train.conftest import KILLED_AFTER
from tests.train.layouts import save

TASKS = (Task("flowers", "garden:flowers"), Task("butterflies", "garden:butterflies"))


def config(**changes: object) -> TrainConfig:
    small = TrainConfig(
        teacher=GARDEN_TEACHER, student="garden-student", tasks=TASKS, steps=3, batch_size=4, samples=12,
        replay=6, eval_images=2, eval_steps=1, save_every=100, log_with="none", caption_dropout=0.0,
        baselines=False, device="cpu",
    )  # fmt: skip
    return replace(small, **changes)  # type: ignore[arg-type]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")


def logged(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its only measurement of time."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in r.items() if name != "samples_per_sec"} for r in records]


def test_a_run_leaves_a_checkpoint_scores_and_a_log(two_tasks: Path) -> None:
    assert read_model(two_tasks / "checkpoint").preset == "garden-student"
    results = json.loads((two_tasks / "results.json").read_text("utf-8"))
    assert np.shape(results["prompt_accuracy"]) == (2, 2)
    assert list(results["matrices"]) == ["prompt_accuracy", "exact", "-judge_frechet", "-judge_kernel"]
    assert results["matrices"]["prompt_accuracy"] == results["prompt_accuracy"]
    records = [json.loads(line) for line in (two_tasks / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [r["total"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert set(records[0]["losses"]) == {"task", "output", "soft", "feature", "total"}
    assert [r["replayed"] for r in records] == [0, 0, 0, 0.5, 0.5, 0.5]
    assert records[0]["replay_mb"] == 0
    assert records[-1]["replay_mb"] == pytest.approx(6 * 2 * 2 * 4 * 16 * 16 / 1e6, rel=0.1)  # latents
    prompts = (two_tasks / "checkpoint" / "prompts.txt").read_text("utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) > 2
    assert any("flower" in p for p in prompts)
    assert any("butterfly" in p for p in prompts)


@pytest.mark.parametrize("steps", KILLED_AFTER)
def test_resumed_runs_end_with_the_same_weights_to_the_last_bit(two_tasks: Path, tmp_path: Path, steps: int) -> None:
    """Stopped without a word after some steps, in the first task, at its end, or in the second."""
    cut = Path(shutil.copytree(two_tasks.with_name(f"killed-{steps}"), tmp_path / "cut"))
    assert len(logged(cut)) == steps
    assert isinstance(list(Trainer(config(save_every=1), cut, resume=True).run())[-1], TaskDone)
    expected, found = weights(two_tasks), weights(cut)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert logged(cut) == logged(two_tasks)
    results = [json.loads((run / "results.json").read_text("utf-8")) for run in (cut, two_tasks)]
    assert results[0] == results[1]


def test_a_kill_as_an_old_state_goes_leaves_nothing_of_it(
    two_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    position, tensors, replay = load_state(two_tasks)

    def save_at(total: int) -> None:
        few = {"generator": tensors["generator"]}
        save_state(tmp_path, replace(position, total=total), few, replay, keep=1)

    def kill_half_way(folder: Path) -> None:
        (folder / "state.json").unlink()
        raise KeyboardInterrupt

    save_at(1)
    with monkeypatch.context() as patch:
        patch.setattr("kdc_edge.train.runs.states.shutil.rmtree", kill_half_way)
        with pytest.raises(KeyboardInterrupt):
            save_at(2)
    save_at(3)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["00000003-2"]


class EightBitAdam(torch.optim.AdamW):
    """Keeps what bitsandbytes' keeps beside moments, and needs it back: an int that counts, a table shared by all."""

    TABLE = torch.linspace(-1, 1, 256)

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for p, state in self.state.items():
            state["count"] = state.get("count", 0) + 1
            state.setdefault("qmap1", self.TABLE)
            assert isinstance(state["count"], int)
            p.data.mul_(1 - 1e-4 * state["count"] * state["qmap1"][-1])
        return found


def test_eight_bit_adam_resumes_with_the_same_weights_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = types.ModuleType("bitsandbytes")
    stand_in.__spec__ = ModuleSpec("bitsandbytes", None)
    vars(stand_in)["optim"] = types.SimpleNamespace(AdamW8bit=EightBitAdam)
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    eight_bit = config(optimizer="adamw8bit", tasks=TASKS[:1], save_every=2)
    trainer = Trainer(eight_bit, tmp_path / "cut")
    for event in trainer.run():
        if isinstance(event, StepDone) and event.total == 3:
            break
    expected = trainer.unet().state_dict()
    resumed = Trainer(eight_bit, tmp_path / "cut", resume=True)
    assert {state["count"] for state in resumed.student.optimizer.state.values()} == {2}
    next(resumed.run())
    found = resumed.unet().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_second_task_replays_the_first_and_the_branch_without_replay_does_not(
    two_tasks: Path, tmp_path: Path
) -> None:
    done = two_tasks.with_name("killed-4")  # its newest state is that of the first task's end
    shutil.copytree(done, tmp_path / "kept")
    trainer = Trainer(config(save_every=1), tmp_path / "kept", resume=True)
    assert trainer.position.task == 1
    assert len(trainer.replay) == 6
    assert set(trainer.replay.tasks) == {"flowers"}
    captions = trainer.draw_batch(trainer.teacher.latents(TASKS[1])).captions
    assert sorted("flower" in c for c in captions) == [False, False, True, True]

    branch_run(done, tmp_path / "bare", config(replay=0))
    bare = Trainer(config(replay=0), tmp_path / "bare", resume=True)
    assert bare.position.task == 1
    captions = bare.draw_batch(bare.teacher.latents(TASKS[1])).captions
    assert not any("flower" in c for c in captions)


def test_the_teacher_and_step_0_are_measured_beside_r(tmp_path: Path) -> None:
    """With counts and standard errors; a constant rate of almost nothing leaves the student at step 0."""
    small = config(steps=1, schedule="constant", warmup=1, learning_rate=1e-12, baselines=True)
    for _ in Trainer(small, tmp_path / "run").run():
        pass
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert results["baselines"]["step 0"] == pytest.approx(results["prompt_accuracy"][0])
    assert results["baselines"]["teacher"] > results["baselines"]["step 0"]
    assert results["forward_transfer"] == pytest.approx(0)
    assert results["references"] == dict.fromkeys(("flowers", "butterflies"), "renders of the same prompts")
    errors = results["standard_errors"][1][0]
    assert errors["images"] == 2
    assert set(errors) == {"images", "prompt_accuracy", "exact"}  # a jackknife of the kernel needs three images
    for _ in Trainer(replace(small, tasks=TASKS[:1]), tmp_path / "first").run():
        pass
    joined = continue_run(tmp_path / "first", tmp_path / "then", replace(small, tasks=TASKS[1:], seed=1))
    for _ in Trainer(joined, tmp_path / "then", resume=True).run():
        pass
    then = json.loads((tmp_path / "then" / "results.json").read_text("utf-8"))
    assert then["baseline_values"] == results["baseline_values"]  # also of the task that was added later
    assert then["prompt_accuracy"] == [pytest.approx(row) for row in results["prompt_accuracy"]]
    assert then["forward_transfer"] == pytest.approx(0)
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text("utf-8")
    assert "| teacher | " in card
    assert "| step 0 | " in card
    assert " ± " in card


def test_the_student_learns(tmp_path: Path) -> None:
    """Ten steps bring the student's prediction nearer to the teacher's."""
    trainer = Trainer(config(steps=10, tasks=TASKS[:1]), tmp_path / "run")
    seen = [event.losses["output"] for event in itertools.islice(trainer.run(), 10) if isinstance(event, StepDone)]
    assert np.mean(seen[-4:]) < 0.8 * np.mean(seen[:4])


def test_the_teacher_never_changes(two_tasks_trainer: Trainer) -> None:
    before = load_network(GARDEN_TEACHER, "unet").state_dict()
    assert all(torch.equal(p, before[n]) for n, p in two_tasks_trainer.teacher.unet.state_dict().items())


def test_resuming_with_other_settings_is_refused(two_tasks: Path) -> None:
    with pytest.raises(InputError, match="--batch-size is 5 and the run was started with 4"):
        Trainer(config(batch_size=5), two_tasks, resume=True)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        Trainer(config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"replay": -1}, "--replay -1"),
        ({"replay_ratio": 1.0}, "--replay-ratio"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"tasks": ()}, "nothing to learn"),
        ({"tasks": (TASKS[0], TASKS[0])}, "same name"),
        ({"mixed_precision": "fp8"}, "--mixed-precision"),
    ],
)
def test_settings_that_cannot_be_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        config(**change)


@pytest.mark.parametrize("text", ["flowers", "=garden:flowers", "a/b=garden:flowers", "a=garden:trees", "a=moon:x"])
def test_tasks_that_cannot_be_are_named(text: str) -> None:
    with pytest.raises(InputError):
        parse_task(text)


def test_the_learning_rate_warms_up_and_falls() -> None:
    c = config(steps=100, learning_rate=1e-2)
    rates = [learning_rate(c, step) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] == pytest.approx(1e-2)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] < 1e-3


def test_forgetting_by_hand() -> None:
    """Three tasks; the numbers are worked out on paper from the definitions."""
    r = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.3], [0.5, 0.85, 0.9]]
    assert average(r) == pytest.approx((0.5 + 0.85 + 0.9) / 3)
    assert backward_transfer(r) == pytest.approx(((0.5 - 0.9) + (0.85 - 0.8)) / 2)
    assert forgetting(r) == pytest.approx(((0.9 - 0.5) + (0.85 - 0.85)) / 2)
    assert signed_forgetting(r) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.85)) / 2)
    assert forward_transfer(r, [0.0, 0.2, 0.2]) == pytest.approx(((0.1 - 0.2) + (0.3 - 0.2)) / 2)
    assert forward_transfer([[0.9]], [0.1]) is None
    assert forward_transfer([[0.9], [0.5, 0.8]], [0.1]) is None  # a continued run: not measured before
    assert forgetting([[0.9]]) is None
    assert signed_forgetting([[0.9]]) is None
    assert backward_transfer([[None, 0.5], [None, 0.7]]) is None  # not measured on the first task


def test_r_is_made_of_what_all_tasks_have() -> None:
    rows = [[{"loss": 0.5}, {"loss": 0.25, "kid": 0.125}], [None, {"kid": 0.5}]]
    assert choose_metric(rows[0]) == "-loss"
    assert choose_metric(rows[1]) == "-kid"
    assert quality_matrix(rows, "-loss") == [[-0.5, -0.25], [None, None]]
    assert quality_matrix(rows, "-kid") == [[None, -0.125], [None, -0.5]]


def test_a_quality_that_cannot_be_measured_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--quality loss cannot be measured on these tasks: use exact, judge_frechet"):
        Trainer(config(quality="loss"), tmp_path / "run")


def test_a_cache_that_cannot_be_written_is_refused_and_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"latents cannot be written: .*ot a directory"):
        Trainer(config(cache=Path(__file__)), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_choices_of_quality_are_the_metrics() -> None:
    assert get_args(Quality) == ("auto", *(name for name, _ in QUALITIES))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"start": GARDEN_TEACHER}, "has a U-Net of another shape than --student"),
        ({"student": "bk-tiny"}, "bk-tiny does not fit this teacher"),
    ],
)
def test_a_student_that_cannot_be_made_leaves_no_run(tmp_path: Path, change: dict[str, object], words: str) -> None:
    """Whose folder would be refused when the mistake is mended."""
    with pytest.raises(InputError, match=words):
        Trainer(config(**change), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_cannot_be_evaluated_is_refused_before_training(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    save(photos / "train" / "oak" / "a.png")
    (photos / "test" / "oak").mkdir(parents=True)
    (photos / "test" / "oak" / "b.png").write_bytes(b"broken")
    trainer = Trainer(config(tasks=(TASKS[0], parse_task(f"photos=imagefolder:{photos}"))), tmp_path / "run")
    with pytest.raises(InputError, match="photos: none of 1 images"):
        next(trainer.run())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_loss_that_is_no_number_ends_the_run_with_what_can_be_done(tmp_path: Path) -> None:
    """A resumed run may have no other learning rate."""
    trainer = Trainer(config(tasks=TASKS[:1]), tmp_path / "run")
    with torch.no_grad():
        next(trainer.student.network.parameters()).fill_(torch.nan)
    with pytest.raises(KdcError, match="step 1 of flowers: begin a new run with a lower --learning-rate"):
        next(trainer.run())
