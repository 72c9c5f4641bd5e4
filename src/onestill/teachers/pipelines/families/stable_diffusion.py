"""Stable Diffusion 1.x and 2.x, and Stable Diffusion XL: latents, a `UNet2DConditionModel`, CLIP prompts.

Their schedulers say what the network was trained as: with `alphas_cumprod`, in EDM's manner (CosXL), or as a
rectified flow. Latent consistency models (`time_cond_proj_dim`) take the guidance scale as an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from onestill.teachers.pipelines.families._flow import flow_schedule
from onestill.teachers.pipelines.families._vp import any_size, ddim_steps, one_ddim_step, square_size, vp_schedule
from onestill.teachers.pipelines.schedulers import is_flow, one_flow_level, plain_euler
from onestill.teachers.pipelines.spec import PipelineSpec, Schedule
from onestill.teachers.pipelines.vae import decode_vae
from onestill.teachers.pipelines.walks import unipc_walk
from onestill.teachers.teacher_spec import TeacherSpec

SCALE_FEATURES = 256  # of the guidance scale, as in the latent consistency models of diffusers


def guide_once(network: Any) -> None:
    """Keep the pipeline from guiding a student, whose guidance is distilled in, at its default scale a second time.

    It guides no network that takes the scale as an input, so the student is given that input, with weight zero. A
    network that has it already keeps its own.
    """
    if network.config.time_cond_proj_dim is not None:
        return
    embedding = network.time_embedding
    weight = embedding.linear_1.weight
    embedding.cond_proj = nn.Linear(SCALE_FEATURES, weight.shape[1], bias=False).to(weight.device, weight.dtype)
    nn.init.zeros_(embedding.cond_proj.weight)
    network.register_to_config(time_cond_proj_dim=SCALE_FEATURES)


def schedule(pipeline: Any) -> Schedule:
    """Return the schedule of what the network was trained as."""
    scheduler = pipeline.scheduler
    if not is_flow(scheduler):
        return vp_schedule(pipeline)
    if not hasattr(scheduler, "init_noise_sigma"):  # as training scripts write it, and the stock pipeline does not run
        pipeline.scheduler = plain_euler(scheduler)
    return flow_schedule(pipeline, net_scale=float(scheduler.config.num_train_timesteps))


def one_step(pipeline: Any, prediction_type: str, alpha: float) -> Any:
    """Return the scheduler of an exported student: its one step is the head."""
    return one_flow_level(alpha) if prediction_type == "velocity" else one_ddim_step(pipeline, prediction_type, alpha)


def few_steps(pipeline: Any, spec: TeacherSpec, levels: Sequence[float]) -> list[Any]:
    """Return the scheduler of an exported student of several steps."""
    return [unipc_walk(spec, levels)] if spec.prediction_type == "velocity" else ddim_steps(pipeline, spec, levels)


STABLE_DIFFUSION = PipelineSpec(
    name="stable_diffusion",
    pipelines=("StableDiffusionPipeline",),
    network="unet",
    schedule=schedule,
    decode=decode_vae,
    one_step=one_step,
    few_steps=few_steps,
    adapt=guide_once,
    set_size=any_size,
)
STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION, name="stable_diffusion_xl", pipelines=("StableDiffusionXLPipeline",), set_size=square_size
)
