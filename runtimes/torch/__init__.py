"""PyTorch, the reference: opens the components of a *checkpoint* by diffusers and transformers, in fp32.

    unet = get_runtime("torch").load(Path("runs/latest/checkpoint"), "unet", LoadOptions(device="CPU"))
    network = load_network(Path("runs/latest/checkpoint"), "vae_decoder")      # the module, for exporters

The components take and give the same named arrays as an exported bundle's (kdc_edge/components.py). Only local
safetensors files are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kdc_edge.components import CHECKER, Component, Execution
from kdc_edge.diffusers_folder import TINY_VAE, check_checker, check_weights
from kdc_edge.errors import CheckpointError, InputError, require
from kdc_edge.files import read_json
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.base import DEFAULTS, Device, LoadOptions, check_device
from kdc_edge.text import one_line
from kdc_edge.weight_files import weights_of

_torch: Any = require("torch", extra="train", purpose="running a checkpoint")

# component -> (package, class, folder in the checkpoint)
_NETWORKS = {
    "text_encoder": ("transformers", "CLIPTextModel", "text_encoder"),
    "unet": ("diffusers", "UNet2DConditionModel", "unet"),
    "vae_decoder": ("diffusers", "AutoencoderKL", "vae"),
    "vae_encoder": ("diffusers", "AutoencoderKL", "vae"),  # the same files hold both halves
    CHECKER: ("diffusers.pipelines.stable_diffusion.safety_checker", "StableDiffusionSafetyChecker", CHECKER),
}


def load_network(checkpoint: Path, component: str) -> Any:
    """A component's torch module on the CPU: fp32, eval, no gradients.

    Raises CheckpointError for files that are missing, pickled, damaged, or of another architecture.
    """
    check_weights(checkpoint)
    if component not in _NETWORKS:
        raise InputError(f"a checkpoint has no component {component!r}: choose from {', '.join(_NETWORKS)}")
    package, class_name, subfolder = _NETWORKS[component]
    folder = checkpoint / subfolder
    if subfolder == "vae" and read_json(folder / "config.json", CheckpointError).get("_class_name") == TINY_VAE:
        if component == "vae_encoder":
            raise CheckpointError(
                f"{folder} is no AutoencoderKL, whose encoder --swift exports, --with vae_encoder too, and --image"
                " needs: leave these out"
            )
        class_name = TINY_VAE
    if component == CHECKER:
        check_checker(checkpoint)
    network_class = getattr(require(package, extra="train", purpose="reading a checkpoint"), class_name)
    kind = "text_encoder" if component == CHECKER else subfolder  # files are named as transformers names them
    network = read_network(network_class, folder, variant=weights_of(folder, kind).variant)
    if component == CHECKER:
        for embeds in (network.special_care_embeds, network.concept_embeds):
            embeds.data = _unit(embeds.data)  # cosines ask for no more
    return network


def read_network(network_class: Any, folder: Path, *, without: str = "\n", variant: str | None = None) -> Any:
    """A network of diffusers' or transformers' from its folder: fp32, on the CPU, eval, no gradients.

    `variant` is of its weight files' names, such as fp16. Weights whose names begin with `without` may be missing.
    Raises CheckpointError as `load_network` does.
    """
    class_name = network_class.__name__
    from_diffusers = hasattr(network_class, "load_config")
    dtype = {"torch_dtype" if from_diffusers else "dtype": _torch.float32}
    try:
        with quiet():
            network, found = network_class.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, variant=variant, **dtype
            )
    except MemoryError:
        raise
    except Exception as error:  # both libraries raise whatever comes
        raise CheckpointError(f"{folder} cannot be read as {class_name}: {one_line(error)}") from None
    lost = [str(key) for key in (*found["missing_keys"], *found["mismatched_keys"])]
    lost = [key for key in lost if not key.startswith(without)]
    if lost:  # the libraries would fill these in at random
        raise CheckpointError(f"{folder} lacks {len(lost)} weights of {class_name}, such as {lost[0]}: save it again")
    return network.eval().requires_grad_(False)


class TorchComponent:
    """A network as a component: numpy in, float32 numpy out, computed on the network's device in its own dtype.

    `threads` holds for all of torch in the thread that calls; None leaves torch's own number.
    """

    def __init__(self, name: str, network: Any, threads: int | None = None) -> None:
        self._name = name
        self._network = network
        self._threads = threads

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """Compute; raises CheckpointError where the layers, as the configuration puts them together, do not fit."""
        if self._threads not in (None, _torch.get_num_threads()):  # each thread of a program has a number of its own
            _torch.set_num_threads(self._threads)
        # diffusers' own `dtype` looks at every layer of the network: 10 ms for the U-Net of SD 1.x.
        sample = next(p for p in self._network.parameters() if p.is_floating_point())
        try:
            with _torch.inference_mode():
                output = self._forward(**{name: _tensor(value, sample) for name, value in inputs.items()})
        except _torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint's {self._name} cannot compute this: {one_line(error)}") from None
        return np.asarray(output.float().cpu().numpy())

    def explain(self) -> Execution:
        dtypes = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        return Execution(self._network.device.type.upper(), dtypes.get(str(self._network.dtype).removeprefix("torch.")))

    def _forward(self, **inputs: Any) -> Any:
        if self._name == "text_encoder":
            return self._network(input_ids=inputs["input_ids"].long()).last_hidden_state
        if self._name == "unet":
            return self._network(**inputs, return_dict=False)[0]
        if self._name == "vae_encoder":
            return self._network.encode(inputs["sample"], return_dict=False)[0].parameters
        if self._name == CHECKER:
            return concept_scores(self._network, inputs["clip_input"])
        return self._network.decode(inputs["latent_sample"], return_dict=False)[0]


def _tensor(value: np.ndarray, like: Any) -> Any:
    """The array on the device of another tensor, and in its dtype unless it holds integers."""
    tensor = _torch.from_numpy(np.ascontiguousarray(value))
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)


def concept_scores(network: Any, clip_input: Any, adjustment: Any = 0.0) -> Any:
    """Scores (B, 17) of diffusers' StableDiffusionSafetyChecker for images as CLIP sees them, above 0 where flagged.

    `network` is as `load_network` gives it, with unit vectors as embeddings. A concept of special care makes all others
    stricter; diffusers rounds its score to three decimals before it asks.
    """
    embeds = _unit(network.visual_projection(network.vision_model(clip_input)[1]))
    care = embeds @ network.special_care_embeds.T - network.special_care_embeds_weights + adjustment
    stricter = (care.amax(1, keepdim=True) > 0.0005).float() * 0.01
    return embeds @ network.concept_embeds.T - network.concept_embeds_weights + stricter + adjustment


def _unit(vectors: Any) -> Any:
    return vectors / vectors.norm(dim=1, keepdim=True)


class TorchRuntime:
    name = "torch"
    version: str = _torch.__version__

    def devices(self) -> list[Device]:
        found = [Device("CPU", "processor")]
        if _torch.cuda.is_available():
            found.append(Device("CUDA", str(_torch.cuda.get_device_name())))
        if _torch.backends.mps.is_available():
            found.append(Device("MPS", "Apple GPU"))
        return found

    def load(self, folder: Path, component: str, options: LoadOptions = DEFAULTS) -> Component:
        """Open a component of a checkpoint folder."""
        chosen = check_device(self, options.device)
        return TorchComponent(component, load_network(folder, component).to(chosen.lower()), options.threads)


RUNTIME = TorchRuntime()
