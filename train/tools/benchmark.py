"""Training speed by section of the step, beside a plain training recipe.

    kdc-edge train --benchmark 20                                    # this run's settings
    python -m kdc_edge.train.tools.benchmark --batch-size 1 4 16           # ours against the plain recipe, in turns

The plain recipe is what most scripts do: images and captions are encoded at every step, all weights are kept in 32
bits and run under fp16 autocast, nothing is compiled; optimizer, moving average, memory layout and TF32 are as their
libraries set them. CPUs compute fp16 slowly, so the recipe is measured without autocast as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.files import temporary_folder
from kdc_edge.train.checkpoint import GARDEN_TEACHER, find_teacher
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.batch import Batch
from kdc_edge.train.data.source import Sample, Selection, read_samples
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.distributed import make_accelerator
from kdc_edge.train.loop import Trainer
from kdc_edge.train.networks import Teacher, prepare_learning
from kdc_edge.train.objective import Stopwatch
from kdc_edge.train.stepping import StepDone

WARMUP = 2  # steps that are not counted
SHARE_STEPS = 4  # at most, behind the timed ones: telling the sections apart makes the device wait for the host
OURS, PLAIN_FP16, PLAIN_FP32 = RECIPES = ("cached-latents", "plain-fp16", "plain-fp32")


@dataclass(frozen=True)
class Speed:
    """A recipe's measured speed; shares are of the step's time."""

    recipe: str
    device: str
    batch_size: int
    steps: int
    images_per_sec: float
    step_ms: float  # the median
    peak_memory_bytes: int  # of the device, or of the process on a CPU
    shares: dict[str, float]  # data, teacher, student, optimizer
    prepare_sec: float  # encoding before the first step

    def lines(self) -> list[str]:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return [
            f"{self.recipe} on {self.device}: {self.images_per_sec:.2f} images/s, {self.step_ms:.1f} ms a step of"
            f" {self.batch_size} (median of {self.steps}), peak {self.peak_memory_bytes / 2**20:.0f} MiB",
            f"time: {parts}; encoding before the first step {self.prepare_sec:.1f} s",
            json.dumps(asdict(self)),
        ]


def measure(recipe: str, config: TrainConfig, steps: int) -> Speed:
    """One of RECIPES, in a folder that is gone afterwards. Raises KdcError where the device's memory is too small."""
    with temporary_folder() as folder:
        run = folder / "run"
        try:
            if recipe == OURS:
                return measure_run(config, run, steps)
            return measure_plain(config, run, steps, half=recipe == PLAIN_FP16)
        except torch.OutOfMemoryError:
            raise KdcError(f"{recipe}, batch {config.batch_size}: the device's memory is too small") from None


def measure_run(config: TrainConfig, run: Path, steps: int) -> Speed:
    """The speed of the first task's steps; raises InputError for fewer than one."""
    if steps < 1:
        raise InputError(f"--benchmark {steps} is too few: use 1 or more")
    most = WARMUP + steps + min(steps, SHARE_STEPS)
    config = replace(
        config, steps=most, save_every=most, log_with="none", sample_every=0, baselines=False, eval_images=2
    )
    watch = Stopwatch()
    trainer = Trainer(config, run, watch=watch)
    events = trainer.run()

    def step() -> None:
        if not isinstance(next(events), StepDone):
            raise RuntimeError("the run ended before the benchmark")

    cuda = trainer.view.device.startswith("cuda")
    return _time(step, OURS, config.batch_size, steps, watch, cuda=cuda, graphs=config.cuda_graphs)


