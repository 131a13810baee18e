"""Several processes compute what one computes: the same curve, and the same weights but for the order of sums."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdc_edge.errors import InputError
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.loop import Trainer
from kdc_edge.train.runs.states import list_states
from tests.forks import Fork
from tests.train.test_loop import TASKS, config

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
SHARD = 5  # entries: of 12 the first process encodes 7
WEIGHTS = "checkpoint/unet/diffusion_pytorch_model.safetensors"
# What the processes run: the same configuration as `settings` below.
PROGRAM = """
import sys
from pathlib import Path
from kdc_edge.train.data import cache
from kdc_edge.train.loop import Trainer
from tests.train.test_distributed import SHARD, scores, settings
run = Path(sys.argv[1])
trainer = Trainer(settings(), run)
if trainer.view.processes == 2:  # more would take a second each
    run.with_name(f"scores-{trainer.accelerator.process_index}").write_text(scores(trainer))
cache.SHARD_ENTRIES = SHARD
encode, encoded = cache.encode_images, []
cache.encode_images = lambda vae, images, **options: encoded.append(len(images)) or encode(vae, images, **options)
for _ in trainer.run():
    pass
run.with_name(f"encoded-{trainer.accelerator.process_index}").write_text(str(sum(encoded)))
"""

# The launcher starts these, which tell what it sets; forks that have PyTorch in memory compute in their place.
LAUNCHED = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / os.environ["RANK"]).write_text(json.dumps(dict(os.environ)) + "\\n")
while not (folder / "done").exists():
    time.sleep(0.02)
"""

# accelerate shards on GPUs only, torch on CPUs as well: told that this launch is sharded, it prepares one.
SHARDED = """
import sys
from pathlib import Path
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from kdc_edge.train import loop
from tests.train.test_distributed import settings
make = loop.make_accelerator
def sharded(*args):
    accelerator = make(*args)
    type(accelerator.state).distributed_type = property(lambda self: DistributedType.FSDP)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    return accelerator
loop.make_accelerator = sharded
run = Path(sys.argv[1])
trainer = loop.Trainer(settings(), run)
assert all(isinstance(p, DTensor) for p in trainer.student.prepared.parameters())
for event in trainer.run():
    if event.total == 3:
        break  # one step after the state that was saved
expected = trainer.unet().state_dict()
if trainer.accelerator.is_main_process:
    save_file(expected, run / "expected.safetensors")
for _ in loop.Trainer(settings(), run, resume=True).run():
    pass
"""

# One process encodes and the other waits for it; no image of the task can be read.
BROKEN = """
import os, sys
from pathlib import Path
from kdc_edge.errors import KdcError
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.loop import Trainer
from tests.train.test_distributed import settings
run = Path(sys.argv[1])
broken = settings(tasks=(Task("photos", f"imagefolder:{run.parent / 'photos'}"),))
try:
    next(Trainer(broken, run).run())
except KdcError as error:
    run.with_name(f"said-{os.environ['RANK']}").write_text(str(error))
"""

# The command line, in the run that is given and its continuation.
CONTINUED = """
import sys
from pathlib import Path
from kdc_edge.cli.app import app
run = Path(sys.argv[1])
app(["train", "--device", "cpu", "--continue-from", str(run.parent / "first"), "--task", "fish=garden:fish",
     "--steps", "1", "--out", str(run)], standalone_mode=False)
"""

# The command line; the second process is killed behind a step.
KILLED = """
import os, signal, sys
from kdc_edge.cli import main
from kdc_edge.train.loop import Trainer
step = Trainer._step
def step_and_die(trainer, *arguments):
    if trainer.position.total == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *arguments)
Trainer._step = step_and_die
sys.argv = ["kdc-edge", "train", "--resume", "--out", sys.argv[1]]
main()
"""

# One process writes the temporary run that both measure.
BENCHMARK = """
import contextlib, io, os, sys
from pathlib import Path
from kdc_edge.cli.app import app
with contextlib.redirect_stdout(io.StringIO()) as said:
    app(["train", "--device", "cpu", "--task", "flowers=garden:flowers", "--samples", "4", "--batch-size", "2",
         "--benchmark", "1"], standalone_mode=False)
Path(sys.argv[1]).with_name(f"said-{os.environ['RANK']}").write_text(said.getvalue())
"""


def settings(**changes: object) -> TrainConfig:
    return config(**{"tasks": TASKS[:1], "save_every": 2} | changes)


def scores(trainer: Trainer) -> str:
    """Of the teacher, on images of two batches and on held-out latents: all that is found, to the last bit."""
    evaluator = replace(trainer.evaluator, images=18, garden_loss=True)
    return repr(evaluator.score(trainer.teacher.unet, TASKS[0], network=trainer.teacher.unet))


def losses(run: Path) -> torch.Tensor:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return torch.tensor([list(r["losses"].values()) for r in records])


