"""Apple's names and layouts behind the contract's: what the Core ML engines share.

The files that Apple's Swift package reads have fixed shapes, their own names, the text's channels first and the
timestep once a sample. A pipeline uses the names of kdc_edge/components.py and any batch; `adapt` stands between
the two.

    unet = adapt(bundle, "unet", predict)                # predict(**Apple's inputs) -> Apple's outputs
    noise_pred = unet(sample=sample, timestep=timestep, encoder_hidden_states=hidden)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdc_edge.bundle import Bundle
from kdc_edge.components import CHECKER, Component
from kdc_edge.errors import BundleError, InputError
from kdc_edge.files import inside
from kdc_edge.manifest import ComponentInfo, Tensor

Predict = Callable[..., Mapping[str, np.ndarray]]  # named fp32 arrays in, all outputs by name
Stage = tuple[Sequence[str], Predict]  # a package's inputs, and the package

# component -> its package in the bundle's folder of that name; a large U-Net lies in two.
PACKAGES = {
    "text_encoder": "TextEncoder",
    "unet": "Unet",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
    CHECKER: "SafetyChecker",
}
CHUNKS = ("UnetChunk1", "UnetChunk2")
OUTPUTS = {
    "text_encoder": "last_hidden_state",
    "unet": "noise_pred",
    "vae_decoder": "image",
    "vae_encoder": "latent",
    CHECKER: "concept_scores",
}
CONTRACT = {
    "text_encoder": ("input_ids",),
    "unet": ("sample", "timestep", "encoder_hidden_states"),  # and a latent consistency model's timestep_cond
    "vae_decoder": ("latent_sample",),
    "vae_encoder": ("sample", "diagonal_noise", "noise", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    CHECKER: ("clip_input", "images", "adjustment"),
}
SPREAD = 16.0  # standard deviations between two draws of the encoder: in fp16, one would be lost beside the mean
LEAST = 1e-7  # standard deviation that is told from none
PROGRAM = "Data/com.apple.CoreML/model.mlmodel"  # within a package


def packages_of(bundle: Bundle, info: ComponentInfo) -> list[Path]:
    """The component's .mlpackage folders, in the order in which they are computed."""
    found = [name.removesuffix(f"/{PROGRAM}") for name in info.files if name.endswith(f".mlpackage/{PROGRAM}")]
    if not found:
        raise BundleError(f"{bundle.root} names no Core ML package: export it again")
    return [inside(bundle.root, name, BundleError) for name in found]


