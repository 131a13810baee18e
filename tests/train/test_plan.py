"""Before and beside the training: the plan, the benchmark, the trackers, and what a loop's switches compute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from PIL import Image

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError, MissingPackageError
from kdc_edge.presets import find_preset
from kdc_edge.train.checkpoint import init_checkpoint
from kdc_edge.train.config import LossWeights
from kdc_edge.train.loop import Trainer
from kdc_edge.train.runs.snapshot import write_snapshot
from kdc_edge.train.stepping import StepDone
from kdc_edge.train.tools.benchmark import OURS, PLAIN_FP32, measure, measure_run
from kdc_edge.train.tools.plan import _activations, make_plan, norms_in_fp32, peak_bytes, step_bytes
from tests.cli.test_commands import run
from tests.train.test_loop import TASKS, config


@pytest.fixture(name="_other_precision")
def other_precision() -> Iterator[None]:
    """accelerate keeps one precision a process; a test of another one starts and ends without it."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def first_losses(run: Path, **changes: object) -> dict[str, float]:
    """Of one step, without evaluation."""
    trainer = Trainer(config(tasks=TASKS[:1], **changes), run)
    event = next(iter(trainer.run()))
    assert isinstance(event, StepDone)
    return event.losses


def test_the_plan_counts_what_the_run_will_do() -> None:
    plan = make_plan(config(steps=50, batch_size=8, keep=3))
    assert (plan.steps, plan.samples_seen, plan.image_size) == (100, 800, 64)
    assert plan.student_parameters == find_preset("garden-student").unet_parameters
    assert plan.latents_bytes_per_sample == 2 * 2 * 2 * 4 * 16 * 16  # mean and deviation, two sides, fp16
    teacher = find_preset("garden-teacher").unet_parameters
    at_least = 4 * teacher + 20 * plan.student_parameters
    assert at_least < plan.weights_bytes < at_least + 20e6
    assert plan.state_bytes == 16 * plan.student_parameters


def test_the_plan_counts_the_features_of_blocks() -> None:
    assert make_plan(config()).activation_bytes > make_plan(config(loss=LossWeights(feature=0.0))).activation_bytes