def test_two_gloo_processes_have_the_curve_and_the_scores_of_one(one_task: Path, tmp_path: Path) -> None:
    """Started by PyTorch's launcher, as a user does."""
    launched = tmp_path / "launched"
    launched.mkdir()
    (tmp_path / "launched.py").write_text(LAUNCHED)
    flags = "--standalone", "--nproc_per_node", 2, tmp_path / "launched.py", launched
    launcher = Fork(
        "import sys; from torch.distributed.run import main; main(sys.argv[1:])", *flags,
        cwd=tmp_path, output=tmp_path / "launcher", environment=ENVIRONMENT,
    )  # fmt: skip
    for rank in ("0", "1"):
        launcher.wait_for(launched / rank, lines=1)
    run_in_processes(
        PROGRAM, tmp_path / "run", [json.loads((launched / rank).read_text("utf-8")) for rank in ("0", "1")]
    )
    (launched / "done").touch()
    assert launcher.wait() == 0, launcher.err[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = scores(Trainer(settings(), tmp_path / "alone"))
    torch.set_num_threads(threads)
    assert [(tmp_path / f"scores-{rank}").read_text("utf-8") for rank in (0, 1)] == [expected] * 2
    torch.testing.assert_close(losses(tmp_path / "run"), losses(one_task), rtol=1e-4, atol=1e-6)
    assert distance(tmp_path / "run", one_task) < 1e-4
    assert [(tmp_path / f"encoded-{rank}").read_text("utf-8") for rank in (0, 1)] == ["7", "5"]
    assert len(list((tmp_path / "run" / "cache").glob("text-*/shard-*"))) == 2  # captions, a share each


def test_four_gloo_processes_have_the_curve_of_one_too(one_task: Path, tmp_path: Path) -> None:
    """One of them has no image to encode, two have none to evaluate."""
    run_in_processes(PROGRAM, tmp_path / "run", what_a_launcher_sets(4))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(one_task), rtol=1e-4, atol=1e-6)
    assert distance(tmp_path / "run", one_task) < 1e-4
    assert [(tmp_path / f"encoded-{rank}").read_text("utf-8") for rank in range(4)] == ["5", "5", "2", "0"]
    found, expected = (json.loads((run / "results.json").read_text("utf-8")) for run in (tmp_path / "run", one_task))
    assert found["values"][0][0] == pytest.approx(expected["values"][0][0], rel=1e-2)


def test_two_processes_that_share_the_weights_out_have_it_too(one_task: Path, tmp_path: Path) -> None:
    """FSDP: the curve, the checkpoint, and the same weights to the last bit after a resume."""
    run_in_processes(SHARDED, tmp_path / "run")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(one_task), rtol=1e-4, atol=1e-6)
    assert distance(tmp_path / "run", one_task) < 1e-4
    ours, expected = load_file(tmp_path / "run" / WEIGHTS), load_file(tmp_path / "run" / "expected.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_a_failure_of_the_main_process_ends_the_one_that_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "photos" / "roses").mkdir(parents=True)
    (tmp_path / "photos" / "roses" / "0.jpg").write_bytes(b"broken")
    run_in_processes(BROKEN, tmp_path / "run")
    main, waiting = ((tmp_path / f"said-{rank}").read_text("utf-8") for rank in (0, 1))
    assert main.startswith("photos: none of 1 images in ")
    assert waiting == f"the main process failed: {main}"


def test_a_killed_process_ends_the_other_with_a_line_and_the_run_goes_on(one_task: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(settings().as_json()))  # a state every 2 steps of 3
    main, killed = start(KILLED, run, what_a_launcher_sets())
    assert killed.wait() == -signal.SIGKILL
    assert main.wait(timeout_sec=60) == 1
    assert main.err.splitlines()[-1].startswith("kdc-edge: ")
    assert [state.name for state in list_states(run)] == ["00000002-0"]
    for _ in Trainer(settings(), run, resume=True).run():
        pass
    torch.testing.assert_close(losses(run), losses(one_task), rtol=1e-4, atol=1e-6)


def test_two_processes_are_measured_together(tmp_path: Path) -> None:
    run_in_processes(BENCHMARK, tmp_path / "run")
    main, other = ((tmp_path / f"said-{rank}").read_text("utf-8") for rank in (0, 1))
    measured = json.loads(main.splitlines()[-1])
    assert (measured["batch_size"], measured["steps"]) == (2, 1)
    assert other == ""


def test_two_processes_continue_one_run(one_task: Path, tmp_path: Path) -> None:
    """One of them prepares the folder."""
    shutil.copytree(one_task, tmp_path / "first")
    run_in_processes(CONTINUED, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert [len(row) for row in results["prompt_accuracy"]] == [1, 2]


def what_a_launcher_sets(processes: int = 2) -> list[dict[str, str]]:
    """The environment of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start(program: str, folder: Path, environments: list[dict[str, str]]) -> list[Fork]:
    """A process of the program for each environment."""
    return [
        Fork(program, folder, cwd=folder.parent, output=folder.with_name(f"rank-{rank}"), environment=environment)
        for rank, environment in enumerate(environments)
    ]


def run_in_processes(program: str, folder: Path, environments: list[dict[str, str]] | None = None) -> None:
    """In two where no environments are given."""
    processes = start(program, folder, environments or what_a_launcher_sets())
    assert {process.wait() for process in processes} == {0}, [process.err[-2000:] for process in processes]


def distance(run: Path, other: Path) -> float:
    """Of the weights, relative: Adam turns the rounding of a gradient near zero into a whole step."""
    ours, theirs = load_file(run / WEIGHTS), load_file(other / WEIGHTS)
    apart = torch.cat([(ours[n] - t).flatten() for n, t in theirs.items()]).norm()
    return float(apart / torch.cat([t.flatten() for t in theirs.values()]).norm())


def test_accumulated_parts_have_the_curve_of_the_whole_batch(one_task: Path, tmp_path: Path) -> None:
    for _ in Trainer(settings(accumulate=2), tmp_path / "run").run():
        pass
    torch.testing.assert_close(losses(tmp_path / "run"), losses(one_task), rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--batch-size 4 does not divide into 1 processes x --accumulate 3"):
        Trainer(settings(accumulate=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
