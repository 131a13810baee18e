"""Few steps without guidance: the phased consistency objective (arXiv 2405.18407; multistep consistency, 2403.06807).

The schedule is cut into N phases. Within a phase the student learns to jump from any timestep to the phase's end as the
guided teacher would go there step by step, so that N deterministic jumps make an image, the guidance scale w included:

    J(x, e, t -> u) = sqrt(a_u) (x - sqrt(1 - a_t) e) / sqrt(a_t) + sqrt(1 - a_u) e                a DDIM step
    x_u    = J(x_t, e_teacher(null) + w (e_teacher(c) - e_teacher(null)), t -> u)                  no gradient
    target = x_u  where u = z,  else  J(x_u, e_student(x_u, c), u -> z)                            no gradient
    loss   = mean(sqrt((J(x_t, e_student(x_t, c), t -> z) - target)^2 + k^2) - k)                  pseudo-Huber

t lies on a grid of K points a phase, u is the next grid point below it, z the end of the phase, a = alphas_cumprod and
1 below timestep 0. One phase is the objective of latent consistency models (arXiv 2310.04378). Sampling is DDIM with
trailing timesteps: no new sampler, no new input of the U-Net.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdc_edge.errors import InputError
from kdc_edge.guidance import guided
from kdc_edge.manifest import Model, Sampling
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.batch import Batch
from kdc_edge.train.objective import Objective, Setup


def phase_ends(phases: int, num_train_timesteps: int = 1000) -> list[int]:
    """The ends of the phases, z_0 = -1 to z_N = T - 1: the trailing timesteps of N steps, and -1 for the image itself.

    >>> phase_ends(4)
    [-1, 249, 499, 749, 999]
    """
    if phases < 1 or num_train_timesteps % phases:
        fitting = [str(n) for n in range(1, 11) if num_train_timesteps % n == 0]
        raise InputError(
            f"--phases {phases} does not divide the {num_train_timesteps} timesteps of the schedule, so that DDIM would"
            f" step past the phases' ends: use {', '.join(fitting)}"
        )
    return [num_train_timesteps * i // phases - 1 for i in range(phases + 1)]


@dataclass(frozen=True)
class Grid:
    """The timesteps of the teacher's steps: K a phase, rising, each with the next below it and its phase's end."""

    phases: int
    points: int  # K
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.phases * self.points > self.num_train_timesteps:
            raise InputError(
                f"--phases {self.phases} with {self.points} grid points each need more than the"
                f" {self.num_train_timesteps} timesteps of the schedule: use fewer"
            )
        phase_ends(self.phases, self.num_train_timesteps)

    def timesteps(self) -> Tensor:
        """(N K + 1,): from -1 over every grid point to the last timestep."""
        ends = phase_ends(self.phases, self.num_train_timesteps)
        rows = [
            low + round((high - low) * k / self.points)
            for low, high in itertools.pairwise(ends)
            for k in range(1, self.points + 1)
        ]
        return torch.tensor([-1, *rows])

    def place(self, timestep: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A uniform timestep (B,) as grid points t, u and z (B,) each: grid points are as likely as one another.

        `grid` is `timesteps` on the timestep's device.
        """
        number = timestep * (self.phases * self.points) // self.num_train_timesteps  # 0 to N K - 1
        phase = number // self.points
        return grid[number + 1], grid[number], grid[phase * self.points]


