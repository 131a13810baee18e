"""More tasks after the last one, with the memory of the earlier ones; distillation from an earlier student."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kdc_edge.cli.app import app
from kdc_edge.cli.project import find_checkpoint, give_back, run_of, take_run
from kdc_edge.cli.train import _said_of_more
from kdc_edge.diffusers_folder import read_model, training_note
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import sole_writer
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.batch import Batch
from kdc_edge.train.data.tasks import Task, parse_task
from kdc_edge.train.loop import Trainer, check_run
from kdc_edge.train.quality.evaluation_set import EvaluationSet
from kdc_edge.train.quality.metrics import ImageMetrics
from kdc_edge.train.runs.continuing import continue_run
from kdc_edge.train.runs.states import list_states, load_state
from kdc_edge.train.stepping import StepDone
from tests.cli.test_commands import complaint, run
from tests.train.layouts import class_folders
from tests.train.test_loop import TASKS, config, logged, weights

UNET = "unet/diffusion_pytorch_model.safetensors"


def finish(trainer: Trainer) -> list[StepDone]:
    return [event for event in trainer.run() if isinstance(event, StepDone)]


def test_a_continued_run_is_the_run_that_had_all_tasks_from_the_start(
    one_task: Path, two_tasks: Path, tmp_path: Path
) -> None:
    joined = continue_run(one_task, tmp_path / "then", config(tasks=TASKS[1:]))
    assert [t.name for t in joined.tasks] == ["flowers", "butterflies"]
    trainer = Trainer(joined, tmp_path / "then", resume=True)
    assert set(trainer.replay.tasks) == {"flowers"}
    finish(trainer)
    expected, found = weights(two_tasks), weights(tmp_path / "then")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    results = json.loads((tmp_path / "then" / "results.json").read_text("utf-8"))
    assert [len(row) for row in results["prompt_accuracy"]] == [1, 2]
    assert results["forgetting_max_minus_last"] is not None
    assert "## Trained on\n\n1. flowers: `garden:flowers`\n2. butterflies:" in (
        tmp_path / "then" / "checkpoint" / "README.md"
    ).read_text("utf-8")


def test_more_steps_end_with_the_weights_of_a_run_that_asked_for_them(tmp_path: Path) -> None:
    """With a rate that does not depend on their number; replay, scores and log are that run's too."""
    steady = config(tasks=TASKS[:1], steps=2, schedule="constant", warmup=1)
    finish(Trainer(steady, tmp_path / "run"))
    finish(Trainer(replace(steady, steps=3), tmp_path / "whole"))
    again = "train", "--resume", "--out", tmp_path / "run"
    assert "--steps is 1 and the run was started with 2" in complaint(*again, "--steps", 1, cwd=tmp_path)
    assert "--seed is 5" in complaint(*again, "--steps", 3, "--seed", 5, cwd=tmp_path)
    done = run(*again, "--steps", 3, cwd=tmp_path)
    assert "flowers goes on to step 3, as a run of 3 steps would have" in done.stderr
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(tmp_path / "whole").items())
    curves = [[record["losses"] for record in logged(tmp_path / name)] for name in ("run", "whole")]
    assert curves[0] == curves[1]
    states = [load_state(tmp_path / name) for name in ("run", "whole")]
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][2].keys, states[1][2].keys)
    results = [(tmp_path / name / "results.json").read_text("utf-8") for name in ("run", "whole")]
    assert results[0] == results[1]
    assert "goes on to step 4 by the learning rates" in _said_of_more(config(steps=4))


