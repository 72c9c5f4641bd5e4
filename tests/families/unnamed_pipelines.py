"""Tiny stock pipelines that no family names, some of which can be teachers and some not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from components import clip_text, clip_tokenizer, t5_text, vae, word_tokenizer
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import UMT5EncoderModel


def aura_flow() -> diffusers.AuraFlowPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    ).eval()
    return diffusers.AuraFlowPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5_text(UMT5EncoderModel),
        vae=vae(scaling_factor=0.5),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.7),
    )


def latte() -> diffusers.LattePipeline:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    ).eval()
    return diffusers.LattePipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5_text(),
        vae=vae(),
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=True),
    )


def perturbed_attention() -> diffusers.StableDiffusionPAGPipeline:
    return diffusers.StableDiffusionPAGPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    }
    return diffusers.UNet2DConditionModel(**{**defaults, **config}).eval()


def inpainting() -> diffusers.StableDiffusionInpaintPipeline:
    return diffusers.StableDiffusionInpaintPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(in_channels=9),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def image_to_image() -> diffusers.StableDiffusionImg2ImgPipeline:
    return diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def packed() -> diffusers.ChromaPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    return diffusers.ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=t5_text(),
        tokenizer=word_tokenizer(),
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "unnamed-auraflow": aura_flow,
    "unnamed-pag": perturbed_attention,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "unnamed-auraflow": {"height": 16, "width": 16, "max_sequence_length": 16},
    "unnamed-pag": {"pag_scale": 0.0},
}
LATTE = {"height": 16, "width": 16, "video_length": 2, "clean_caption": False}
# What is refused: the pipeline, its arguments, and what the message must say.
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "inpainting": (inpainting, {}, "9 channels; those would have to be drawn with every prompt"),
    "image to image": (image_to_image, {}, "call with a prompt alone ends with.*family that gives it"),
    "packed": (packed, {"height": 16, "width": 16, "max_sequence_length": 16}, "family that decodes .and packs. them"),
    "prompts cut to their length": (latte, LATTE, "self-check failed"),
    "decoded frame by frame": (latte, {**LATTE, "mask_feature": False}, "family that decodes .and packs. them"),
    "its own guidance": (perturbed_attention, {"pag_scale": 3.0}, "network does not run as the pipeline runs it"),
}
