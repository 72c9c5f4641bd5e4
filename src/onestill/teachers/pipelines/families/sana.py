"""Sana: flow matching in the deeply compressed latents of an `AutoencoderDC`, prompts by Gemma 2 with a mask.

The prompt goes to Gemma behind the pipeline's own `complex_human_instruction`, "no prompt" without it; both are
recorded as the pipeline makes them. Pictures have the size the network was trained at, not the call's 1024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onestill.teachers.pipelines.families._flow import flow_schedule, flow_steps, one_flow_step
from onestill.teachers.pipelines.spec import PipelineSpec, Schedule
from onestill.teachers.pipelines.vae import decode_vae


def schedule(pipeline: Any) -> Schedule:
    """Return the linear path under the scheduler's shift; the network's time is 1000 sigma `timestep_scale`."""
    return flow_schedule(pipeline, net_scale=1000.0 * pipeline.transformer.config.timestep_scale)


def size(pipeline: Any) -> Mapping[str, int]:
    """Return the size of the pictures the network was trained at."""
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    return {"height": side, "width": side}


SANA = PipelineSpec(
    name="sana",
    pipelines=("SanaPipeline",),
    network="transformer",
    schedule=schedule,
    decode=decode_vae,
    one_step=one_flow_step,
    few_steps=flow_steps,
    arguments={"use_resolution_binning": False},
    size=size,
)
