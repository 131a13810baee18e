"""The networks as exportable modules, with inputs and outputs described as in optimum.

    part = load_component(Path("runs/latest/checkpoint"), "unet")
    part.config.input_shapes, part.config.output_shapes         # {"sample": ("batch_size", 4, ...), ...}
    part.module(*part.config.generate_dummy_inputs().values())

Names are optimum's. A shape holds a name where the size is free: `batch_size`, `latent_height`, ... . Every
target reads the same descriptions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.utils.input_generators import (
    DummyInputGenerator,
    DummyTextInputGenerator,
    DummyVisionInputGenerator,
)
from optimum.utils.normalized_config import NormalizedConfig
from torch import Tensor, nn

from kdc_edge.components import CHECKER, CLIP_SIDE
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError
from kdc_edge.files import read_json
from kdc_edge.manifest import Tensor as TensorInfo
from kdc_edge.runtimes.torch import concept_scores, load_network
from kdc_edge.runtimes.torch.small_decoder import load_decoder

CONCEPTS = 17  # of the safety checker; diffusers' class has no other number
Shapes = Mapping[str, tuple[int | str, ...]]


class TextEncoder(nn.Module):
    """CLIP's text model: ids (B, 77) -> hidden states (B, 77, D), pooled (B, D)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.text_encoder = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self.text_encoder(input_ids=input_ids)
        return found.last_hidden_state, found.pooler_output


class UNet(nn.Module):
    """The denoiser: sample (B, C, h, w), timestep (1), text (B, 77, D) -> prediction (B, C, h, w).

    That of a latent consistency model also takes the guidance scale's embedding (B, W).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.unet = network

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        more = {} if timestep_cond is None else {"timestep_cond": timestep_cond}
        found: Tensor = self.unet(sample, timestep, encoder_hidden_states, **more, return_dict=False)[0]
        return found


class VaeDecoder(nn.Module):
    """Latents (B, C, h, w), already divided by the scaling factor -> images (B, 3, 8h, 8w) in [-1, 1]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        network.encoder = network.quant_conv = None  # the half that is not exported gives its memory back
        self.vae = network

    def forward(self, latent_sample: Tensor) -> Tensor:
        found: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return found


class VaeEncoder(nn.Module):
    """Images (B, 3, 8h, 8w) in [-1, 1] -> mean and log variance of their latents (B, 2C, h, w), not yet scaled."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        network.decoder = network.post_quant_conv = None  # the half that is not exported gives its memory back
        self.vae = network

    def forward(self, sample: Tensor) -> Tensor:
        found: Tensor = self.vae.encode(sample, return_dict=False)[0].parameters
        return found


class SafetyChecker(nn.Module):
    """Images as CLIP sees them (B, 3, 224, 224) -> a score a concept (B, 17), above 0 where the image is flagged."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.checker = network

    def forward(self, clip_input: Tensor) -> Tensor:
        found: Tensor = concept_scores(self.checker, clip_input)
        return found


class DummyTimestep(DummyInputGenerator):  # type: ignore[misc]  # optimum has no types
    """One whole timestep, int64 (1): optimum's own is a float without a dimension."""

    SUPPORTED_INPUT_NAMES = ("timestep",)

    def __init__(self, task: str, normalized_config: NormalizedConfig, **_: object) -> None:
        pass

    def generate(
        self,
        input_name: str,  # noqa: ARG002
        framework: str = "pt",
        int_dtype: str = "int64",
        float_dtype: str = "fp32",  # noqa: ARG002
    ) -> Any:
        return self.random_int_tensor([1], max_value=1000, framework=framework, dtype=int_dtype)


class DummyFloats(DummyInputGenerator):  # type: ignore[misc]
    """Random numbers of a subclass's shape."""

    shape: list[Any]

    def generate(
        self,
        input_name: str,  # noqa: ARG002
        framework: str = "pt",
        int_dtype: str = "int64",  # noqa: ARG002
        float_dtype: str = "fp32",
    ) -> Any:
        return self.random_float_tensor(self.shape, framework=framework, dtype=float_dtype)


class DummyHiddenStates(DummyFloats):
    """Text encoder output: float (B, 77, D)."""

    SUPPORTED_INPUT_NAMES = ("encoder_hidden_states",)

    def __init__(
        self,
        task: str,  # noqa: ARG002
        normalized_config: NormalizedConfig,
        *,
        batch_size: int,
        sequence_length: int,
        **_: object,
    ) -> None:
        self.shape = [batch_size, sequence_length, normalized_config.hidden_size]


class DummyTimestepCond(DummyFloats):
    """The guidance scale's embedding: float (B, W). optimum's own generator asks for a vocabulary too."""

    SUPPORTED_INPUT_NAMES = ("timestep_cond",)

    def __init__(self, task: str, normalized_config: NormalizedConfig, *, batch_size: int, **_: object) -> None:  # noqa: ARG002
        self.shape = [batch_size, normalized_config.config.time_cond_proj_dim]  # may be None


class DummyClipInput(DummyFloats):
    """An image as CLIP sees it: float (B, 3, 224, 224)."""

    SUPPORTED_INPUT_NAMES = ("clip_input",)

    def __init__(self, task: str, normalized_config: NormalizedConfig, *, batch_size: int, **_: object) -> None:  # noqa: ARG002
        self.shape = [batch_size, 3, CLIP_SIDE, CLIP_SIDE]


