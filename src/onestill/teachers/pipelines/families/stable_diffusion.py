"""Stable Diffusion 1.x and 2.x, and Stable Diffusion XL: latents, a `UNet2DConditionModel`, CLIP prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from onestill.teachers.pipelines.families._vp import any_size, decode_vae, one_ddim_step, square_size, vp_schedule
from onestill.teachers.pipelines.spec import PipelineSpec

SCALE_FEATURES = 256  # of the guidance scale, as in the latent consistency models of diffusers


def guide_once(network: Any) -> None:
    """Keep the pipeline from guiding a student, whose guidance is distilled in, at its default scale a second time.

    It guides no network that takes the scale as an input, so the student is given that input, with weight zero.
    """
    embedding = network.time_embedding
    weight = embedding.linear_1.weight
    embedding.cond_proj = nn.Linear(SCALE_FEATURES, weight.shape[1], bias=False).to(weight.device, weight.dtype)
    nn.init.zeros_(embedding.cond_proj.weight)
    network.register_to_config(time_cond_proj_dim=SCALE_FEATURES)


STABLE_DIFFUSION = PipelineSpec(
    name="stable_diffusion",
    pipelines=("StableDiffusionPipeline",),
    network="unet",
    schedule=vp_schedule,
    decode=decode_vae,
    one_step=one_ddim_step,
    adapt=guide_once,
    set_size=any_size,
)
STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION, name="stable_diffusion_xl", pipelines=("StableDiffusionXLPipeline",), set_size=square_size
)
