"""Wan 2.1: flow matching in the latents of a video, [C, F, H, W], prompts by UMT5.

One frame is a picture; the call's arguments height, width and num_frames say how much of it there is.
"""

from __future__ import annotations

from typing import Any

from onestill.teachers.pipelines.families._flow import flow_schedule, flow_steps, one_flow_step
from onestill.teachers.pipelines.spec import PipelineSpec, Schedule
from onestill.teachers.pipelines.vae import decode_vae


def schedule(pipeline: Any) -> Schedule:
    """Return the linear path under the scheduler's shift; ValueError for two networks or a time for each token."""
    if pipeline.config.boundary_ratio is not None:
        raise ValueError("a Wan 2.2 pipeline has one network for high noise and one for low; a teacher has one")
    if pipeline.config.expand_timesteps:
        raise ValueError("this Wan pipeline gives its network a time for each token; a teacher has one for each sample")
    return flow_schedule(pipeline)


WAN = PipelineSpec(
    name="wan",
    pipelines=("WanPipeline",),
    network="transformer",
    schedule=schedule,
    decode=decode_vae,
    one_step=one_flow_step,
    few_steps=flow_steps,
    result=lambda output: output.frames.movedim(1, 2) * 2 - 1,  # [B, C, F, H, W]
    output_field="frames",
)
