"""The samplers: from noise to an image in a few steps, in numpy, equal to diffusers over whole runs.

A sampler is a small object: `timesteps` to visit, then for each index i `scale_model_input` before the
U-Net and `step` after it. Coefficients are computed in double precision, latents stay float32.

    config = json.loads(scheduler_config)
    name, note = sampler_for(config)                                                     # "dpm++2m-karras", ""
    sampler = make_sampler(name, NoiseSchedule.from_config(config), steps=20)
    x = initial_latents(shape, seed) * sampler.init_noise_sigma                          # (B, 4, h, w)
    for i, t in enumerate(sampler.timesteps):
        x = sampler.step(unet(sampler.scale_model_input(x, i), t), i, x)

Notation: a = alphas_cumprod[t]; x = sqrt(a) x0 + sqrt(1 - a) eps; sigma = sqrt((1 - a) / a).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from kdc_edge.diffusers_defaults import SCHEDULERS, scheduler_settings
from kdc_edge.errors import InputError, unknown_choice
from kdc_edge.noise import Noise, NormalStream
from kdc_edge.noise_schedule import NoiseSchedule, is_integer
from kdc_edge.samplers.base import Sampler
from kdc_edge.samplers.ddim import DDIM, LCM, PNDM
from kdc_edge.samplers.dpm import DEIS, DPMSolver, UniPC
from kdc_edge.samplers.euler import Euler, EulerAncestral, Heun

__all__ = ["DEFAULT_SAMPLER", "SAMPLERS", "NoiseSchedule", "Sampler", "SamplerKind", "make_sampler", "sampler_for"]

DEFAULT_SAMPLER = "dpm++2m"

_FIELDS = frozenset(f.name for f in fields(NoiseSchedule))
# Keys that change nothing in second-order samplers that end at sigma 0.
_NO_EFFECT = {
    "DPMSolverMultistepScheduler": {"lower_order_final", "euler_at_final"},
    "DPMSolverSinglestepScheduler": {"lower_order_final"},
}
_FIXED_VARIANCES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
)  # of variance_type, for DDPM alone
_NO_EFFECT_WITHOUT_FLOW = {"flow_shift", "time_shift_type"}


@dataclass(frozen=True)
class SamplerKind:
    """One row of the table of samplers."""

    title: str  # what common user interfaces call it
    scheduler: str  # diffusers' class
    make: Callable[[NoiseSchedule, int, Noise], Sampler]
    options: Mapping[str, object]  # of the class, whatever the checkpoint's config says

    def obstacle(self, config: Mapping[str, object]) -> str | None:
        """The setting of a scheduler_config.json, as this sampler's class reads it, that it does not have."""
        settings = scheduler_settings(config, self.scheduler)
        known = _FIELDS | self.options.keys() | _NO_EFFECT.get(self.scheduler, set()) | _NO_EFFECT_WITHOUT_FLOW
        for key, default in SCHEDULERS[self.scheduler].items():
            if key not in known and settings[key] not in (default, None, *_FIXED_VARIANCES):
                return f"{key} = {settings[key]!r:.80}"
        if self.scheduler in _NO_SAMPLE and settings.get("prediction_type") == "sample":
            return "prediction_type = 'sample'"
        return None


_NO_SAMPLE = ("EulerAncestralDiscreteScheduler", "PNDMScheduler")  # nor have they in diffusers


def _kinds(
    name: str,
    title: str,
    scheduler: str,
    sampler: Callable[..., Sampler],
    options: Mapping[str, object] | None = None,
    *,
    draws: bool = False,
    karras: bool = False,
) -> dict[str, SamplerKind]:
    """A row of the table, and where there is one the row of its variant with Karras' noise levels."""

    def make(schedule: NoiseSchedule, steps: int, noise: Noise, **more: Any) -> Sampler:
        return sampler(schedule, steps, **({"noise": noise} if draws else {}), **more)

    options = options or {}
    if not karras:
        return {name: SamplerKind(title, scheduler, make, options)}
    plain = SamplerKind(title, scheduler, make, {**options, "use_karras_sigmas": False})
    with_karras = {**options, "use_karras_sigmas": True}
    return {
        name: plain,
        f"{name}-karras": SamplerKind(f"{title} Karras", scheduler, partial(make, karras=True), with_karras),
    }