def test_the_plan_counts_what_an_objective_and_a_strategy_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score network with its optimizer, an earlier student, Fisher information."""
    monkeypatch.setattr("kdc_edge.train.tools.plan._activations", lambda *_: 0)
    plain, ours = make_plan(config()), find_preset("garden-student").unet_parameters
    found = {
        name: make_plan(config(**changes))
        for name, changes in {
            "score": {"objective": "distribution"}, "previous": {"replay_teacher": "student"},
            "lwf": {"strategy": "lwf"}, "ewc": {"strategy": "ewc"},
        }.items()
    }  # fmt: skip
    more = {name: (plan.weights_bytes - plain.weights_bytes) / ours for name, plan in found.items()}
    assert more == {"score": 16, "previous": 4, "lwf": 4, "ewc": 8}
    saved = {name: (plan.state_bytes - plain.state_bytes) / ours for name, plan in found.items()}
    assert saved == {"score": 12, "previous": 4, "lwf": 4, "ewc": 8}


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing() -> None:
    def count(batch: int, *, checkpointing: bool) -> int:
        return _activations(find_preset("garden-student").unet, batch, 16, checkpointing, None)

    one, four = (count(n, checkpointing=False) for n in (1, 4))
    assert 3.9 < four / one < 4.1
    assert count(4, checkpointing=True) < four / 2


def test_activations_are_what_backward_keeps() -> None:
    """The same count on real tensors."""
    torch.manual_seed(0)
    student = UNet2DConditionModel(**find_preset("garden-student").unet)
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        sample = student(torch.randn(2, 4, 16, 16), torch.zeros(2, dtype=torch.long), torch.randn(2, 77, 128)).sample
    assert sample.requires_grad
    planned = _activations(find_preset("garden-student").unet, 2, 16, False, None)
    assert planned == pytest.approx(sum(kept.values()), rel=0.1)


def test_mixed_precision_is_counted_as_autocast_keeps_it() -> None:
    """The same count on real tensors: 16-bit copies of weights and activations, 32 bits around normalizations."""
    torch.manual_seed(0)
    student = UNet2DConditionModel(**find_preset("garden-student").unet)
    norms_in_fp32(student)
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        sample = student(torch.randn(2, 4, 16, 16), torch.zeros(2, dtype=torch.long), torch.randn(2, 77, 128)).sample
    assert sample.requires_grad
    planned, whole = (
        _activations(find_preset("garden-student").unet, 2, 16, False, dtype) for dtype in (torch.bfloat16, None)
    )
    assert planned == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.1)
    assert planned > 2 * find_preset("garden-student").unet_parameters
    assert 0.6 * whole < planned - 2 * find_preset("garden-student").unet_parameters < whole


@pytest.mark.parametrize(
    ("batch", "checkpointing", "measured_gb"), [(4, False, 14.84), (64, False, 66.95), (64, True, 26.69)]
)
def test_the_482m_students_peak_is_what_a_gpu_measured(
    monkeypatch: pytest.MonkeyPatch, batch: int, checkpointing: bool, measured_gb: float
) -> None:
    """Under the full teacher on an H200 (docs/benchmarks/training.md); workspaces are the difference."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    student, teacher = find_preset("kdc-482m"), find_preset("sd1-teacher")
    frozen = 83_653_863 + 123_060_480  # the VAE's and the text encoder's parameters
    weights = 2 * teacher.unet_parameters + 4 * frozen + 20 * student.unet_parameters
    activations = step_bytes(student.unet, batch, 64, checkpointing, torch.bfloat16, features=True)
    planned = peak_bytes(weights, 4 * student.unet_parameters, activations, accumulates=False)
    assert 0.95 * measured_gb < planned / 1e9 < measured_gb


def test_the_plan_is_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = make_plan(config(batch_size=8))
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = make_plan(config(batch_size=8))
    assert 1.9 < alone.activation_bytes / shared.activation_bytes < 2.1
    assert shared.lines()[2].startswith("memory of each of 2 processes about ")
    assert alone.text_bytes_per_caption == 77 * 128 * 2


def test_the_benchmark_measures_both_recipes_and_where_time_goes(tmp_path: Path) -> None:
    small = config(tasks=TASKS[:1], batch_size=2)
    for recipe, encodes in ((OURS, True), (PLAIN_FP32, False)):
        speed = measure(recipe, small, 3)
        assert set(speed.shares) == {"data", "teacher", "student", "optimizer"}
        assert 0.8 < sum(speed.shares.values()) <= 1.01
        assert json.loads(speed.lines()[-1])["images_per_sec"] == pytest.approx(2000 / speed.step_ms, rel=1e-3)
        assert (speed.prepare_sec > 0) == encodes
        assert speed.peak_memory_bytes > 100e6
    with pytest.raises(InputError, match="--benchmark 0"):
        measure_run(small, tmp_path / "none", 0)


def test_checkpointing_and_memory_layout_change_nothing(tmp_path: Path) -> None:
    plain = first_losses(tmp_path / "plain")
    for name in ("gradient_checkpointing", "channels_last"):
        assert first_losses(tmp_path / name, **{name: True}) == pytest.approx(plain, rel=1e-4)


@pytest.mark.usefixtures("_other_precision")
def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    low = first_losses(tmp_path / "low", mixed_precision="bf16")
    AcceleratorState._reset_state(True)
    high = first_losses(tmp_path / "high")
    assert low == pytest.approx(high, rel=0.1)
    assert low != high


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every input's
def test_compiled_blocks_compute_the_same(tmp_path: Path) -> None:
    assert first_losses(tmp_path / "a", compile=True) == pytest.approx(first_losses(tmp_path / "b"), rel=1e-3)


