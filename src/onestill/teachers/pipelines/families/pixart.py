"""PixArt-alpha and PixArt-Sigma: latents, a `PixArtTransformer2DModel`, T5 prompts with their mask.

At 1024 pixels (sample_size 128) PixArt-alpha's network is also given the size of the picture; watching the
pipeline finds it. One step of PixArt-alpha takes the scheduler's prediction of x_0, which DDIM has.
"""

from __future__ import annotations

from onestill.teachers.pipelines.families._vp import ddim_steps, one_ddim_step, vp_schedule
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.vae import decode_vae

PIXART = PipelineSpec(
    name="pixart",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    network="transformer",
    schedule=vp_schedule,
    decode=decode_vae,
    one_step=one_ddim_step,
    few_steps=ddim_steps,
    # Binning is the identity at the sizes the networks were trained for and unknown at any other. Cleaning captions
    # needs two packages; a prompt must not depend on whether they are installed.
    arguments={"use_resolution_binning": False, "clean_caption": False},
)
