"""The quickstart's trainings, two at a time: in this process, and in one beside it, each with half of the cores.

    trained = train(config, Path("quickstart/runs"), Path("quickstart/bundles/onnx-fp16"))

A training on all cores waits at every layer for the slowest of them: on a busy machine it loses most of its speed. Two
processes and not two threads, because diffusers changes torch for all threads while it opens a network.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kdc_edge.cli.project import command_line
from kdc_edge.errors import KdcError, explain
from kdc_edge.files import read_json, write_atomic
from kdc_edge.processes import python_module
from kdc_edge.settings import arguments
from kdc_edge.train.config import FEW_STEP_STAGE, DecoderConfig, TrainConfig

if TYPE_CHECKING:
    from kdc_edge.bundle import Bundle
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.networks import RunView
    from kdc_edge.train.runs.states import Position
    from kdc_edge.train.tools.decoder import DecoderTrainer

DECODER, WITHOUT = "decoder", "no-replay"  # folders of what is trained beside
DECODER_BATCH = 8  # images
DECODER_IMAGES = 8  # of each task, which the small decoder is judged by


@dataclass(frozen=True)
class Run:
    """A finished run of two tasks."""

    folder: Path
    steps: int  # of each task
    position: Position

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


@dataclass(frozen=True)
class Trained:
    """The runs with and without replay, what follows the former, and the teacher's own prompt accuracy by task."""

    kept: Run
    bare: Run
    few_steps: Run
    view: RunView  # of the run with replay
    decoder: Path
    decoder_results: Mapping[str, Any]
    teacher: Mapping[str, float]


