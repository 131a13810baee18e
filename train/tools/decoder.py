"""A small decoder distilled from a checkpoint's VAE, on latents that are computed once.

    trainer = DecoderTrainer(DecoderConfig(tasks, checkpoint, "garden-decoder"), Path("runs/decoder"))
    for step in trainer.run():                   # DecoderStep; stop at any, trainer.save() first
        ...
    trainer.results                              # PSNR against the VAE's decoder, judge accuracy of both

    OUT/config.json, state.safetensors           settings; weights, optimizer, random state
    OUT/decoder/                                 what `kdc-edge export --decoder` takes
    OUT/sheet.png, results.json                  the VAE's images above the small decoder's; the numbers

    loss = L1 + MSE + perceptual * features      against the VAE's image, values in [-1, 1]

The features are the judge's where all tasks are the garden's, else LPIPS where its weight file is here. The only target
is the big decoder's image, which exists for every latent, also for those of no image: see `extrapolate`. No image of
the task is looked at twice.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from kdc_edge.diffusers_folder import hash_checkpoint, read_model
from kdc_edge.errors import CheckpointError, InputError, KdcError
from kdc_edge.files import atomic_folder, read_json, refuse_foreign_folder, write_atomic
from kdc_edge.image import grid, psnr_db, save_png, to_pixels
from kdc_edge.presets import find_decoder
from kdc_edge.quiet import quiet
from kdc_edge.request import made_for
from kdc_edge.runtimes.torch import TorchComponent, load_network
from kdc_edge.runtimes.torch.small_decoder import SmallDecoder, new_decoder
from kdc_edge.text import one_line
from kdc_edge.train.config import DecoderConfig, check_same, learning_rate
from kdc_edge.train.data.cache import CACHE, cache_latents, check_cache, encode_images
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.data.source import Selection
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.garden.judge import load_judge
from kdc_edge.train.quality.evaluate import EVALUATION, Generator, ask, generate_with_both, open_generator, score_images
from kdc_edge.train.quality.metrics import ImageMetrics

SHEET_IMAGES = 8  # of each task
EXTRAPOLATION = (-0.5, 1.0)  # of the difference to another latent: -0.5 is the mean of both
EXTRAPOLATED = 0.5  # share of the latents, for a few-step student
Features = Callable[[Tensor, Tensor], Tensor]  # the distance of two batches of images (B, 3, H, W)


@dataclass(frozen=True)
class DecoderStep:
    step: int  # 1-based
    losses: dict[str, float]  # every term unweighted, and their weighted total
    psnr_db: float  # of the batch, against the VAE's images
    samples_per_sec: float


class DecoderTrainer:
    """A decoder, its optimizer and where it stands. Everything random comes from one generator, which is saved."""

    def __init__(
        self, config: DecoderConfig, out: Path, *, resume: bool = False, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.config, self.out, self.say = config, out, say
        self.model = read_model(config.checkpoint)
        self.preset = find_decoder(config.preset, self.model.vae_scale)
        usual = 0.0 if self.model.guided else EXTRAPOLATED
        self.extrapolated = usual if config.extrapolated is None else config.extrapolated
        self.metrics = ImageMetrics(config.metric_weights)
        for task in config.tasks:
            task.open()
        if config.cache is not None:
            check_cache(config.cache)
        self._claim_folder(resume)  # after what can be refused at once
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        self.device = torch.device(chosen)
        precision = config.mixed_precision
        self.half = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        self.vae = load_network(config.checkpoint, "vae_decoder").to(self.device, memory_format=torch.channels_last)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            made = new_decoder(self.preset, self.model.latent_channels)
        self.network = made.to(self.device, memory_format=torch.channels_last)
        self.decoder = self.network.decoder.train()
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.features = self._find_features()
        self.step = 0
        self.results: dict[str, Any] = {}
        if resume and self.state.is_file():
            self._restore()

    @property
    def state(self) -> Path:
        return self.out / "state.safetensors"

    def _claim_folder(self, resume: bool) -> None:
        path = self.out / "config.json"
        if not (resume and path.is_file()):
            refuse_foreign_folder(self.out, None)
            write_atomic(path, json.dumps(self.config.as_json(), indent=2))
            return
        saved = read_json(path, CheckpointError)
        check_same(self.config, saved)
        before = DecoderConfig.from_json(saved).checkpoint
        if before != self.config.checkpoint:
            raise InputError(f"--from is {self.config.checkpoint} and the run was started with {before}")

    def _find_features(self) -> Features | None:
        """What images are compared by beside their pixels, on the device."""
        if not self.config.perceptual:
            return None
        if all(task.source.startswith("garden:") for task in self.config.tasks):
            judge = load_judge().to(self.device)

            def by_judge(images: Tensor, targets: Tensor) -> Tensor:
                """Squared errors of each stage's activations, as a part of their mean square."""
                pairs = zip(judge.maps(images), judge.maps(targets), strict=True)
                return torch.stack([F.mse_loss(a, b) / b.square().mean() for a, b in pairs]).mean()

            return by_judge
        if not self.metrics.has_lpips:
            self.say("no perceptual loss: LPIPS's weight file is not here, see --metric-weights")
            return None
        lpips = self.metrics.lpips_network.to(self.device)
        return lambda images, targets: lpips(images, targets).mean()

    # --- training ---

    def run(self) -> Iterator[DecoderStep]:
        """Train what is left, then write decoder, sheet and results."""
        config = self.config
        try:
            latents = [self._latents(task) for task in config.tasks]
        except (KdcError, OSError):
            if [path.name for path in self.out.iterdir()] == ["config.json"]:  # nothing that a resume would go on from
                shutil.rmtree(self.out)
            raise
        while self.step < config.steps:
            yield self._step(latents)
            if self.step % config.save_every == 0 or self.step == config.steps:
                self.save()
        self._finish()

    def _latents(self, task: Task) -> Latents:
        config = self.config
        return cache_latents(
            task, self.vae, config.cache or self.out / CACHE,
            Selection(self.model.image_size, config.samples, config.seed),
            vae_sha256=hash_checkpoint(config.checkpoint / "vae"), say=self.say,
        )  # fmt: skip

    def _step(self, latents: list[Latents]) -> DecoderStep:
        started = time.perf_counter()
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scaled = self._draw(latents).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            with torch.no_grad():
                target = self.vae.decode(scaled / self.model.scaling_factor).sample.float().clamp(-1, 1)
            image = self.decoder(scaled).float()
        terms = {"l1": F.l1_loss(image, target), "mse": F.mse_loss(image, target)}
        total = terms["l1"] + terms["mse"]
        if self.features is not None:
            terms["features"] = self.features(image, target)
            total = total + self.config.perceptual * terms["features"]
        losses = {n: float(t.detach()) for n, t in (terms | {"total": total}).items()}
        if not math.isfinite(losses["total"]):
            raise KdcError(
                f"the loss is no number at step {self.step + 1}: begin a new training with a lower --learning-rate,"
                " which a resumed one cannot have"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        speed = self.config.batch_size / (time.perf_counter() - started)
        return DecoderStep(self.step, losses, 10 * math.log10(4 / losses["mse"]), speed)

    def _draw(self, latents: list[Latents]) -> Tensor:
        """Scaled latents (B, C, h, w), drawn from their distributions, of all tasks in turn; see `extrapolate`."""
        generator, found = self.generator, []
        for i in range(self.config.batch_size):
            one = latents[(self.step * self.config.batch_size + i) % len(latents)]
            number = torch.randint(len(one), (1,), generator=generator)
            flipped = torch.rand(1, generator=generator) < 0.5 if one.flips > 1 else None
            mean, std = one.take(number, flipped)
            found.append(mean.float() + std.float() * torch.randn(mean.shape, generator=generator))
        return extrapolate(torch.cat(found), self.extrapolated, generator)

    # --- saved states ---

    def save(self) -> None:
        """Everything that the rest of the training depends on, in one file: the old state or the new one."""
        tensors = {"generator": self.generator.get_state(), "step": torch.tensor(self.step)}
        for name, parameter in self.decoder.named_parameters():
            tensors[f"decoder/{name}"] = parameter.detach()
            for moment, tensor in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{moment}"] = tensor
        write_atomic(self.state, save({n: t.contiguous().cpu() for n, t in tensors.items()}))

    def _restore(self) -> None:
        try:
            tensors = load_file(self.state)
            self.step = int(tensors["step"])
            self.generator.set_state(tensors["generator"])
            with torch.no_grad():
                for name, parameter in self.decoder.named_parameters():
                    parameter.copy_(tensors[f"decoder/{name}"])
                    prefix = f"optimizer/{name}/"
                    moments = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                    self.optimizer.state[parameter] = {
                        n: t if n == "step" else t.to(self.device) for n, t in moments.items()
                    }
        except Exception as error:  # safetensors, a name or a shape
            raise CheckpointError(f"{self.state} is damaged: {one_line(error)}; remove it, and begin anew") from None

    # --- what is left at the end ---

    def _finish(self) -> None:
        self.decoder.eval()
        with atomic_folder(self.out / "decoder", marker="config.json") as folder, quiet():
            self.network.save_pretrained(folder)
            for path in folder.glob("*.safetensors"):
                path.chmod(0o644)  # safetensors writes for its owner alone
        self.results = {"preset": self.preset.name, "steps": self.step, **self._measure()}
        write_atomic(self.out / "results.json", json.dumps(self.results, indent=2) + "\n")

    def _measure(self) -> dict[str, Any]:
        """PSNR on encoded held-out images; of the garden, the judge's accuracy on generated ones."""
        pixels: dict[str, float] = {}
        accuracy: dict[str, dict[str, float]] = {}
        rows: list[np.ndarray] = []
        small = TorchComponent("vae_decoder", SmallDecoder(self.network, self.model.scaling_factor))
        for task in self.config.tasks:
            asked = ask(task, self.config.eval_images, size=self.model.image_size)
            if asked.references is not None:
                scaled = torch.cat([encode_images(self.vae, part)[0].float() for part in _parts(asked.references)])
                by_big, by_small = self.both(scaled)
                pixels[task.name] = round(psnr_db(by_small, by_big), 2)
                rows += [*_cells(by_big), *_cells(by_small)]
            if asked.scenes:
                by_big, by_small = generate_with_both(self._own, small, asked.prompts)
                accuracy[task.name] = {
                    "vae": score_images(by_big, asked, None).values["prompt_accuracy"],
                    "small": score_images(by_small, asked, None).values["prompt_accuracy"],
                    "psnr_db": round(psnr_db(by_small, by_big), 2),
                }
        if rows:
            save_png(self.out / "sheet.png", grid(rows, SHEET_IMAGES))
        return {"psnr_db": pixels, "prompt_accuracy": accuracy}

    @cached_property
    def _own(self) -> Generator:
        """The checkpoint as it is."""
        own = open_generator(self.config.checkpoint, steps=EVALUATION.steps, guidance=EVALUATION.guidance)
        return replace(own, request=made_for(self.model, own.request))

    @torch.inference_mode()
    def both(self, scaled: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The VAE's images and the small decoder's of scaled latents (N, C, h, w), uint8 (N, H, W, 3)."""
        parts = [part.to(self.device) for part in torch.split(scaled, 4)]
        big = [self.vae.decode(part / self.model.scaling_factor).sample.cpu() for part in parts]
        small = [self.decoder(part).cpu() for part in parts]
        return to_pixels(torch.cat(big).numpy()), to_pixels(torch.cat(small).numpy())


def extrapolate(latents: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Latents (B, C, h, w), a share of them moved along the line to another one: blended with it, or away from it.

    Few steps and guidance make latents that no image has, of up to twice the spread. The VAE's image of them is as
    good a target as any.
    """
    if not share:
        return latents
    low, high = EXTRAPOLATION
    drawn = torch.rand((2, len(latents), 1, 1, 1), generator=generator)
    amount = (low + (high - low) * drawn[0]) * (drawn[1] < share)
    return latents + amount * (latents - latents.roll(1, 0))


def _parts(images: np.ndarray) -> list[np.ndarray]:
    """Batches of 4 images: an encoder's activations at 512 pixels are large."""
    return [images[at : at + 4] for at in range(0, len(images), 4)]


def _cells(images: np.ndarray) -> list[np.ndarray]:
    """One row of the sheet, blank where there are fewer images."""
    blank = np.full_like(images[0], 255)
    return [images[i] if i < len(images) else blank for i in range(SHEET_IMAGES)]
