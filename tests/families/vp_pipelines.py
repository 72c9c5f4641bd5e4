"""Tiny stock pipelines of variance-preserving processes, with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from components import clip_text, clip_tokenizer, t5_text, vae, word_tokenizer
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModelWithProjection


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


def stable_diffusion_xl(*, zeros: bool, **codec: Any) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(**codec),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection, projection_dim=8),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=cond_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=zeros,
    )


def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    return DiTPipeline(transformer.eval(), vae(), DDIMScheduler(clip_sample=False), id2label={0: "tench, Tinca"})


def pixart(cls: Any, sample_size: int, patch_size: int, **config: Any) -> Any:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=sample_size,
        patch_size=patch_size,
        **config,
    )
    scheduler = DPMSolverMultistepScheduler()
    return cls(
        tokenizer=word_tokenizer(),
        text_encoder=t5_text(),
        vae=vae(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


def if_unet(**config: Any) -> UNet2DConditionModel:
    return cond_unet(
        **{
            "in_channels": 3,
            "out_channels": 6,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "act_fn": "gelu",
            "attention_head_dim": 8,
            "encoder_hid_dim": 16,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            **config,
        }
    )


def if_scheduler(**config: Any) -> DDPMScheduler:
    defaults: dict[str, Any] = {
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.5,
    }
    return DDPMScheduler(**{**defaults, **config})


def if_parts(**parts: Any) -> dict[str, Any]:
    optional = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    return {
        "tokenizer": word_tokenizer(),
        "text_encoder": t5_text(),
        "requires_safety_checker": False,
        **optional,
        **parts,
    }


def deepfloyd(**scheduler: Any) -> IFPipeline:
    return IFPipeline(unet=if_unet(), scheduler=if_scheduler(**scheduler), **if_parts())


def deepfloyd_super_resolution() -> IFSuperResolutionPipeline:
    return IFSuperResolutionPipeline(
        unet=if_unet(in_channels=6, sample_size=16, class_embed_type="timestep"),
        scheduler=if_scheduler(sample_max_value=1.0),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **if_parts(),
    )


STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0], "scaling_factor": 0.5}

BUILDERS: dict[str, Callable[[], Any]] = {
    "sd-epsilon": stable_diffusion,
    "sd-v": functools.partial(stable_diffusion, prediction_type="v_prediction"),
    "sd-v-zero-snr": functools.partial(stable_diffusion, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sdxl-zeros": functools.partial(stable_diffusion_xl, zeros=True),
    "sdxl-statistics": functools.partial(stable_diffusion_xl, zeros=False, **STATISTICS),
    "dit": dit,
    "pixart-alpha": functools.partial(pixart, PixArtAlphaPipeline, 8, 2, use_additional_conditions=False),
    "pixart-alpha-1024": functools.partial(pixart, PixArtAlphaPipeline, 128, 16),
    "pixart-sigma": functools.partial(pixart, PixArtSigmaPipeline, 8, 2, use_additional_conditions=False),
    "if": deepfloyd,
    "if-static": functools.partial(deepfloyd, thresholding=False, clip_sample=True),
    "if-super-resolution": deepfloyd_super_resolution,
}