def train(config: TrainConfig, folder: Path, bundle: Path) -> Trained:
    """The student with replay and its few steps here; the small decoder and the student without replay beside.

    The first task is the same with and without replay, so it is trained once and the runs part after it. While the
    few-step stage is trained, the student with replay becomes the ONNX bundle.
    """
    from kdc_edge.cli.progress import ProgressBar
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.runs.continuing import begin_stage, branch_run

    stage = replace(config, **arguments(config, FEW_STEP_STAGE["phased"]["garden"]), objective="phased")
    stage = replace(stage, steps=max(1, config.steps // 4))
    kept = Trainer(config, folder / "replay")
    for task in config.tasks:
        kept.teacher.latents(task)  # encoded once, for all trainings
    decoding = DecoderConfig(
        tasks=config.tasks, checkpoint=config.teacher, samples=config.samples, steps=5 * config.steps // 4,
        batch_size=DECODER_BATCH, learning_rate=2e-3, seed=config.seed,
        eval_images=min(DECODER_IMAGES, config.eval_images), save_every=5 * config.steps // 4,
    )  # fmt: skip
    write_atomic(folder / DECODER / "config.json", json.dumps(decoding.as_json(), indent=2))
    shutil.copytree(kept.run_folder / "cache", folder / DECODER / "cache")
    with ProgressBar(3 * config.steps + 2 * stage.steps + decoding.steps) as progress:
        watch = Watch(lambda text: progress.step(progress.done + 1, text), progress.say)
        with _Beside(watch) as beside:
            beside.train(folder / DECODER)
            watch.run(kept, "student", until_task=1)
            branch_run(kept.run_folder, folder / WITHOUT, replace(config, replay=0))
            beside.train(folder / WITHOUT)
            watch.run(kept, "with replay", until_task=2)
            beside.export(kept.run_folder / "checkpoint", bundle)
            begin_stage(kept.run_folder, folder / "few-steps", stage)
            few_steps = Trainer(stage, folder / "few-steps", resume=True)
            watch.run(few_steps, "few steps", until_task=2)
    return Trained(
        _finished(kept.run_folder), _finished(folder / WITHOUT), _finished(few_steps.run_folder), kept.view,
        folder / DECODER / "decoder", read_json(folder / DECODER / "results.json", KdcError), beside.teacher,
    )  # fmt: skip


def export(checkpoint: Path, out: Path, command: str, decoder: Path | None = None) -> Bundle:
    """An ONNX bundle in 16 bits, proved and verified; `command` is for its record."""
    from kdc_edge.export.targets import ExportRequest, export_checkpoint

    request = ExportRequest(checkpoint, out, "onnx", "fp16", decoder=decoder, command=command)
    bundle = export_checkpoint(request)
    bundle.verify()
    return bundle


def _finished(run: Path) -> Run:
    from kdc_edge.train.runs.states import load_state

    return Run(run, TrainConfig.load(run).steps, load_state(run)[0])


class Watch:
    """Consumes trainings; what there is to say of them goes to `step`, after each step, and to `say`."""

    def __init__(self, step: Callable[[str], None], say: Callable[[str], None]) -> None:
        self._lock = Lock()
        self._step, self._say = step, say

    def step(self, text: str) -> None:
        with self._lock:
            self._step(text)

    def say(self, text: str) -> None:
        with self._lock:
            self._say(text)

    def run(self, trainer: Trainer, name: str, *, until_task: int) -> None:
        """Until so many tasks of the run are done."""
        from kdc_edge.train.stepping import StepDone

        for event in trainer.run():
            if isinstance(event, StepDone):
                self.step(f"{name}: {event.task} loss {event.losses['total']:.3f}")
            else:
                found = {task: score.quality for task, score in event.scores.items()}
                self.say(f"{name}, after {event.task}: {_accuracy(found)}")
                if len(trainer.position.matrix) == until_task < len(trainer.config.tasks):
                    return

    def decoder(self, trainer: DecoderTrainer) -> None:
        """To its end."""
        for event in trainer.run():
            self.step(f"decoder: {event.psnr_db:.1f} dB")
        found = ", ".join(f"{task} {db:.1f} dB" for task, db in trainer.results["psnr_db"].items())
        self.say(f"small decoder, against the VAE's: {found}")


def _accuracy(found: Mapping[str, float]) -> str:
    return "prompt accuracy " + ", ".join(f"{task} {quality:.3f}" for task, quality in found.items())


class _Beside:
    """The other process: it runs trainings and an export one after the other, and ends with the block."""

    def __init__(self, watch: Watch) -> None:
        import torch

        self._watch, self._failure = watch, ""
        self.teacher: dict[str, float] = {}  # its prompt accuracy by task
        self._cores = torch.get_num_threads()
        half = max(1, self._cores // 2)
        torch.set_num_threads(half)
        command, environment = python_module(__name__)
        self._child = subprocess.Popen(
            [*command, str(half)], env=environment | {"OMP_NUM_THREADS": str(half)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def train(self, run: Path) -> None:
        """Train the run that was begun in this folder, after what was asked before."""
        self._ask(train=str(run))

    def export(self, checkpoint: Path, out: Path) -> None:
        """Export the checkpoint, after what was asked before."""
        self._ask(checkpoint=str(checkpoint), out=str(out), command=command_line())

    def _ask(self, **work: str) -> None:
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: its failure is told at the end
            self._child.stdin.write(f"{json.dumps(work)}\n")
            self._child.stdin.flush()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            message = json.loads(line)
            self.teacher |= message.get("teacher", {})
            self._failure = message.get("failure", "")
            if "step" in message:
                self._watch.step(message["step"])
            if "say" in message:
                self._watch.say(message["say"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        torch.set_num_threads(self._cores)
        with self._child:  # closes its streams
            if error is not None:
                self._child.kill()
            assert self._child.stdin is not None
            with suppress(BrokenPipeError):
                self._child.stdin.close()
            try:
                self._reader.join()
                code = self._child.wait()
            except BaseException:
                self._child.kill()
                raise
        if error is None and code != 0:
            unknown = f"the training beside this one ended with {code}: most likely out of memory"
            raise KdcError(self._failure or unknown)


def _tell(**message: object) -> None:
    print(json.dumps(message), file=sys.__stdout__, flush=True)


def main() -> None:
    """In the other process: each line of stdin is a training that was begun, or an export."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends this process
    sys.stdout = sys.stderr  # no library's words among the messages
    torch.set_num_threads(int(sys.argv[1]))
    watch = Watch(lambda text: _tell(step=text), lambda text: _tell(say=text))
    for line in sys.stdin:
        work = json.loads(line)
        if "train" in work:
            _train(Path(work["train"]), watch)
        else:
            _tell(say=f"exporting {Path(work['out']).name} and proving it")
            export(Path(work["checkpoint"]), Path(work["out"]), work["command"])


def _train(run: Path, watch: Watch) -> None:
    if run.name == DECODER:
        decoding = DecoderConfig.load(run)
        from kdc_edge.train.tools.decoder import DecoderTrainer

        watch.decoder(DecoderTrainer(decoding, run, resume=True))
        return
    config = TrainConfig.load(run)  # before the import, which takes seconds
    from kdc_edge.train.loop import Trainer

    trainer = Trainer(config, run, resume=True)
    found = {task: score.quality for task, score in trainer.evaluate(teacher=True).items()}
    _tell(teacher=found, say=f"teacher: {_accuracy(found)}")
    watch.run(trainer, "without replay", until_task=len(config.tasks))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # told to the parent, whatever it is
        _tell(failure=explain(error))
        sys.exit(1)