def test_a_checkpoint_of_every_task_and_of_a_run_that_goes_on(one_task: Path, tmp_path: Path) -> None:
    joined = continue_run(one_task, tmp_path / "run", config(tasks=TASKS[1:], steps=4))
    trainer = Trainer(joined, tmp_path / "run", resume=True)
    events = trainer.run()
    next(events)
    kept = find_checkpoint(tmp_path / "run", "flowers")
    assert kept == tmp_path / "run" / "checkpoints" / "flowers"
    assert run_of(kept) == tmp_path / "run"
    expected = weights(one_task)
    assert all(torch.equal(expected[name], t) for name, t in load_file(kept / UNET).items())
    with pytest.raises(InputError, match="no checkpoint of --task butterflies: it has flowers"):
        find_checkpoint(tmp_path / "run", "butterflies")
    next(events)
    trainer.save()
    found = find_checkpoint(tmp_path / "run")
    assert training_note(found) == "step 5 of 7, task butterflies; the run was not finished"
    average = trainer.unet().state_dict()
    assert all(torch.equal(average[name], t) for name, t in load_file(found / UNET).items())
    assert read_model(found).preset == "garden-student"


def test_what_cannot_be_continued_is_named(one_task: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run with saved states"):
        continue_run(tmp_path, tmp_path / "then", config())
    with pytest.raises(InputError, match="is not the run's garden-student"):
        continue_run(one_task, tmp_path / "then", config(student="garden-teacher"))
    with pytest.raises(InputError, match="same name"):
        continue_run(one_task, tmp_path / "then", config(tasks=TASKS[:1]))
    with pytest.raises(InputError, match="with the run's own --objective distillation, not with --objective phased"):
        continue_run(one_task, tmp_path / "then", config(tasks=TASKS[1:], objective="phased"))
    half = Trainer(config(tasks=TASKS[:1]), tmp_path / "half")
    next(iter(half.run()))
    half.save()
    with pytest.raises(CheckpointError, match="is not finished"):
        continue_run(tmp_path / "half", tmp_path / "then", config(tasks=TASKS[1:]))
    assert not (tmp_path / "then").exists()


def test_the_tasks_of_a_settings_file_are_no_new_ones(
    one_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a project whose kdc-edge.toml lists them; and phases without an objective are no stage of a distilled run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdc_edge.train.tools.plan._activations", lambda *_: 0)
    (tmp_path / "kdc-edge.toml").write_text('[train]\ntask = ["flowers=garden:flowers"]\n')

    def dry_run(*more: str) -> Result:
        return CliRunner().invoke(app, ["train", "--dry-run", "--continue-from", str(one_task), *more])

    assert "steps 3, samples seen 12" in dry_run("--objective", "phased", "--steps", "3").output
    assert "steps 5, samples seen 20" in dry_run("--task", "fish=garden:fish", "--steps", "5").output  # of the new task
    for more in ((), ("--phases", "2")):
        refused = dry_run(*more)
        assert isinstance(refused.exception, InputError)
        assert "--continue-from needs a --task" in str(refused.exception)


@pytest.mark.parametrize(
    "more",
    [
        ("--objective", "distribution", "--replay-teacher", "student"),
        ("--task", "fish=garden:fish", "--strategy", "ewc"),
    ],
)
def test_what_the_new_run_refuses_leaves_no_folder(one_task: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    found = CliRunner().invoke(app, ["train", "--continue-from", str(one_task), "--out", str(out), *more])
    assert isinstance(found.exception, InputError)
    assert not out.exists()


def test_replayed_samples_are_distilled_from_the_student_from_the_previous_task(one_task: Path, tmp_path: Path) -> None:
    """With itself as the previous student, the student's output loss is nothing on replayed samples alone."""
    trainer = Trainer(config(tasks=TASKS[:1]), tmp_path / "run")
    student = trainer.student.network.eval()
    batch = trainer.draw_batch(trainer.teacher.latents(TASKS[0]))
    mixed = Batch(batch.sample, batch.noise, batch.timestep, torch.tensor([True, False, True, False]), batch.captions)
    text = trainer.teacher.embed(mixed.captions)

    def output_losses() -> torch.Tensor:
        with torch.no_grad():
            terms = trainer.objective(student, mixed, text)
        return terms["output"] + terms["feature"]

    from_teacher = output_losses()
    trainer.objective.replay_from(student.state_dict())
    found = output_losses()
    assert found[mixed.replayed].max() < 1e-8
    torch.testing.assert_close(found[~mixed.replayed], from_teacher[~mixed.replayed], rtol=1e-3, atol=1e-6)
    assert set(trainer.watch.seconds) == {"teacher", "student"}

    joined = continue_run(one_task, tmp_path / "then", config(tasks=TASKS[1:], replay_teacher="student"))
    student_taught = Trainer(joined, tmp_path / "then", resume=True)
    next(student_taught.run())
    student_taught.save()
    remembered = student_taught.objective.previous_student
    assert remembered is not None
    again = Trainer(joined, tmp_path / "then", resume=True).objective.previous_student
    assert again is not None
    kept = again.state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in remembered.state_dict().items())


def test_a_state_with_unknown_parts_is_refused(one_task: Path, tmp_path: Path) -> None:
    """One of an older version, say, whose parts would else be left out without a word."""
    shutil.copytree(one_task, tmp_path / "run")
    path = list_states(tmp_path / "run")[0] / "tensors.safetensors"
    save_file(load_file(path) | {"earlier/conv_in.bias": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds earlier, which this version does not know"):
        Trainer(config(tasks=TASKS[:1]), tmp_path / "run", resume=True)


def test_a_replay_weight_of_zero_leaves_replayed_samples_without_gradient(tmp_path: Path) -> None:
    trainer = Trainer(config(tasks=TASKS[:1], replay_weight=0.0, learning_rate=0.1), tmp_path / "run")
    batch = trainer.draw_batch(trainer.teacher.latents(TASKS[0]))
    replayed = Batch(batch.sample, batch.noise, batch.timestep, torch.ones(4, dtype=torch.bool), batch.captions)
    trainer.stepper(trainer.stepper.load(replayed), rate=0.1, name="a step")
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in trainer.student.network.parameters())


def test_a_budget_in_megabytes_is_the_buffers(tmp_path: Path) -> None:
    trainer = Trainer(config(tasks=TASKS[:1], replay_mb=0.02), tmp_path / "run")
    finish(trainer)
    assert 15_000 < trainer.replay.size_bytes <= 20_000
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert np.shape([json.loads(line)["by_timestep"] for line in lines]) == (3, 4)


def test_a_run_is_continued_without_the_data_of_its_tasks(tmp_path: Path) -> None:
    """R and the weights are those of the run that still had it; even a sheet of samples needs none."""
    photos = class_folders(tmp_path / "photos")
    small = config(tasks=(parse_task(f"photos=imagefolder:{photos}"),), steps=1)
    finish(Trainer(small, tmp_path / "first"))
    more = config(tasks=TASKS[:1], steps=1, learning_rate=2e-3, sample_every=1, eval_steps=2)
    finish(Trainer(continue_run(tmp_path / "first", tmp_path / "with", more), tmp_path / "with", resume=True))
    shutil.rmtree(photos)
    shutil.rmtree(tmp_path / "first" / "cache")
    finish(Trainer(continue_run(tmp_path / "first", tmp_path / "without", more), tmp_path / "without", resume=True))
    results, expected = (
        json.loads((tmp_path / name / "results.json").read_text("utf-8")) for name in ("without", "with")
    )
    assert results == expected
    assert results["values"][1][0]["loss"] > 0
    assert results["conditions"].endswith("averaged weights; the row after photos: --eval-steps 1")
    found = weights(tmp_path / "without")
    assert all(torch.equal(t, found[name]) for name, t in weights(tmp_path / "with").items())
    checkpoint = tmp_path / "without" / "checkpoint"
    assert "red rose" in (checkpoint / "prompts.txt").read_text("utf-8")
    card = (checkpoint / "README.md").read_text("utf-8")
    assert "| Optimization | `--learning-rate` | 0.002 |" in card
    assert "Earlier tasks were trained with other settings:" in card
    assert "| photos | `--learning-rate` | 0.001 |" in card
    assert "| photos | `--steps`" not in card


def test_a_task_that_rs_metric_is_not_measured_on_is_named(one_task: Path, tmp_path: Path) -> None:
    """The garden's run goes on with photographs, of which the judge knows nothing: R has no value there."""
    photos = class_folders(tmp_path / "photos")
    more = config(tasks=(parse_task(f"photos=imagefolder:{photos}"),))
    said: list[str] = []
    Trainer(continue_run(one_task, tmp_path / "run", more), tmp_path / "run", resume=True, say=said.append)
    assert said == ["R is prompt_accuracy, which is not measured on photos: --quality loss is on all new rows"]


def test_the_kept_evaluation_set_follows_eval_images_and_serves_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer images are the first of the kept ones, more are made from the data, or refused before training."""
    photos = class_folders(tmp_path / "photos")
    for broken in ("red_rose/broken.jpg", "red_rose/cut.png", "blue bell/tiny.png"):
        (photos / broken).unlink()
    first, small = tmp_path / "first", config(tasks=(parse_task(f"photos=imagefolder:{photos}"),), steps=1)
    finish(Trainer(small, first))
    evaluator = Trainer(small, first, resume=True).evaluator

    def kept(images: int) -> EvaluationSet:
        return replace(evaluator, images=images).evaluation_set(small.tasks[0])

    assert len(kept(3).asked.prompts) == 3
    found = kept(2)
    assert [len(part) for part in (found.asked.prompts, found.asked.references, found.latents)] == [2, 2, 2]
    shutil.rmtree(photos)
    with pytest.raises(InputError, match=r"--eval-images 5 is more than the 3 that the run kept of photos.*: use 3"):
        kept(5)
    joined = continue_run(first, tmp_path / "more", config(tasks=TASKS[:1], eval_images=5))
    with pytest.raises(InputError, match="--eval-images 5 is more"):
        Trainer(joined, tmp_path / "more", resume=True)
    monkeypatch.setattr(
        ImageMetrics, "measure", lambda _, images, references, *__: {"kid": len(images), "fid": len(references)}
    )
    done = run("eval", first, "--json", "--images", 4, "--steps", 1, cwd=tmp_path)
    assert "photos: 3 images: the run kept no more" in done.stderr
    assert json.loads(done.stdout)["scores"] == {"photos": {"kid": 3, "fid": 3}}
    assert json.loads(done.stdout)["conditions"].startswith("3 images a task")


def test_the_state_of_the_tenth_task_is_newer_than_the_ninths(tmp_path: Path) -> None:
    for name in ("00000090-9", "00000090-10", "00000085-9", "copy"):
        (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / name / "state.json").write_text("{}")
    assert [path.name for path in list_states(tmp_path)] == ["00000090-10", "00000090-9", "00000085-9", "copy"]


def test_a_state_that_is_removed_as_it_is_read_makes_room_for_the_newest(
    two_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run itself, with --keep 1, while another process exports it; a damaged one is still named."""
    newest, older = list_states(two_tasks)[:2]
    states = tmp_path / "state"
    shutil.copytree(older, states / older.name)

    def load_late(path: Path) -> dict[str, torch.Tensor]:
        if path.parent.name == older.name:
            shutil.copytree(newest, states / newest.name)
            shutil.rmtree(path.parent)
        return load_file(path)

    monkeypatch.setattr("kdc_edge.train.runs.states.load_file", load_late)
    assert load_state(tmp_path)[0] == load_state(two_tasks)[0]
    (states / newest.name / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{newest.name} is damaged: .* remove it"):
        load_state(tmp_path)


def test_another_teacher_than_the_runs_is_refused(one_task: Path, tmp_path: Path) -> None:
    """Where the old folder is gone, --teacher says where it is now: the weights tell whether it is."""
    run = Path(shutil.copytree(one_task, tmp_path / "run"))
    moved, other = (Path(shutil.copytree(GARDEN_TEACHER, tmp_path / name)) for name in ("moved", "other"))
    tuned = load_file(other / UNET)
    save_file(tuned | {"conv_out.bias": tuned["conv_out.bias"] + 1}, other / UNET)
    ours = config(tasks=TASKS[:1])
    (run / "config.json").write_text(json.dumps(replace(ours, teacher=tmp_path / "gone").as_json()))
    check_run(replace(ours, teacher=moved), run, resume=True)
    with pytest.raises(InputError, match=rf"other is not the run's teacher, its {UNET} differs"):
        check_run(replace(ours, teacher=other), run, resume=True)
    (run / "teacher.json").unlink()  # as runs of earlier versions are: the next start notes which one it is
    Trainer(replace(ours, teacher=other), run, resume=True)
    assert TrainConfig.load(run).teacher == other
    (run / "config.json").write_text(json.dumps(replace(ours, teacher=tmp_path / "gone").as_json()))
    with pytest.raises(InputError, match="moved is not the run's teacher"):
        check_run(replace(ours, teacher=moved), run, resume=True)


def test_resuming_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """Instead of training the garden in it."""
    (tmp_path / "run").mkdir()
    found = CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path / "run"), "--dry-run"])
    assert isinstance(found.exception, InputError)
    assert "holds no run to resume" in str(found.exception)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_is_going_on_is_not_resumed_beside_itself(one_task: Path, tmp_path: Path) -> None:
    """Both would write its states and its log."""
    run = Path(shutil.copytree(one_task, tmp_path / "run"))
    (link := tmp_path / "latest").symlink_to(run)
    with sole_writer(run):
        found = CliRunner().invoke(app, ["train", "--resume", "--out", str(link), "--steps", "4"])
    assert isinstance(found.exception, InputError)
    assert "is being written by another process" in str(found.exception)
    assert load_state(run)[0] == load_state(one_task)[0]


def test_trainings_that_start_at_once_take_different_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give them back where they are refused."""
    monkeypatch.chdir(tmp_path)
    assert [take_run(), take_run()] == [Path("runs/001"), Path("runs/002")]
    (tmp_path / "runs" / "001" / "config.json").touch()
    for number in ("001", "002"):
        give_back(Path("runs", number))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["001"]

    def refuse(_: TrainConfig, run: Path, **__: object) -> None:
        raise InputError(f"{run} {run.is_dir()}")

    monkeypatch.setattr("kdc_edge.train.loop.Trainer", refuse)
    found = CliRunner().invoke(app, ["train"])
    assert str(found.exception) == f"{Path('runs', '002')} True"
    assert not (tmp_path / "runs" / "002").exists()


def test_a_dry_run_needs_no_more_data_than_the_run(
    one_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the earlier run's tasks may be gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdc_edge.train.tools.plan._activations", lambda *_: 0)
    run = Path(shutil.copytree(one_task, tmp_path / "run"))
    without = replace(TrainConfig.load(run), tasks=(Task("flowers", "imagefolder:gone"),))
    (run / "config.json").write_text(json.dumps(without.as_json()))
    found = CliRunner().invoke(app, ["train", "--dry-run", "--continue-from", str(run), "--task", "fish=garden:fish"])
    assert "steps 3, samples seen 12" in found.output


def test_a_run_keeps_its_metric_where_more_can_be_measured_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started without weight files and continued with them; --quality names another one."""
    photos = class_folders(tmp_path / "photos")
    one, two = (parse_task(f"{name}=imagefolder:{photos}") for name in ("one", "two"))
    finish(Trainer(config(tasks=(one,), steps=1), tmp_path / "first"))
    monkeypatch.setattr(ImageMetrics, "measure", lambda *_: {"kid": 0.125})
    monkeypatch.setattr(ImageMetrics, "measurable", lambda *_: {"kid"})
    results = {}
    for quality in ("auto", "kid"):
        out = tmp_path / quality
        joined = continue_run(tmp_path / "first", out, config(tasks=(two,), steps=1, quality=quality))
        finish(Trainer(joined, out, resume=True))
        results[quality] = json.loads((out / "results.json").read_text("utf-8"))
    assert results["auto"]["metric"] == "-loss"
    losses = results["auto"]["-loss"]
    assert results["auto"]["backward_transfer"] == pytest.approx(losses[1][0] - losses[0][0])
    assert results["auto"]["matrices"] == {"-loss": losses, "-kid": [[None], [-0.125, -0.125]]}
    assert results["auto"]["networks"].keys() == {"kid"}
    assert results["kid"]["metric"] == "-kid"
    assert results["kid"]["backward_transfer"] is None
    assert results["kid"]["average"] == -0.125