def test_a_constant_rate_and_a_smaller_image(tmp_path: Path) -> None:
    trainer = Trainer(
        config(tasks=TASKS[:1], schedule="constant", warmup=0, resolution=32, sample_every=2), tmp_path / "run"
    )
    events = [e for e in trainer.run() if isinstance(e, StepDone)]
    assert [e.learning_rate for e in events] == [1e-3] * 3
    assert trainer.teacher.latents(TASKS[0]).shards[0][0].shape[-1] == 8
    with Image.open(tmp_path / "run" / "samples" / "00000002.png") as sheet:
        assert sheet.width >= 4 * 32
    checkpoints = tmp_path / "run" / "checkpoint", write_snapshot(tmp_path / "run")
    assert [read_model(folder).image_size for folder in checkpoints] == [32, 32]  # so that it makes such images


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"resolution": 60}, InputError, "--resolution 60 does not fit this teacher: use a multiple of 32"),
        ({"mixed_precision": "fp16", "device": "cpu"}, InputError, "--mixed-precision fp16 needs a CUDA device"),
        ({"log_with": "wandb"}, MissingPackageError, r"--log-with wandb needs wandb, .* 'kdc-edge\[wandb\]'"),
        ({"device": "cuda"}, InputError, "--device cuda is not here"),
        ({"cuda_graphs": True}, InputError, "--cuda-graphs needs a CUDA device and a run of one process"),
        ({"cuda_graphs": True, "gradient_checkpointing": True}, InputError, "exclude each other"),
        ({"cuda_graphs": True, "strategy": "lwf"}, InputError, "an earlier student teaches some samples alone"),
    ],
)
def test_what_this_machine_cannot_do_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], error: type[Exception], words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=words):
        Trainer(config(**changes), tmp_path / "run")


def test_tensorboard_has_every_steps_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in Trainer(config(tasks=TASKS[:1], log_with="tensorboard", sample_every=3), tmp_path / "run").run():
        pass
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in found.Scalars("loss/total")] == [1, 2, 3]
    logged = [
        json.loads(line)["losses"]["total"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    assert [e.value for e in found.Scalars("loss/total")] == pytest.approx(logged)
    assert len(found.Tags()["images"]) == 1


def test_velocity_prediction_has_the_velocity_as_target(tmp_path: Path) -> None:
    """A student that answers with v = sqrt(a) noise - sqrt(1 - a) sample has no task loss."""
    trainer = Trainer(config(tasks=TASKS[:1]), tmp_path / "run")
    objective, batch = trainer.objective, trainer.draw_batch(trainer.teacher.latents(TASKS[0]))
    objective.schedule = replace(objective.schedule, prediction_type="v_prediction")
    a = objective.alphas_cumprod[batch.timestep].view(-1, 1, 1, 1)

    class Perfect(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, hidden: torch.Tensor) -> object:
            answer = trainer.student.network(noisy, timestep, hidden)
            answer.sample = a.sqrt() * batch.noise - (1 - a).sqrt() * batch.sample
            return answer

    with torch.no_grad():
        terms = objective(Perfect(), batch, trainer.teacher.embed(batch.captions))
    assert terms["task"].max() < 1e-10


@pytest.mark.full
def test_one_step_of_the_482m_student_under_the_full_teacher_fits_24_gib(tmp_path: Path) -> None:
    """512 pixels, batch 1, random weights, in a process of its own: what it says of its peak memory."""
    init_checkpoint(tmp_path / "teacher", find_preset("sd1-teacher"), None, seed=1)
    done = run(
        "train", "--teacher", "teacher", "--student", "kdc-482m", "--task", "flowers=garden:flowers", "--samples", 2,
        "--batch-size", 1, "--gradient-checkpointing", "--learning-rate", 5e-5, "--benchmark", 1, cwd=tmp_path,
    )  # fmt: skip
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["peak_memory_bytes"] < 24 * 2**30
    assert measured["step_ms"] > 0