class ComponentConfig(ExporterConfig):  # type: ignore[misc]
    """optimum's description of an export, with whole shapes beside its free axes."""

    def __init__(self, config: Any, tokens: int) -> None:
        super().__init__(config, task="feature-extraction")
        self.tokens = tokens  # a prompt's length, 77

    @property
    def size_unit(self) -> int:
        """Height and width come in multiples of this."""
        return 1

    @property
    @abstractmethod
    def input_shapes(self) -> Shapes: ...

    @property
    @abstractmethod
    def output_shapes(self) -> Shapes: ...

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return _free_axes(self.input_shapes)

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return _free_axes(self.output_shapes)

    def generate_dummy_inputs(self, framework: str = "pt", **sizes: int) -> dict[str, Any]:
        """Random inputs by name. No free size is 1, which a tracer would take for a constant."""
        sizes = {"batch_size": 2, "height": 2 * self.size_unit, "width": 3 * self.size_unit} | sizes
        found: dict[str, Any] = super().generate_dummy_inputs(framework, sequence_length=self.tokens, **sizes)
        return found


class TextEncoderConfig(ComponentConfig):
    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)

    @property
    def input_shapes(self) -> Shapes:
        return {"input_ids": ("batch_size", self.tokens)}

    @property
    def output_shapes(self) -> Shapes:
        width = self._normalized_config.hidden_size
        return {
            "last_hidden_state": ("batch_size", self.tokens, width),
            "pooler_output": ("batch_size", width),
        }


class UNetConfig(ComponentConfig):
    NORMALIZED_CONFIG_CLASS = NormalizedConfig.with_args(
        num_channels="in_channels", hidden_size="cross_attention_dim", allow_new=True
    )
    # optimum takes the first one of whose names the input's name begins with.
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator, DummyTimestepCond, DummyTimestep, DummyHiddenStates)

    @property
    def size_unit(self) -> int:
        return int(2 ** (len(self._config.block_out_channels) - 1))  # each stage but the last halves the sample

    @property
    def input_shapes(self) -> Shapes:
        width = self._config.time_cond_proj_dim
        return {
            "sample": ("batch_size", self._config.in_channels, "latent_height", "latent_width"),
            "timestep": (1,),
            "encoder_hidden_states": ("batch_size", self.tokens, self._config.cross_attention_dim),
            **({} if width is None else {"timestep_cond": ("batch_size", width)}),
        }

    @property
    def output_shapes(self) -> Shapes:
        return {"out_sample": ("batch_size", self._config.out_channels, "latent_height", "latent_width")}


class VaeDecoderConfig(ComponentConfig):
    NORMALIZED_CONFIG_CLASS = NormalizedConfig.with_args(num_channels="latent_channels", allow_new=True)
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)

    @property
    def input_shapes(self) -> Shapes:
        return {"latent_sample": ("batch_size", self._config.latent_channels, "latent_height", "latent_width")}

    @property
    def output_shapes(self) -> Shapes:
        return {"sample": ("batch_size", self._config.out_channels, "height", "width")}


class VaeEncoderConfig(ComponentConfig):
    NORMALIZED_CONFIG_CLASS = NormalizedConfig.with_args(num_channels="in_channels", allow_new=True)
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)

    @property
    def size_unit(self) -> int:
        return int(2 ** (len(self._config.block_out_channels) - 1))  # pixels a latent, each way

    @property
    def input_shapes(self) -> Shapes:
        return {"sample": ("batch_size", self._config.in_channels, "height", "width")}

    @property
    def output_shapes(self) -> Shapes:
        return {"latent_parameters": ("batch_size", 2 * self._config.latent_channels, "latent_height", "latent_width")}


class SafetyCheckerConfig(ComponentConfig):
    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyClipInput,)

    @property
    def input_shapes(self) -> Shapes:
        return {"clip_input": ("batch_size", 3, CLIP_SIDE, CLIP_SIDE)}

    @property
    def output_shapes(self) -> Shapes:
        return {"concept_scores": ("batch_size", CONCEPTS)}


@dataclass(frozen=True)
class ExportComponent:
    """A network, ready for any target."""

    name: str
    module: nn.Module  # takes the config's inputs in their order
    config: ComponentConfig
    class_name: str  # of the network
    full_precision: bool = False  # kept in fp32, whatever the format says


_KINDS = {
    "text_encoder": (TextEncoder, TextEncoderConfig),
    "unet": (UNet, UNetConfig),
    "vae_decoder": (VaeDecoder, VaeDecoderConfig),
    "vae_encoder": (VaeEncoder, VaeEncoderConfig),
    CHECKER: (SafetyChecker, SafetyCheckerConfig),
}


def load_component(checkpoint: Path, name: str, decoder: Path | None = None) -> ExportComponent:
    """One component, fp32 on the CPU; `decoder` takes the place of the checkpoint's. Raises CheckpointError.

    Drop it before the next one is loaded.
    """
    text = read_json(checkpoint / "text_encoder" / "config.json", CheckpointError)
    module_class, config_class = _KINDS[name]
    network: Any
    if decoder is not None and name == "vae_decoder":
        network = load_decoder(decoder, read_model(checkpoint))
    else:
        network = load_network(checkpoint, name)
    class_name = getattr(network, "class_name", type(network).__name__)
    tokens = text.get("max_position_embeddings", 77)
    if not isinstance(tokens, int):
        raise CheckpointError(f"{checkpoint} cannot be used: max_position_embeddings is {tokens!r:.80}")
    return ExportComponent(name, module_class(network).eval(), config_class(network.config, tokens), class_name)


def describe(shapes: Shapes) -> dict[str, TensorInfo]:
    """Inputs or outputs as the manifest lists them."""
    dtypes = {"input_ids": "int64", "timestep": "int64"}
    return {n: TensorInfo(dtype=dtypes.get(n, "float32"), shape=list(s)) for n, s in shapes.items()}


def _free_axes(shapes: Shapes) -> dict[str, dict[int, str]]:
    return {n: {i: s for i, s in enumerate(shape) if isinstance(s, str)} for n, shape in shapes.items()}
