"""Tiny stock pipelines with random weights, one for each family; nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flow_pipelines
import torch
import unnamed_pipelines
from components import clip_text, clip_tokenizer, vae
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel


def cond_unet(**config: Any) -> UNet2DConditionModel:
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    }
    return UNet2DConditionModel(**{**defaults, **config}).eval()


def vp_scheduler(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        **config,
    )


def stable_diffusion(**scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=cond_unet(),
        scheduler=vp_scheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd-epsilon": stable_diffusion,
    "sd-v": functools.partial(stable_diffusion, prediction_type="v_prediction"),
    "sd-v-zero-snr": functools.partial(stable_diffusion, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    **flow_pipelines.BUILDERS,
    **unnamed_pipelines.BUILDERS,
}


# Arguments of every call, where the pipeline's own defaults are too large for tests.
ARGUMENTS: dict[str, dict[str, Any]] = {**flow_pipelines.ARGUMENTS, **unnamed_pipelines.ARGUMENTS}


def build(name: str) -> Any:
    """Return the named pipeline with its own seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(sorted(BUILDERS).index(name) + 1)
        pipeline = BUILDERS[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
