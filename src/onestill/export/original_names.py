"""Stable Diffusion's tensors under the names of its original training code, which other programs read.

The numbering differs and little else: the original U-Net counts its layers through all blocks, the autoencoder counts
the decoder's blocks from the clean end, and OpenCLIP keeps queries, keys and values in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

NETWORK, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def network_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """Return the original name of each tensor of a `UNet2DConditionModel` with so many layers in a block.

    Raises:
        ValueError: If one has no original name, as in a network of other parts.
    """
    names = list(names)
    attends = {found[1] for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    return {name: _network_name(name, layers, attends) for name in names}


def _network_name(name: str, layers: int, attends: set[str]) -> str:
    outside, _, end = name.rpartition(".")
    if outside in _OUTSIDE:
        return f"{_OUTSIDE[outside]}.{end}"
    kinds = "resnets|attentions|downsamplers|upsamplers"
    found = re.fullmatch(rf"(?:(down|up)_blocks\.(\d+)|mid_block)\.({kinds})\.(\d+)\.(.+)", name)
    if found is None:
        raise ValueError(f"its network has {name!r}, which has no name in such files")
    way, block, kind, layer, rest = found[1], found[2], found[3], int(found[4]), found[5]
    is_attention = int(kind == "attentions")
    if kind == "resnets":
        rest = _renamed(rest, _RESNET)
    if way is None:
        return f"middle_block.{1 if is_attention else 2 * layer}.{rest}"
    first = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + (block in attends)}.{rest}"
    blocks, at = ("input", first + layer + 1) if way == "down" else ("output", first + layer)
    return f"{blocks}_blocks.{at}.{is_attention}.{rest}"


def _renamed(rest: str, names: Mapping[str, str]) -> str:
    layer, _, end = rest.rpartition(".")
    if layer not in names:
        raise ValueError(f"one of its layers is named {rest!r}, which has no name in such files")
    return f"{names[layer]}.{end}"


def vae_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an `AutoencoderKL` under their original names; its attention's are convolutions there."""
    ups = [int(at[1]) for name in tensors if (at := re.match(r"decoder\.up_blocks\.(\d+)", name))]
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        theirs = _vae_name(name, max(ups, default=0))
        is_conv = ".attn_1." in theirs and value.ndim == 2
        found[theirs] = value[..., None, None] if is_conv else value
    return found


def _vae_name(name: str, last_up: int) -> str:
    if attention := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", name):
        return f"{attention[1]}.mid.attn_1.{_renamed(attention[2], _VAE_ATTENTION)}"
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda at: f"mid.block_{int(at[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda at: f"up.{last_up - int(at[1])}", name)
    name = re.sub(r"\.resnets\.(\d+)", r".block.\1", name)
    name = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", name)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a CLIP text encoder: the original names are those of transformers, under a prefix."""
    return {name.removeprefix("text_model."): value for name, value in tensors.items()}


def open_clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a CLIP text encoder as OpenCLIP has them: its projection transposed, q, k and v in one."""
    ours, found = clip_tensors(tensors), dict[str, Tensor]()
    for name, value in ours.items():
        if name in _OPEN_CLIP:
            found[_OPEN_CLIP[name]] = value.T if name == "text_projection.weight" else value
            continue
        at = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if at is None:
            raise ValueError(f"its text encoder has {name!r}, which has no name in such files")
        place, layer, end = f"transformer.resblocks.{at[1]}", at[2], at[3]
        if layer == "self_attn.q_proj":
            parts = [ours[f"encoder.layers.{at[1]}.self_attn.{each}_proj.{end}"] for each in "qkv"]
            found[f"{place}.attn.in_proj_{end}"] = torch.cat(parts)
        elif layer not in ("self_attn.k_proj", "self_attn.v_proj"):
            found[f"{place}.{_OPEN_CLIP_LAYER[layer]}.{end}"] = value
    return found


def is_open_clip(encoder: Any) -> bool:
    """Return whether a text encoder is one of OpenCLIP's: those have the exact GELU, OpenAI's an approximate one."""
    return str(encoder.config.hidden_act) == "gelu"


def original_tensors(pipeline: Any) -> dict[str, Tensor]:
    """Return all weights of a Stable Diffusion 1.x, 2.x or XL pipeline under their original names."""
    network, state = pipeline.unet, pipeline.unet.state_dict()
    names = network_names(state, network.config.layers_per_block)
    parts = [(NETWORK, {names[name]: value for name, value in state.items()})]
    parts.append((VAE, vae_tensors(pipeline.vae.state_dict())))
    first, second = pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)
    if second is not None:
        parts.append((CLIP_XL, clip_tensors(first.state_dict())))
        parts.append((OPEN_CLIP_XL, open_clip_tensors(second.state_dict())))
    elif is_open_clip(first):
        parts.append((OPEN_CLIP, open_clip_tensors(first.state_dict())))
    else:
        parts.append((CLIP, clip_tensors(first.state_dict())))
    return {f"{prefix}{name}": value.contiguous() for prefix, tensors in parts for name, value in tensors.items()}
