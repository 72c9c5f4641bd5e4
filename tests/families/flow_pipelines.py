"""Tiny stock pipelines of flow matching, and Stable Audio, with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
from components import clip_text, clip_tokenizer, gemma_text, t5_text, vae, word_tokenizer
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModelWithProjection, UMT5EncoderModel


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def stable_diffusion_3(*, third: bool = True, **scheduler: Any) -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(**scheduler),
        vae=vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(CLIPTextModelWithProjection, projection_dim=16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection, projection_dim=16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(width=32) if third else None,
        tokenizer_3=word_tokenizer() if third else None,
    )


def flux(*, guidance_embeds: bool = True, **scheduler: Any) -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=flow(**scheduler),
        vae=vae(scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=word_tokenizer(),
    )


def dc_autoencoder() -> diffusers.AutoencoderDC:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    ).eval()


def sana(scheduler: Any, *, out_channels: int = 4) -> diffusers.SanaPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=out_channels,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        timestep_scale=0.5,
    ).eval()
    return diffusers.SanaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=gemma_text(),
        vae=dc_autoencoder(),
        transformer=transformer,
        scheduler=scheduler,
    )


def flow_dpm() -> diffusers.DPMSolverMultistepScheduler:
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def lumina2(**scheduler: Any) -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 16, 16),
        cap_feat_dim=16,
    ).eval()
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=flow(**scheduler),
        vae=vae(scaling_factor=0.4, shift_factor=0.1),
        text_encoder=gemma_text(),
        tokenizer=word_tokenizer(),
    )


def wan(scheduler: Any, **config: Any) -> diffusers.WanPipeline:
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    ).eval()
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()
    return diffusers.WanPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5_text(UMT5EncoderModel),
        vae=autoencoder,
        scheduler=scheduler,
        transformer=transformer,
        **config,
    )


def flow_unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def stable_audio(**scheduler: Any) -> diffusers.StableAudioPipeline:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    ).eval()
    autoencoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=16,
    ).eval()
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=8
    ).eval()
    return diffusers.StableAudioPipeline(
        vae=autoencoder,
        text_encoder=t5_text(),
        projection_model=projection,
        tokenizer=word_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.CosineDPMSolverMultistepScheduler(**scheduler),
    )


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}

BUILDERS: dict[str, Callable[[], Any]] = {
    "sd3": stable_diffusion_3,
    "sd3-two-encoders": functools.partial(stable_diffusion_3, third=False, use_dynamic_shifting=True),
    "flux": functools.partial(flux, **DYNAMIC),
    "flux-schnell": functools.partial(flux, guidance_embeds=False, shift=1.0),
    "sana": functools.partial(sana, flow()),
    "sana-dpm": functools.partial(sana, flow_dpm(), out_channels=8),
    "lumina2": functools.partial(lumina2, **DYNAMIC),
    "wan": functools.partial(wan, flow(shift=2.0)),
    "wan-unipc": functools.partial(wan, flow_unipc()),
    "stable-audio": stable_audio,
}

# Arguments of every call, where the pipeline's own defaults are too large for tests.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "flux": {"height": 16, "width": 24, "max_sequence_length": 16},
    "flux-schnell": {"height": 16, "width": 16, "max_sequence_length": 16},
    "wan": {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 16},
    "wan-unipc": {"height": 32, "width": 32, "num_frames": 1, "max_sequence_length": 16},
}
