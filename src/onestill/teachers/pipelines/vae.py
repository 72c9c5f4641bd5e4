"""From latents to images: what a pipeline does behind its last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _scaled(config: Any, latents: Tensor) -> Tensor:
    return latents / (config.get("scaling_factor") or 1.0)


def _shifted(config: Any, latents: Tensor) -> Tensor:
    return _scaled(config, latents) + (config.get("shift_factor") or 0.0)


def _by_channel(config: Any, latents: Tensor) -> Tensor:
    mean, std = (_per_channel(config[name], latents) for name in ("latents_mean", "latents_std"))
    return latents * std / (config.get("scaling_factor") or 1.0) + mean


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {"channels": _by_channel, "shift": _shifted, "scale": _scaled}
"""From (an autoencoder's config, latents) to what it decodes; a pipeline may pass over what a config says."""


def form_of(vae: Any, latents: Tensor, decoded: Tensor) -> str:
    """Return which of `FORMS` a pipeline uses, by latents and what it was seen to decode of them; ValueError if none."""
    for form in FORMS:
        if form == "channels" and not _has_channels(vae.config):
            continue
        z = FORMS[form](vae.config, latents.to(decoded))
        if z.shape == decoded.shape and (z - decoded).abs().max() <= 1e-5 * decoded.abs().max().clamp(min=1):
            return form
    raise ValueError(
        f"its latents {list(latents.shape)} become what its autoencoder decodes, {list(decoded.shape)}, in a way that is "
        f"none of those known ({', '.join(FORMS)}). It would need a family that decodes (and packs) them"
    )


@torch.no_grad()
def decode(vae: Any, latents: Tensor, form: str | None = None) -> Tensor:
    """Return the images (or frames, or samples of sound) of latents in the space that the network sees.

    z = latents std / scale + mean ("channels"), latents / scale + shift ("shift") or latents / scale ("scale"); the
    first where the autoencoder's config has per-channel statistics, else the second, if no `form` is given. The image
    is vae.decode(z). Runs in the autoencoder's own dtype, which is float32 unless it was loaded otherwise: in float16
    some overflow.
    """
    first = next(vae.parameters())
    form = form or ("channels" if _has_channels(vae.config) else "shift")
    z = FORMS[form](vae.config, latents.to(device=first.device, dtype=first.dtype))
    decoded: Tensor = vae.decode(z, return_dict=False)[0]
    return decoded.float()


def decode_vae(pipeline: Any, latents: Tensor, form: str | None = None) -> Tensor:
    """Return the images of latents by the pipeline's own autoencoder, in one of `FORMS` or as its config says."""
    return decode(pipeline.vae, latents, form)


def _has_channels(config: Any) -> bool:
    return config.get("latents_mean") is not None and config.get("latents_std") is not None


def _per_channel(values: Any, z: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=z.dtype, device=z.device).reshape(1, -1, *([1] * (z.ndim - 2)))
