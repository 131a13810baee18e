"""Small decoders in PyTorch: diffusers' AutoencoderTiny, and ThinDecoder, whose stages differ in channels.

    decoder = load_decoder(find_decoder_folder("madebyollin/taesd"), read_model(checkpoint))
    image = decoder.decode(latents / scaling_factor, return_dict=False)[0]         # (B, 3, 8h, 8w) in [-1, 1]

A small decoder reads latents as the U-Net makes them, where AutoencoderKL's reads them divided by its scaling factor.
SmallDecoder keeps the contract of `vae_decoder` (latents already divided), so that a bundle's decoder can be replaced
alone: its encoder's latents, its scaling factor and the programs that divide by it stay as they are.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DecoderTiny
from torch import Tensor, device, dtype, nn

from kdc_edge.diffusers_folder import PICKLES, SUFFIXES, refuse_links_out
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import read_json
from kdc_edge.hub import find_checkpoint
from kdc_edge.manifest import Model
from kdc_edge.presets import DecoderPreset
from kdc_edge.runtimes.torch import read_network
from kdc_edge.weight_files import read_shapes

FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class ThinDecoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """DecoderTiny with fewer channels where the image is large, which diffusers' own class cannot have.

    The layers and their names are DecoderTiny's; the convolution behind each upsampling changes the channels.
    diffusers has no such class: its configuration says so by `_class_name`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 4,
        out_channels: int = 3,
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 48, 32),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 2, 1),
        scaling_factor: float = 1.0,  # noqa: ARG002  # kept in the configuration
    ) -> None:
        super().__init__()
        channels = decoder_block_out_channels
        self.decoder = DecoderTiny(latent_channels, out_channels, num_decoder_blocks, channels, 2, "relu", "nearest")
        layers = self.decoder.layers
        behind = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
        for i, (before, after) in zip(behind, pairwise(channels), strict=True):
            if before != after:
                layers[i] = nn.Conv2d(before, after, 3, padding=1, bias=False)

    def decode(self, latents: Tensor) -> DecoderOutput:
        """As AutoencoderTiny's: latents as the U-Net makes them."""
        return DecoderOutput(sample=self.decoder(latents))


CLASSES: dict[str, Any] = {"AutoencoderTiny": AutoencoderTiny, "ThinDecoder": ThinDecoder}


class SmallDecoder(nn.Module):
    """Latents (B, C, h, w), divided by the model's scaling factor -> images (B, 3, 8h, 8w) in [-1, 1]."""

    def __init__(self, network: Any, scaling_factor: float) -> None:
        super().__init__()
        self.decoder, self.config = network.decoder, network.config
        self.class_name = type(network).__name__
        self.scale = scaling_factor / float(network.config.scaling_factor)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """As diffusers' pipeline with `vae=AutoencoderTiny`, which divides by that class's own factor, 1."""
        assert not return_dict
        return (self.decoder(latents * self.scale),)

    @property
    def device(self) -> device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> dtype:
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def new_decoder(preset: DecoderPreset, latent_channels: int) -> Any:
    """An untrained AutoencoderTiny of the preset's shape, or a ThinDecoder where the stages' channels differ.

    AutoencoderTiny cannot be without an encoder: this one's is the smallest there is, and gives zeros.
    """
    shape = {
        "decoder_block_out_channels": preset.channels,
        "num_decoder_blocks": preset.blocks,
        "latent_channels": latent_channels,
    }
    if len(set(preset.channels)) > 1:
        return ThinDecoder(**shape)
    network = AutoencoderTiny(**shape, encoder_block_out_channels=(latent_channels,), num_encoder_blocks=(0,))
    for parameter in network.encoder.parameters():
        nn.init.zeros_(parameter)
    return network


def find_decoder_folder(name: str) -> Path:
    """A folder of a small decoder, one that train-decoder wrote, or a hub id. Raises CheckpointError."""
    own = Path(name) / "decoder"
    return own if (own / FILES[0]).is_file() else find_checkpoint(name, FILES)


def load_decoder(folder: Path, model: Model) -> SmallDecoder:
    """A small decoder for this model's latents: fp32, on the CPU, no gradients.

    Raises CheckpointError for files that are missing, pickled, damaged or of another class, InputError for a decoder
    of other latents.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no decoder at {folder}: name a folder of AutoencoderTiny's, or a hub id")
    refuse_links_out(folder, (path for path in folder.iterdir() if path.suffix in SUFFIXES))
    class_name = read_json(folder / FILES[0], CheckpointError).get("_class_name")
    if class_name not in tuple(CLASSES):
        raise CheckpointError(f"{folder} holds {class_name!r:.80}: a small decoder is one of {', '.join(CLASSES)}")
    if not (folder / FILES[1]).is_file():
        pickled = any(path for pattern in PICKLES for path in folder.glob(pattern))
        why = "there are pickles alone, which can run code: convert them" if pickled else "the folder is incomplete"
        raise CheckpointError(f"{folder / FILES[1]} is missing: {why}")
    read_shapes(folder / FILES[1])
    network = read_network(CLASSES[str(class_name)], folder, without="encoder.")
    config = network.config
    scale = getattr(config, "upsampling_scaling_factor", 2) ** (len(config.decoder_block_out_channels) - 1)
    for what, found, wanted in (
        ("channels of latents", config.latent_channels, model.latent_channels),
        ("pixels a latent each way", scale, model.vae_scale),
        ("channels of images", config.out_channels, 3),
    ):
        if found != wanted:
            raise InputError(f"--decoder {folder} does not fit: it has {found} {what}, {wanted} are needed")
    return SmallDecoder(network, model.scaling_factor)
