"""The guidance scale: classifier-free guidance, and its embedding for a U-Net that reads it.

noise_pred = guided(cond, uncond, 7.5)                                       # of two noise predictions
noise_pred = unet(..., timestep_cond=guidance_embedding(8.5, 256)[None])     # a latent consistency model: of one
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def guided(cond: Any, uncond: Any, guidance_scale: float) -> Any:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) of two noise predictions, arrays or tensors."""
    return uncond + guidance_scale * (cond - uncond)


def guidance_embedding(guidance_scale: float, width: int) -> NDArray[np.float32]:
    """The sinusoidal embedding (width,) of a guidance scale, as diffusers' LatentConsistencyModelPipeline makes it.

    The sines, then the cosines of 1000 (scale - 1) at falling frequencies (Luo et al. 2023, arXiv 2310.04378, after
    Kingma et al. 2021, arXiv 2107.00630); a zero ends an odd width. In float32 throughout, as there.
    """
    half = width // 2
    step = np.log(np.float32(10_000)) / np.float32(half - 1)
    angles = np.float32(guidance_scale - 1) * np.float32(1000) * np.exp(-step * np.arange(half, dtype=np.float32))
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)])
