"""DeepFloyd IF: pixels, a `UNet2DConditionModel` with learned variance, T5 prompts, thresholded samples.

Stage II makes a larger picture of the one that stage I made. Its pipeline scales that picture up, mixes it with
noise of the level `noise_level` (one draw for all steps) and hands both to the network: the noised picture as
further channels, the level as `class_labels`. So these are its conditions, "low_res" and "class_labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from onestill.core.tensors import Cond
from onestill.teachers.image_condition import ImageCondition
from onestill.teachers.pipelines.families._vp import vp_schedule
from onestill.teachers.pipelines.schedulers import one_level, scheduler_threshold
from onestill.teachers.pipelines.spec import PipelineSpec, Schedule
from onestill.teachers.pipelines.walks import dpm_walk
from onestill.teachers.teacher_spec import TeacherSpec

NOISE_LEVEL = 250
"""How much noise stage II mixes into the low-resolution picture, of 1000: its pipeline's own default."""
ENLARGES = 4
"""How many times the published stage II enlarges its picture: 64 to 256 pixels."""


def schedule(pipeline: Any) -> Schedule:
    """Return the schedule and the thresholding of stage I or II."""
    plain = vp_schedule(pipeline)
    # The pipelines ask their scheduler whether it wants the learned variance; DDIM does not say.
    plain.stock.register_to_config(variance_type="fixed_small")
    return Schedule(plain.process, plain.prediction_type, plain.stock, scheduler_threshold(pipeline.scheduler))


def threshold(pipeline: Any, samples: Tensor) -> Tensor:
    """Return samples as the pipeline's last step leaves them: thresholded, which leaves finished pictures alone."""
    return scheduler_threshold(pipeline.scheduler)(samples)


def one_ddpm_step(pipeline: Any, prediction_type: str, alpha: float) -> Any:
    """Return the scheduler of an exported student: the head at one level, thresholded as the teacher's."""
    own = scheduler_threshold(pipeline.scheduler)
    scheduler = one_level(alpha, prediction_type, clip_sample=own.mode == "static", stochastic=True)
    dynamic = {"thresholding": True, "sample_max_value": own.limit, "dynamic_thresholding_ratio": own.ratio}
    scheduler.register_to_config(**(dynamic if own.mode == "dynamic" else {"clip_sample_range": own.limit}))
    return scheduler


def dpm_steps(pipeline: Any, spec: TeacherSpec, levels: Sequence[float]) -> list[Any]:
    """Return the scheduler of an exported student of several steps, thresholded as the teacher's."""
    return [dpm_walk(spec, levels, scheduler_threshold(pipeline.scheduler))]


def low_res_rows(pipeline: Any, pictures: Tensor, noise: Tensor, noise_level: int = NOISE_LEVEL) -> Cond:
    """Return the conditions of stage II for pictures of stage I, as its pipeline makes them.

    They are [B, C, h, w] in [-1, 1]; the noise is standard normal, [B, C, H, W], and its level of 1000.
    """
    large = torch.nn.functional.interpolate(pictures, noise.shape[-2:], mode="bilinear", align_corners=True)
    levels = torch.full((len(pictures),), noise_level, device=pictures.device)
    noised = pipeline.image_noising_scheduler.add_noise(large, noise.to(large), levels)
    return {"low_res": noised, "class_labels": levels}


def example_pictures(pipeline: Any, num: int) -> Tensor:
    """Return some low-resolution pictures, each a slope of another colour, a quarter of stage II's size."""
    config = pipeline.unet.config
    size, channels = max(config.sample_size // ENLARGES, 1), noisy_channels(config)
    slope = torch.linspace(-1, 1, size).expand(channels, size, size)
    return torch.stack([slope * (1 - i / 2) for i in range(num)])


def noisy_channels(config: Any) -> int:
    """Return the number of channels of the large picture: half of what stage II's network takes."""
    return int(config.in_channels) // 2


IF_STAGE_1 = PipelineSpec(
    name="deepfloyd_if",
    pipelines=("IFPipeline",),
    network="unet",
    schedule=schedule,
    decode=threshold,
    on_pixels=True,
    one_step=one_ddpm_step,
    few_steps=dpm_steps,
    # A prompt must not depend on whether the two packages that clean captions are installed.
    arguments={"clean_caption": False},
    result=lambda output: output.images,  # from -1 to 1 already
    # Saved, it does not load any more (diffusers 0.42.1 with transformers 5: its class lacks post_init).
    without=("safety_checker",),
)
IF_STAGE_2 = replace(
    IF_STAGE_1,
    name="deepfloyd_if_super_resolution",
    pipelines=("IFSuperResolutionPipeline",),
    image_condition=ImageCondition(
        name="low_res",
        kept=("low_res", "class_labels"),
        channels=noisy_channels,
        example=example_pictures,
        arguments=lambda pictures, level: {"image": pictures, "noise_level": level},
        rows=low_res_rows,
        num_levels=lambda pipeline: int(pipeline.image_noising_scheduler.config.num_train_timesteps),
        level=NOISE_LEVEL,
        usual_factor=ENLARGES,
    ),
)