_MULTI, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_ODE = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE = {**_ODE, "algorithm_type": "sde-dpmsolver++"}
_DEIS = {"algorithm_type": "deis", "solver_order": 2, "solver_type": "logrho"}
_single = partial(DPMSolver, single=True)

SAMPLERS: dict[str, SamplerKind] = {
    **_kinds("ddim", "DDIM", "DDIMScheduler", DDIM),
    **_kinds("pndm", "PLMS", "PNDMScheduler", PNDM, {"skip_prk_steps": True}),
    **_kinds("euler", "Euler", "EulerDiscreteScheduler", Euler, karras=True),
    **_kinds("euler-a", "Euler a", "EulerAncestralDiscreteScheduler", EulerAncestral, draws=True),
    **_kinds("heun", "Heun", "HeunDiscreteScheduler", Heun, karras=True),
    **_kinds("dpm++2m", "DPM++ 2M", _MULTI, DPMSolver, _ODE, karras=True),
    **_kinds("dpm++2m-sde", "DPM++ 2M SDE", _MULTI, DPMSolver, _SDE, draws=True, karras=True),
    **_kinds("dpm++2s", "DPM++ 2S", _SINGLE, _single, _ODE, karras=True),
    **_kinds("dpm++sde", "DPM++ SDE", _SINGLE, _single, _SDE, draws=True, karras=True),
    **_kinds("deis", "DEIS", "DEISMultistepScheduler", DEIS, _DEIS),
    **_kinds("unipc", "UniPC", "UniPCMultistepScheduler", UniPC, karras=True),
    **_kinds("lcm", "LCM", "LCMScheduler", LCM, draws=True),
}


def make_sampler(
    name: str, schedule: NoiseSchedule, steps: int, *, seed: int = 0, noise: Noise | None = None
) -> Sampler:
    """A fresh sampler for one run; what the checkpoint's config lacks is the default of the sampler's own class.

    Samplers that draw noise go on with `noise`, the stream that the initial latents were drawn from; without one,
    with a stream from `seed` as it is after `initial_latents(shape, seed)`.
    Raises UsageError for an unknown name, InputError for a config with a setting that the sampler does not have, or a
    number of steps that it cannot take.
    """
    if name not in SAMPLERS:
        raise unknown_choice("scheduler", name, SAMPLERS)
    kind = SAMPLERS[name]
    obstacle = kind.obstacle(schedule.config or {})
    if obstacle:
        raise InputError(f"the scheduler config has {obstacle}, which {name} does not have: choose another sampler")
    schedule = schedule.read_by(kind.scheduler)
    most = schedule.num_train_timesteps
    if not is_integer(steps) or not 1 <= steps <= most:
        raise InputError(f"{steps!r} steps cannot be taken: ask for 1 to {most}, such as 20")
    return kind.make(schedule, int(steps), noise or NormalStream(seed))


def sampler_for(config: Mapping[str, object]) -> tuple[str, str]:
    """The sampler that is a checkpoint's own scheduler, by its scheduler_config.json, and a note.

    The note is "" where there is one; else it says which sampler is taken instead and why. A config that names no
    class gets the default sampler. Raises InputError for a config that no sampler can use.
    """
    settings = scheduler_settings(config)
    own = config.get("_class_name")
    if own is None:
        return DEFAULT_SAMPLER, ""
    of_class = {name: kind for name, kind in SAMPLERS.items() if kind.scheduler == own}
    others = {name: [k for k, v in kind.options.items() if settings[k] != v] for name, kind in of_class.items()}
    nearest = min(others, key=lambda name: len(others[name]), default=None)
    if nearest is None:
        reason = "has no sampler of that class"
    elif others[nearest]:
        key = others[nearest][0]
        reason = f"does not have its {key} = {settings[key]!r:.80}"
    elif obstacle := of_class[nearest].obstacle(config):
        reason = f"does not have its {obstacle}"
    else:
        return nearest, ""
    for name in (DEFAULT_SAMPLER, "ddim"):
        if SAMPLERS[name].obstacle(config) is None:
            return name, f"the checkpoint's scheduler is {own}; kdc-edge {reason}: {name} is taken"
    raise InputError(f"the checkpoint's scheduler is {own}; kdc-edge {reason}, and no other sampler fits its config")