def in_turn(stages: Sequence[Stage]) -> Predict:
    """A network that lies in several packages: each gets the first inputs and what those before it gave."""

    def predict(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        values: dict[str, np.ndarray] = dict(inputs)
        for names, stage in stages:
            values |= stage(**{name: values[name] for name in names if name in values})
        return values

    return predict


@dataclass(frozen=True)
class Adapted:
    """A component of the contract, computed by a network with Apple's names and one fixed batch."""

    name: str
    inputs: Mapping[str, Tensor]  # as the manifest lists them
    predict: Predict

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """Compute in batches of the network's own size, the last one filled up; float32."""
        arranged = self._arrange(inputs)
        batch = next(iter(self.inputs.values())).shape[0]
        if not isinstance(batch, int) or batch < 1:
            raise BundleError(f"the bundle's {self.name} has a batch of {batch!r:.40}: export it again")
        total = len(next(iter(arranged.values())))
        found = []
        for start in range(0, total, batch):
            part = {name: _fill(value[start : start + batch], batch) for name, value in arranged.items()}
            outputs = self.predict(**part)
            if OUTPUTS[self.name] not in outputs:
                raise BundleError(f"the bundle's {self.name} gives no {OUTPUTS[self.name]}: export it again")
            found.append(outputs[OUTPUTS[self.name]][: total - start])
        return np.concatenate(found).astype(np.float32, copy=False)

    def zeros(self, name: str, count: int) -> np.ndarray:
        """`count` samples of an input; raises BundleError where the manifest does not list it."""
        if name not in self.inputs or not all(isinstance(side, int) for side in self.inputs[name].shape):
            raise BundleError(f"the bundle's {self.name} has no {name} of fixed sizes: export it again")
        return np.zeros((count, *(int(side) for side in self.inputs[name].shape[1:])), np.float32)

    def _arrange(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The contract's arrays under Apple's names, shapes checked but for the batch."""
        wanted = (*CONTRACT[self.name], *(name for name in ("timestep_cond",) if name in self.inputs))
        if inputs.keys() != set(wanted):
            raise BundleError(
                f"the {self.name} takes {', '.join(wanted)} where {', '.join(inputs)} are given: a bundle made for"
                " another pipeline"
            )
        if self.name == "unet":
            sample = inputs["sample"]
            arranged = dict(inputs) | {
                "timestep": np.broadcast_to(inputs["timestep"], sample.shape[:1]),
                "encoder_hidden_states": inputs["encoder_hidden_states"].transpose(0, 2, 1)[:, :, None],
            }
        elif self.name == "vae_decoder":
            arranged = {"z": inputs["latent_sample"]}
        else:
            arranged = dict(inputs)
        if arranged.keys() != self.inputs.keys():
            raise BundleError(
                f"the bundle's {self.name} takes {', '.join(self.inputs)}, not Apple's names: export it again"
            )
        for name, value in arranged.items():
            expected = self.inputs[name].shape[1:]
            if list(value.shape[1:]) != expected:
                raise InputError(
                    f"this Core ML bundle's {self.name} takes {name} of {_sides(expected)} where"
                    f" {_sides(value.shape[1:])} are given: its sizes are fixed, so leave width and height out"
                )
        return {n: np.ascontiguousarray(v, np.float32) for n, v in arranged.items()}


@dataclass(frozen=True)
class AdaptedEncoder:
    """Apple's encoder draws from its distribution and adds noise; two draws without noise tell the distribution."""

    network: Adapted
    scaling_factor: float

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """Mean and log variance (B, 2C, h, w), float32, of `sample` (B, 3, H, W)."""
        sample = inputs["sample"]
        mean = self._draw(sample, 0.0)
        deviation = (self._draw(sample, SPREAD) - mean) / SPREAD
        return np.concatenate([mean, 2 * np.log(np.maximum(deviation, np.float32(LEAST)))], axis=1)

    def _draw(self, sample: np.ndarray, deviations: float) -> np.ndarray:
        count = len(sample)
        noise = self.network.zeros("noise", count)
        one = np.ones((count, 1), np.float32)
        return self.network(
            sample=sample, diagonal_noise=noise + np.float32(deviations), noise=noise,
            sqrt_alphas_cumprod=one / np.float32(self.scaling_factor), sqrt_one_minus_alphas_cumprod=0 * one,
        )  # fmt: skip


@dataclass(frozen=True)
class AdaptedChecker:
    """Apple's safety checker makes images black itself; here it gets black ones, and its scores alone are read."""

    network: Adapted

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """Scores (B, concepts), float32, of `clip_input` (B, 3, 224, 224)."""
        count = len(inputs["clip_input"])
        zeros = {name: self.network.zeros(name, count) for name in ("images", "adjustment")}
        return self.network(clip_input=inputs["clip_input"], **zeros)


def adapt(bundle: Bundle, name: str, predict: Predict) -> Component:
    network = Adapted(name, bundle.component(name)[0].inputs, predict)
    if name == CHECKER:
        return AdaptedChecker(network)
    return AdaptedEncoder(network, bundle.manifest.model.scaling_factor) if name == "vae_encoder" else network


def _fill(part: np.ndarray, batch: int) -> np.ndarray:
    """`part` with its first sample repeated until it is `batch` long."""
    if len(part) == batch:
        return part
    return np.concatenate([part, part[:1].repeat(batch - len(part), axis=0)])


def _sides(shape: Iterable[int | str]) -> str:
    return "x".join(map(str, shape))
