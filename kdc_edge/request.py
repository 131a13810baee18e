"""One image to make: the request that a pipeline takes, and the values that a model asks for.

request = Request("a red flower", seed=1, width=512, height=512)
request, note = own_request(model, request, sampler=None, steps=None, guidance=None)      # the model's own values
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kdc_edge.editing import Edit
from kdc_edge.errors import InputError
from kdc_edge.manifest import Model
from kdc_edge.samplers import DEFAULT_SAMPLER, SAMPLERS, sampler_for

GuidanceMode = Literal["batched", "sequential"]


@dataclass(frozen=True)
class Request:
    """One image to make."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    guidance: float = 7.5  # classifier-free guidance scale (Ho and Salimans, arXiv 2207.12598); 1 = none
    # Both halves of the guidance in one U-Net call of twice the batch, or in two calls, which hold half the
    # activations. None: batched, but sequential where an interval leaves steps without guidance, so that
    # the U-Net is needed for one batch size only.
    guidance_mode: GuidanceMode | None = None
    # Fractions of the schedule between which there is guidance (Kynkäänniemi et al., arXiv 2404.07724); the
    # other steps cost half.
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    sampler: str = DEFAULT_SAMPLER
    width: int | None = None  # pixels; the model's own size when None
    height: int | None = None
    latents: np.ndarray | None = None  # unit normal (1, C, h, w); drawn from the seed when None
    edit: Edit | None = None  # an image to begin with, and perhaps a mask
    # Read brackets as weights, and what is longer than one prompt's tokens in chunks (prompt_weights.py).
    weighted: bool = False

    def guided(self, step: int, steps: int) -> bool:
        """Is this step, counted from 0, one of those with guidance?"""
        begin, end = self.guidance_interval
        return self.guidance > 1 and begin * steps <= step < end * steps

    @property
    def batched(self) -> bool:
        """Are both halves of the guidance computed in one call?"""
        if self.guidance_mode is None:
            return self.guidance_interval == (0.0, 1.0)
        return self.guidance_mode == "batched"

    @property
    def skipped(self) -> int:
        """The first steps, which are left out where there is an image to begin with."""
        return 0 if self.edit is None else self.edit.skipped(self.steps)

    @property
    def conditions(self) -> str:
        """What images made so have in common: "12 steps of DPM++ 2M, guidance 4"."""
        return f"{self.steps} steps of {SAMPLERS[self.sampler].title}, guidance {self.guidance:g}"


def own_request(
    model: Model, request: Request, *, sampler: str | None, steps: int | None, guidance: float | None
) -> tuple[Request, str]:
    """The request with the values given, else with those that the model asks for; and a note for the user.

    A few-step student asks for all three; another model for its own scheduler. Without classifier-free guidance the
    negative prompt is left out. The note is "" where there is nothing to say. Raises InputError for a scheduler config
    that no sampler can use.
    """
    note = ""
    if model.sampling is not None:
        if guidance is not None and guidance > 1 >= model.sampling.guidance:
            note = f"guidance {guidance:g} is given to a student that was trained without: 1 is faster and truer to it"
        request = made_for(model, request)
    elif sampler is None:
        sampler, note = sampler_for(model.scheduler)
    given = {"sampler": sampler, "steps": steps, "guidance": guidance}
    request = replace(request, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if request.negative_prompt and (model.guidance_embedding is not None or request.guidance <= 1):
        why = "this model reads the guidance scale, without classifier-free guidance"
        if model.guidance_embedding is None:
            why = f"guidance {request.guidance:g} means none"
        unused = f"the negative prompt is not used: {why}"
        note = f"{note}; {unused}" if note else unused
        request = replace(request, negative_prompt="")
    return request, note


def check_guidance(scale: float) -> None:
    """Raise InputError for a guidance scale that makes no image."""
    if not 0 <= scale <= 100:  # also refuses nan
        raise InputError(f"guidance {scale} is out of range: use 1 (none) to 20 or so, at most 100")


def refuse_inpainting(model: Model, command: str) -> None:
    """Raise InputError for a model that needs an image and a mask, where a command has none to give it."""
    if model.inpainting:
        raise InputError(
            f"this is an inpainting model, and {command} has no image for it to repaint: try it with kdc-edge generate"
            " --image FILE --mask FILE"
        )


def made_for(model: Model, request: Request) -> Request:
    """The request with the scheduler, steps and guidance that the model was trained for, if it was for any."""
    if (sampling := model.sampling) is None:
        return request
    return replace(request, sampler=sampling.scheduler, steps=sampling.steps, guidance=sampling.guidance)


def describe(request: Request, pixels: np.ndarray, model_name: str) -> dict[str, object]:
    """The generation parameters that go into the PNG, in the words that common user interfaces read."""
    edited = {} if request.edit is None else {"Denoising strength": request.edit.strength}
    begin, end = request.guidance_interval
    partly = {} if (begin, end) == (0, 1) else {"Guidance interval": f"{begin:g}:{end:g}"}
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        "CFG scale": request.guidance,
        "Seed": request.seed,
        "Size": f"{pixels.shape[1]}x{pixels.shape[0]}",
        "Model": model_name,
        **edited,
        **partly,
        "Generator": "kdc-edge",
    }
