"""Checkpoints as people have them, opened as a diffusers folder: single files, another VAE, LoRAs, added tokens.

    folder = open_checkpoint("model.safetensors", Additions(loras=(Lora.parse("style.safetensors:0.8"),)), say=print)

What needs a change is written once to the user's cache folder; the rest of kdc-edge knows diffusers folders alone.
"""

from kdc_edge.checkpoints.assemble import Additions, open_checkpoint
from kdc_edge.checkpoints.lora import Lora

__all__ = ["Additions", "Lora", "open_checkpoint"]
