"""Stable Diffusion 3 and 3.5: flow matching, a `SD3Transformer2DModel`, two CLIP encoders and, if there, T5."""

from __future__ import annotations

from onestill.teachers.pipelines.families._flow import flow_schedule, flow_steps, one_flow_step
from onestill.teachers.pipelines.families._vp import square_size
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.vae import decode_vae

STABLE_DIFFUSION_3 = PipelineSpec(
    name="stable_diffusion_3",
    pipelines=("StableDiffusion3Pipeline",),
    network="transformer",
    schedule=flow_schedule,
    decode=decode_vae,
    one_step=one_flow_step,
    few_steps=flow_steps,
    set_size=square_size,
)
