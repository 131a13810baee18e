"""One to four steps: distribution matching after the phased objective (DMD2, arXiv 2405.14867; decoupled, 2511.22677).

The few-step student makes images from noise as it does when it is sampled, and learns at every step of that from two
differences of predictions on its own images: between a score network's, which knows only what the student makes, and
the teacher's (matching), and between the teacher's with the caption and without (guidance). No image of the task is
looked at, so that the memory of earlier tasks is their captions.

    x_z    = the student's jumps from noise down to the end z of a phase                           no gradient
    x      = J(x_z, e_student(x_z, c), z -> -1)                                                    the image so far
    x_t    = sqrt(a_t) x + sqrt(1 - a_t) noise        t uniform in the middle 96 % of the schedule
    match  = (J(x_t, e_score(x_t, c)) - y_c) / mean|x - y_c|                      y_c = J(x_t, e_teacher(x_t, c))
    x_s    = the same with other noise                s uniform in what of it is below z
    guide  = (w - 1) (y_c - y_0) / mean|x - y_0 - w (y_c - y_0)|    y_c, y_0 = J(x_s, e_teacher(x_s, c or null))
    loss   = MSE(x, x - match + guide) / 2            no gradient but through the first x

J is the DDIM step of train/objectives/phased.py, to the image itself. Guidance acts below z alone, since what is
noisier is settled where the student starts; matching keeps the whole image in check (2511.22677, section 4.3). The
score network has the student's shape and starts with its weights; before each step of the student it takes several of
its own, of the denoising loss on the student's images, with an optimizer of its own. Both are in the saved state.
Sampling is that of the phased student.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.distributed
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from kdc_edge.errors import InputError
from kdc_edge.guidance import guided
from kdc_edge.manifest import Model
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.batch import Batch
from kdc_edge.train.distributed import under
from kdc_edge.train.objective import Setup
from kdc_edge.train.objectives.phased import Phased, phase_ends

SCORE, OPTIMIZER, GENERATOR = "score/", "score_optimizer/", "score_generator"  # in the saved state
EDGE = 50  # the part of the schedule at either end that is left out: a fiftieth


class Distribution(Phased):
    """Samples that a frozen, guided teacher cannot tell from its own, by the phases of a phased student."""

    binned_term = "matching"
    same_work = False

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.ends = phase_ends(self.settings.phases, self.schedule.num_train_timesteps)
        self.generator = torch.Generator().manual_seed(setup.config.seed)
        self.score: UNet2DConditionModel | None = None  # made from the student's weights at the first step
        self.optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def check(cls, config: TrainConfig, model: Model) -> None:
        super().check(config, model)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise InputError("--objective distribution trains on one process: its score network is not shared")
        if config.replay_teacher == "student":
            raise InputError("--objective distribution remembers by captions: give --replay-teacher teacher")
        if config.strategy in ("lwf", "ewc"):  # that teacher under another name; gradients that move the score network
            raise InputError(
                f"--objective distribution remembers by captions: give --strategy replay instead of {config.strategy}"
            )

    def __call__(self, student: nn.Module, batch: Batch, text: Tensor) -> dict[str, Tensor]:
        watch = self.setup.watch
        score, optimizer = self._score_network()
        number = batch.timestep * self.settings.phases // self.schedule.num_train_timesteps  # of the phase
        with self.setup.autocast():
            for _ in range(self.settings.score_updates - 1):
                with watch("student"), torch.no_grad():
                    image = self._sample(student, self._noise(batch.noise), text, number)
                with watch("score"):
                    self._fit(score, optimizer, image, text)
            with watch("student"):
                image = self._sample(student, batch.noise, text, number)
            with watch("score"):
                self._fit(score, optimizer, image.detach(), text)
            with watch("teacher"), torch.no_grad():
                target = self._target(score, image.detach(), text, number)
        loss = 0.5 * (image - target).square().flatten(1).mean(1)
        return {"matching": loss, "total": loss}

    def _sample(self, student: nn.Module, noise: Tensor, text: Tensor, number: Tensor) -> Tensor:
        """The student's images (B, C, h, w) as they are in phase `number` (B,); a gradient through the last jump."""
        x = noise
        with torch.no_grad():
            for phase in range(self.settings.phases - 1, 0, -1):
                above = number < phase
                if above.any():
                    top, low = (torch.full_like(number[above], self.ends[phase + 1 - down]) for down in (0, 1))
                    prediction = student(x[above], top, text[above]).sample.float()
                    x = x.clone()
                    x[above] = self.jump(x[above], prediction, top, low)
        top = torch.tensor(self.ends, device=number.device)[number + 1]
        return self._image(x, student(x, top, text).sample, top)

    def _image(self, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """What is left of x (B, C, h, w) at t (B,) without the predicted noise."""
        return self.jump(x, prediction.float(), t, torch.full_like(t, -1))

    def _target(self, score: nn.Module, image: Tensor, text: Tensor, number: Tensor) -> Tensor:
        """Where the two differences carry the images (B, C, h, w) made in phase `number` (B,)."""
        x_t, t, _ = self._noised(image)
        fake = self._image(x_t, score(x_t, t, text).sample, t)
        real = self._image(x_t, self.setup.teacher(x_t, t, text).sample, t)
        matched = image - _scaled(fake - real, image - real)
        x_s, s, _ = self._noised(image, below=torch.tensor(self.ends, device=number.device)[number + 1])
        cond, uncond = (self._image(x_s, prediction, s) for prediction in self._both_teachers(x_s, s, text))
        w = self.settings.guidance
        return matched + _scaled((w - 1) * (cond - uncond), image - guided(cond, uncond, w))

    def _fit(self, score: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, text: Tensor) -> None:
        """A step of the score network on the student's images."""
        x_t, t, noise = self._noised(image)
        prediction = score(x_t, t, text).sample.float()
        a = self.jump.signal[t].view(-1, 1, 1, 1)
        target = a.sqrt() * noise - (1 - a).sqrt() * image if self.jump.velocity else noise
        optimizer.zero_grad(set_to_none=True)
        (prediction - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(score.parameters(), 1.0)
        optimizer.step()

    def _noised(self, image: Tensor, below: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The images with fresh noise, at timesteps (B,) drawn below `below` (B,) where given, and the noise."""
        steps = self.schedule.num_train_timesteps
        low, high = steps // EDGE, torch.tensor(steps - steps // EDGE, device=image.device)
        if below is not None:
            high = torch.minimum(below, high)
        share = torch.rand(len(image), generator=self.generator).to(image.device)
        t = low + ((high - low) * share).long()
        noise = self._noise(image)
        a = self.jump.signal[t].view(-1, 1, 1, 1)
        return a.sqrt() * image + (1 - a).sqrt() * noise, t, noise

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like.device)

    def _score_network(self) -> tuple[UNet2DConditionModel, torch.optim.Optimizer]:
        """The score network and its optimizer, made where they are missing."""
        if self.score is None or self.optimizer is None:
            self.score = copy.deepcopy(self.setup.student).requires_grad_(True)
            self.score.zero_grad(set_to_none=True)
            self.optimizer = torch.optim.AdamW(
                self.score.parameters(), lr=self.settings.score_learning_rate, weight_decay=0.0
            )
        return self.score, self.optimizer

    def state_dict(self) -> dict[str, Tensor]:
        if self.score is None or self.optimizer is None:
            return {}
        found = {GENERATOR: self.generator.get_state()}
        found |= {SCORE + name: tensor for name, tensor in self.score.state_dict().items()}
        for name, parameter in self.score.named_parameters():
            found |= {f"{OPTIMIZER}{name}/{m}": t for m, t in self.optimizer.state[parameter].items()}
        return found

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        if GENERATOR not in tensors:
            return
        self.generator.set_state(tensors[GENERATOR].cpu())
        score, optimizer = self._score_network()
        score.load_state_dict(under(SCORE, tensors))
        parameters = dict(score.named_parameters())
        for name, tensor in under(OPTIMIZER, tensors).items():
            weight, moment = name.split("/")
            parameter = parameters[weight]
            optimizer.state[parameter][moment] = tensor if moment == "step" else tensor.to(parameter.device)


def _scaled(pull: Tensor, distance: Tensor) -> Tensor:
    """The pull on each sample (B, ...), over its mean distance from where it is pulled."""
    return pull / distance.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
