"""Requests as they come over HTTP: OpenAI's and diffusers' names, checked against the server's limits.

body = Body.model_validate_json(raw)                 # pydantic's ValidationError for a wrong type
requests, note = body.requests(pipeline, Limits())   # one an image; InputError beyond the limits
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdc_edge.errors import InputError
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request, own_request
from kdc_edge.samplers import SAMPLERS

MAX_PROMPT_CHARS = 2000  # of a prompt that are read; a model reads 77 tokens of them


@dataclass(frozen=True)
class Limits:
    """The largest request that is accepted."""

    images: int = 4
    steps: int = 100
    pixels: int = 1024 * 1024  # of one image
    input_pixels: int = 25_000_000  # of an image to change


DEFAULT_LIMITS = Limits()


class Body(BaseModel):
    """A request for images, as OpenAI's interface and diffusers name its parts."""

    model_config = ConfigDict(extra="ignore")  # clients send `model`, `user`, `quality` and the like

    prompt: str
    n: Annotated[int, Field(ge=1)] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    negative_prompt: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None  # a random one where None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    scheduler: str | None = None
    plain_prompt: bool = False  # brackets are text

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, body: Any) -> Any:
        """OpenAI's schema allows null for what may be left out."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    def remarks(self, note: str) -> dict[str, str]:
        """What an answer has beside every image: OpenAI's `revised_prompt` where it was too long, and the note."""
        revised = {"revised_prompt": self.prompt[:MAX_PROMPT_CHARS]} if len(self.prompt) > MAX_PROMPT_CHARS else {}
        return revised | ({"note": note} if note else {})

    def requests(self, pipeline: Pipeline, limits: Limits) -> tuple[list[Request], str]:
        """One request an image, with seeds that count up, and a note of what is made in another way than asked.

        Raises InputError beyond the limits; a number of steps that the model asks for is brought within them.
        """
        if self.n > limits.images:
            raise InputError(f"n is {self.n}: this server makes at most {limits.images} images a request")
        if (steps := self.num_inference_steps or 0) > limits.steps:
            raise InputError(f"num_inference_steps is {steps}: this server takes at most {limits.steps}")
        width, height = (None, None) if self.size == "auto" else (int(side) for side in self.size.split("x"))
        if width is not None and height is not None and width * height > limits.pixels:
            raise InputError(f"size is {self.size}: this server makes at most {limits.pixels} pixels an image")
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        if self.scheduler is not None and self.scheduler not in SAMPLERS:
            raise InputError(f"scheduler is {self.scheduler!r:.40}: choose from {', '.join(SAMPLERS)}")
        request, note = own_request(
            pipeline.model,
            Request(
                self.prompt[:MAX_PROMPT_CHARS], self.negative_prompt[:MAX_PROMPT_CHARS], width=width, height=height,
                weighted=not self.plain_prompt,
            ),
            sampler=self.scheduler, steps=self.num_inference_steps, guidance=self.guidance_scale,
        )  # fmt: skip
        if self.num_inference_steps is None:
            request = replace(request, steps=min(request.steps, limits.steps))
        note = "; ".join(line for line in (note, pipeline.unread(request)) if line)
        return [replace(request, seed=(seed + i) % 2**64) for i in range(self.n)], note


class EditBody(Body):
    """A request for changed images: OpenAI's `image` and `mask`, diffusers' `strength`."""

    image: str  # base64, or a data URL
    mask: str | None = None  # transparent pixels are repainted, as OpenAI says; without any, white ones
    strength: Annotated[float, Field(gt=0, le=1)] | None = None

    def edited(self, pipeline: Pipeline, limits: Limits) -> tuple[list[Request], str]:
        """As `requests`, with the image. Raises InputError for what is no image too."""
        requests, note = self.requests(pipeline, limits)
        edit = pipeline.read_edit(
            requests[0], _decoded(self.image, "image"), strength=self.strength, transparent_is_masked=True,
            mask=None if self.mask is None else _decoded(self.mask, "mask"), max_pixels=limits.input_pixels,
        )  # fmt: skip
        return [replace(request, edit=edit) for request in requests], note


def _decoded(text: str, what: str) -> bytes:
    """The bytes of base64, or of a data URL."""
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError:
        raise InputError(f"{what} is not in base64") from None
