"""Two processes compute what one computes: the same curve, and the same weights but for the order of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdc_edge.errors import InputError
from kdc_edge.train.loop import Trainer
from tests.test_train import TASKS, config

ROOT = Path(__file__).parent.parent
WEIGHTS = "checkpoint/unet/diffusion_pytorch_model.safetensors"
# What the processes run: the same configuration as `settings` below.
PROGRAM = """
import sys
from pathlib import Path
from kdc_edge.train.loop import Trainer
from tests.test_distributed import settings
for _ in Trainer(settings(), Path(sys.argv[1])).run():
    pass
"""


def settings(**changes: object):  # type: ignore[no-untyped-def]
    return config(**({"tasks": TASKS[:1], "steps": 3, "batch_size": 4, "save_every": 2, "device": "cpu"} | changes))


def losses(run: Path) -> torch.Tensor:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([list(r["losses"].values()) for r in records])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    for _ in Trainer(settings(), run).run():
        pass
    return run


def test_two_gloo_processes_have_the_curve_of_one(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "program.py"), str(tmp_path / "run")],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone), rtol=1e-4, atol=1e-6)
    ours, theirs = load_file(tmp_path / "run" / WEIGHTS), load_file(alone / WEIGHTS)
    # Adam turns the rounding of a gradient near zero into a whole step, so a few weights differ by the learning rate.
    apart = torch.cat([(ours[n] - t).flatten() for n, t in theirs.items()]).norm()
    assert apart < 1e-4 * torch.cat([t.flatten() for t in theirs.values()]).norm()


def test_accumulated_parts_have_the_curve_of_the_whole_batch(alone: Path, tmp_path: Path) -> None:
    for _ in Trainer(settings(accumulate=2), tmp_path / "run").run():
        pass
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone), rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--batch-size 4 does not divide into 1 processes x --accumulate 3"):
        Trainer(settings(accumulate=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