def measure_plain(config: TrainConfig, run: Path, steps: int, *, half: bool) -> Speed:
    """The plain recipe on the same task, networks, loss and batch; `half` is under fp16 autocast."""
    config = replace(
        config, log_with="none", channels_last=False, compile=False, cuda_graphs=False, mixed_precision="no"
    )
    accelerator = make_accelerator(config, run)
    torch.set_float32_matmul_precision("highest")
    device: torch.device = accelerator.device

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.float16, enabled=half)

    watch = Stopwatch()
    model = read_model(config.teacher)
    learning = prepare_learning(config, model, accelerator, run, watch=watch, autocast=autocast)
    teacher, student, objective = learning.teacher, learning.student, learning.objective
    optimizer = torch.optim.AdamW(student.network.parameters(), lr=config.learning_rate)
    student.ema = EMAModel(student.network.parameters(), decay=config.ema_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    source = config.tasks[0].open()
    wanted = min(config.samples or 256, 256)  # decoding is not what is compared: the images lie in memory
    found = read_samples(source.pending(Selection(teacher.size, wanted)))
    samples = [item for item in found if isinstance(item, Sample)]

    def step() -> None:
        with watch("data"), autocast():
            batch, text = _encode_batch(teacher, samples, config.batch_size)
        terms = objective(student.prepared, batch, text)
        with watch("student"):
            optimizer.zero_grad()
            torch.autograd.backward(scaler.scale(terms["total"].mean()))
        with watch("optimizer"):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(student.prepared.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            student.ema.step(student.network.parameters())

    recipe = PLAIN_FP16 if half else PLAIN_FP32
    return _time(step, recipe, config.batch_size, steps, watch, cuda=device.type == "cuda", graphs=False)


@torch.no_grad()
def _encode_batch(teacher: Teacher, samples: list[Sample], count: int) -> tuple[Batch, Tensor]:
    """Images and captions through the frozen networks, as at every step of a plain script."""
    device, vae, embed = teacher.device, teacher.vae, teacher.embed
    picked = [samples[i] for i in torch.randint(len(samples), (count,)).tolist()]
    images = torch.stack([torch.from_numpy(s.image) for s in picked]).permute(0, 3, 1, 2).to(device)
    latents = vae.encode(images.float() / 127.5 - 1).latent_dist.sample() * vae.config.scaling_factor
    ids = torch.from_numpy(embed.tokenizer.encode([s.caption for s in picked])).to(device)
    text = embed.text_encoder(ids).last_hidden_state
    timestep = torch.randint(teacher.schedule.num_train_timesteps, (count,), device=device)
    sample = latents.float()
    batch = Batch(sample, torch.randn_like(sample), timestep, timestep < 0, [s.caption for s in picked])
    return batch, text.float()


def _time(
    step: Callable[[], None], recipe: str, batch_size: int, steps: int, watch: Stopwatch, *, cuda: bool, graphs: bool
) -> Speed:
    for _ in range(WARMUP):
        step()
    prepare_sec = watch.seconds.get("prepare", 0.0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    median = sorted(_step_times(step, steps, cuda=cuda))[steps // 2]
    peak = _peak_on_gpu(graphs) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    watch.exact = True
    watch.seconds.clear()
    sections_sec = sum(_step_times(step, min(steps, SHARE_STEPS), cuda=cuda))
    return Speed(
        recipe=recipe,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        batch_size=batch_size,
        steps=steps,
        images_per_sec=batch_size / median,
        step_ms=1000 * median,
        peak_memory_bytes=peak,
        shares={name: seconds / sections_sec for name, seconds in watch.seconds.items()},
        prepare_sec=prepare_sec,
    )


def _peak_on_gpu(graphs: bool) -> int:
    """The most that tensors took; with CUDA graphs, which hold their memory between steps, all that is held."""
    return torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated()


def _step_times(step: Callable[[], None], count: int, *, cuda: bool) -> list[float]:
    """Seconds of each step, its work on the device done."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


def _measure_in_fresh_process(recipe: str, config: TrainConfig, steps: int) -> Speed:
    """`measure` in a process of its own, whose peak memory is the measurement's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, recipe, config, steps).result()


def _measure_on_gpu(recipe: str, config: TrainConfig, steps: int) -> Speed:
    """`measure` in this process, which starts with nothing on the device."""
    AcceleratorState._reset_state(True)  # it keeps one precision a process
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    return measure(recipe, config, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our loop against the plain recipe, in turns.")
    parser.add_argument("--teacher", default="garden")
    parser.add_argument("--student", default="garden-student")
    parser.add_argument("--task", default="flowers=garden:flowers")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--resolution", type=int, help="pixels; the teacher's where left out")
    parser.add_argument("--recipe", choices=RECIPES, nargs="+", default=list(RECIPES))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixed-precision", default="auto", help="of our loop")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true")
    args = parser.parse_args()
    name, _, source = args.task.partition("=")
    teacher = find_teacher(args.teacher) if args.teacher != "garden" else GARDEN_TEACHER
    config = TrainConfig(
        teacher=teacher, student=args.student, tasks=(Task(name, source),), samples=args.samples, replay=0,
        resolution=args.resolution,
        mixed_precision=args.mixed_precision, channels_last=args.channels_last, compile=args.compile,
        gradient_checkpointing=args.gradient_checkpointing, cuda_graphs=args.cuda_graphs,
    )  # fmt: skip
    apart = _measure_on_gpu if torch.cuda.is_available() else _measure_in_fresh_process
    for batch_size in args.batch_size:
        found: dict[str, list[Speed]] = {recipe: [] for recipe in args.recipe}
        for _ in range(args.rounds):
            for recipe in args.recipe:
                try:
                    found[recipe].append(apart(recipe, replace(config, batch_size=batch_size), args.steps))
                except KdcError as error:
                    print(error, flush=True)
        for speeds in filter(None, found.values()):
            middle = sorted(speeds, key=lambda speed: speed.images_per_sec)[len(speeds) // 2]
            rates = ", ".join(f"{speed.images_per_sec:.2f}" for speed in speeds)
            print("\n".join([*middle.lines(), f"images/s of each round: {rates}"]), flush=True)


if __name__ == "__main__":
    main()
