"""The networks behind a pipeline, as an engine offers them: a call, and what else some engines can do.

| component | inputs | output |
|---|---|---|
| text_encoder | input_ids int (B, 77) | text embeddings float32 (B, 77, D) |
| unet | sample float32 (B, 4, h, w), timestep (1,), encoder_hidden_states (B, 77, D) | noise float32 (B, 4, h, w) |
| | and timestep_cond (B, W) where the U-Net reads the guidance scale (guidance.py) | |
| vae_decoder | latent_sample float32 (1, 4, h, w), scaled | image float32 (1, 3, 8h, 8w) in [-1, 1] |
| vae_encoder, optional | sample float32 (1, 3, 8h, 8w) in [-1, 1] | mean and log variance float32 (1, 8, h, w) |
| safety_checker, optional | clip_input float32 (1, 3, 224, 224) | scores float32 (1, 17), above 0 where flagged |

Optional abilities are protocols of their own; a pipeline asks `isinstance(component, SupportsPrepare)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
CHECKER = "safety_checker"
CLIP_SIDE = 224  # pixels of the image that the safety checker reads, each way
OPTIONAL = ("vae_encoder", CHECKER)  # exported where --with asks for them
Shapes = Mapping[str, tuple[int, ...]]  # of a network's inputs, by name; -1 for a size that the network has fixed


class Component(Protocol):
    """A network with named numpy inputs and one numpy output, any batch size."""

    def __call__(self, **inputs: np.ndarray) -> np.ndarray: ...


@runtime_checkable
class SupportsPrepare(Protocol):
    """A component that its engine compiles for each set of input shapes."""

    def prepare(self, shapes: Shapes) -> None:
        """Compile for these shapes now, so that the first call need not."""
        ...


@runtime_checkable
class SupportsStart(Protocol):
    """A set of components of which one can be loaded and compiled while another computes."""

    def start(self, name: str, shapes: Sequence[Shapes]) -> None: ...


@dataclass(frozen=True)
class Execution:
    """How an engine computes a component."""

    provider: str  # the engine's name for what computes: "CPUExecutionProvider", "CPU"
    compute_dtype: str | None  # of matrix products, the most frequent first: "bf16"; None where the engine hides it


@runtime_checkable
class SupportsExplain(Protocol):
    """A component that reports how it was executed; ask after its first call."""

    def explain(self) -> Execution: ...
