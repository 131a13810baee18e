"""Training on a CUDA device: `pytest -m gpu tests/train/test_gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

from kdc_edge.train.loop import Trainer
from kdc_edge.train.stepping import StepDone
from tests.train.test_loop import TASKS, config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
]  # of its own versions


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    """accelerate keeps one device and precision a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def losses(run: Path, *, until: int | None = None, **changes: object) -> tuple[list[float], Trainer]:
    """The totals of the first `until` steps, of all where None; the run goes no further."""
    AcceleratorState._reset_state(True)
    resume = bool(changes.pop("resume", False))
    trainer = Trainer(
        config(**{"tasks": TASKS[:1], "save_every": 2, "steps": 6, "device": "cuda", **changes}), run, resume=resume
    )
    found: list[float] = []
    for event in trainer.run():
        if isinstance(event, StepDone):
            found.append(event.losses["total"])
        if len(found) == until:
            break
    return found, trainer


def test_the_curve_is_the_cpus(tmp_path: Path) -> None:
    cpu, _ = losses(tmp_path / "cpu", device="cpu", mixed_precision="no")
    gpu, trainer = losses(tmp_path / "gpu", mixed_precision="no")
    assert trainer.view.device.startswith("cuda")
    assert gpu == pytest.approx(cpu, rel=0.01)  # TF32
    bf16, trainer = losses(tmp_path / "bf16")
    assert {p.dtype for p in trainer.teacher.unet.parameters()} == {torch.bfloat16}
    assert bf16 == pytest.approx(cpu, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16", "accumulate": 2, "batch_size": 4},
        {"mixed_precision": "bf16", "objective": "phased"},
        {"mixed_precision": "bf16", "strategy": "ewc", "tasks": TASKS[:2], "steps": 3},
    ],
    ids=lambda changes: " ".join(str(v) for v in changes.values() if not isinstance(v, tuple)),
)
def test_cuda_graphs_give_the_curve_and_resume(tmp_path: Path, changes: dict[str, object]) -> None:
    eager, _ = losses(tmp_path / "eager", **changes)
    graphs, _ = losses(tmp_path / "graphs", cuda_graphs=True, **changes)
    assert graphs == pytest.approx(eager, rel=0.02)
    first, _ = losses(tmp_path / "cut", cuda_graphs=True, until=3, **changes)
    rest, _ = losses(tmp_path / "cut", cuda_graphs=True, resume=True, **changes)
    assert [*first[: len(eager) - len(rest)], *rest] == pytest.approx(eager, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_goes_on_with_the_curve(tmp_path: Path, precision: str) -> None:
    whole, _ = losses(tmp_path / "whole", mixed_precision=precision)
    first, trainer = losses(tmp_path / "cut", mixed_precision=precision, until=3)
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    rest, _ = losses(tmp_path / "cut", mixed_precision=precision, resume=True)
    assert [*first[:2], *rest] == pytest.approx(whole, rel=0.02)  # not every kernel adds in one order


def test_compiled_blocks_train_alike_and_evaluations_compile_nothing(tmp_path: Path) -> None:
    eager, _ = losses(tmp_path / "eager", mixed_precision="bf16")
    torch.compiler.reset()
    counters.clear()
    compiled, trainer = losses(tmp_path / "compiled", mixed_precision="bf16", compile=True, until=2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    trainer.evaluate()
    assert counters["stats"]["unique_graphs"] == graphs
    assert compiled == pytest.approx(eager[:2], rel=0.05)