class Jump:
    """DDIM's step between any two timesteps as a function of the prediction, on tensors."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device) -> None:
        signal = torch.tensor([*schedule.alphas_cumprod, 1.0], dtype=torch.float32)  # [-1] is the image itself
        self.signal = signal.to(device)
        self.velocity = schedule.prediction_type == "v_prediction"
        if not self.velocity and float(signal[:-1].min()) == 0:
            raise InputError("a schedule that ends without signal needs v-prediction: use a v-prediction teacher")

    def __call__(self, x: Tensor, prediction: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """x (B, C, h, w) at timesteps t (B,), carried to u (B,) along the prediction (B, C, h, w)."""
        a, b = (self.signal[at].view(-1, 1, 1, 1) for at in (t, u))
        if self.velocity:  # Salimans and Ho, arXiv 2202.00512, appendix D
            x0, noise = a.sqrt() * x - (1 - a).sqrt() * prediction, a.sqrt() * prediction + (1 - a).sqrt() * x
        else:
            x0, noise = (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        return b.sqrt() * x0 + (1 - b).sqrt() * noise


def pseudo_huber(a: Tensor, b: Tensor, k: float) -> Tensor:
    """sqrt((a - b)^2 + k^2) - k, the mean over all but the samples: (B, ...) -> (B,)."""
    return (((a - b).square() + k * k).sqrt() - k).flatten(1).mean(1)


class Phased(Objective):
    """Jumps to the ends of N phases, learnt from a frozen, guided teacher and the student's own next jump."""

    binned_term = "phased"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.settings = setup.config.few_steps
        self.bins = self.settings.phases
        self.grid = Grid(self.settings.phases, self.settings.grid_points, self.schedule.num_train_timesteps)
        self.timesteps = self.grid.timesteps().to(setup.device)
        self.jump = Jump(self.schedule, setup.device)
        self._uncond_text: Tensor | None = None  # (1, 77, D), of the empty prompt

    @classmethod
    def check(cls, config: TrainConfig, model: Model) -> None:
        settings = config.few_steps
        Grid(settings.phases, settings.grid_points, NoiseSchedule.from_config(model.scheduler).num_train_timesteps)

    def ships(self, model: Model) -> Model:
        """DDIM with trailing timesteps down to the image itself, a step a phase, without guidance."""
        scheduler = model.scheduler | {
            "_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "set_alpha_to_one": True,
            "clip_sample": False, "steps_offset": 1,  # which trailing ignores, and diffusers asks for
        }  # fmt: skip
        sampling = Sampling(scheduler="ddim", steps=self.settings.phases, guidance=1.0)
        return model.model_copy(update={"scheduler": scheduler, "sampling": sampling})

    def __call__(self, student: nn.Module, batch: Batch, text: Tensor) -> dict[str, Tensor]:
        watch = self.setup.watch
        t, u, z = self.grid.place(batch.timestep, self.timesteps)
        a = self.jump.signal[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * batch.sample + (1 - a).sqrt() * batch.noise  # (B, C, h, w)
        with self.setup.autocast():
            with watch("teacher"), torch.no_grad():
                target = self._targets(student, batch, text, x_t, (t, u, z))
            with watch("student"):
                student_pred = student(x_t, t, text).sample
        with watch("student"):
            loss = pseudo_huber(self.jump(x_t, student_pred.float(), t, z), target, self.settings.huber)
        return {"phased": loss, "total": loss}

    def _targets(
        self, student: nn.Module, batch: Batch, text: Tensor, x_t: Tensor, timesteps: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """The ends of the jumps (B, C, h, w): by the previous few-step student where it teaches what is replayed."""
        t, u, z = timesteps
        x_u = self.jump(x_t, self._guided_teacher(x_t, t, text), t, u)
        onward = self.jump(x_u, student(x_u, u.clamp(min=0), text).sample.float(), u, z)
        target = torch.where((u == z).view(-1, 1, 1, 1), x_u, onward)
        old = batch.replayed
        if self.previous_student is not None and old.any():
            previous_pred = self.previous_student(x_t[old], t[old], text[old]).sample.float()
            target[old] = self.jump(x_t[old], previous_pred, t[old], z[old])
        return target

    def _guided_teacher(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The teacher's prediction under classifier-free guidance."""
        found: Tensor = guided(*self._both_teachers(x, t, text), self.settings.guidance)
        return found

    def _both_teachers(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's predictions with the caption and without, in one call."""
        if self._uncond_text is None:
            self._uncond_text = self.setup.embed([""]).to(text)
        texts = torch.cat([self._uncond_text.expand_as(text), text])
        uncond, cond = self.setup.teacher(torch.cat([x, x]), torch.cat([t, t]), texts).sample.float().chunk(2)
        return cond, uncond
