"""From latents to images: what a pipeline does behind its last step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Return the images (or frames, or samples of sound) of latents in the space that the network sees.

    z = latents std / scale + mean where the autoencoder's config has per-channel statistics, else
    latents / scale + shift; the image is vae.decode(z). Runs in the autoencoder's own dtype, which is float32
    unless it was loaded otherwise: in float16 some overflow.
    """
    config, first = vae.config, next(vae.parameters())
    z = latents.to(device=first.device, dtype=first.dtype)
    scale = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        z = z * _per_channel(std, z) / scale + _per_channel(mean, z)
    else:
        z = z / scale + (config.get("shift_factor") or 0.0)
    decoded: Tensor = vae.decode(z, return_dict=False)[0]
    return decoded.float()


def _per_channel(values: Any, z: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=z.dtype, device=z.device).reshape(1, -1, *([1] * (z.ndim - 2)))
