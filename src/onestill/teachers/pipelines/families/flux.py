"""Flux: flow matching in latents that the network sees as a sequence of 2 x 2 patches, with embedded guidance.

The trajectory lives in the latents' own space [16, H, W], where the pipeline draws its noise, so a seed is the
same picture here and there; packing, a permutation of the values, happens at the network's border.

The distilled Flux teachers (dev) take the guidance scale as an input. It is recorded with the prompt as the
condition "guidance", with the 3.5 of the pipeline's own call; a run at another scale puts that into the teacher's
place of it (`guidance.EmbeddedGuidance`). There is no "no prompt", so these teachers cannot be guided a second time. Flux
schnell has no such input.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from onestill.teachers.pipelines.families._flow import flow_schedule, flow_steps, one_flow_step
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.vae import decode_vae


def pack(latents: Tensor) -> Tensor:
    """Return latents [B, C, H, W] as a sequence of patches, [B, H/2 W/2, 4 C]."""
    num, channels, height, width = latents.shape
    patches = latents.reshape(num, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(num, height * width // 4, 4 * channels)


def unpack(sequence: Tensor, ids: Tensor) -> Tensor:
    """Return a sequence of patches as latents, the inverse of `pack`; `ids` are (0, row, column) of each patch."""
    height, width = (int(n) + 1 for n in ids[:, 1:].amax(dim=0))
    patches = sequence.reshape(len(sequence), height, width, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(sequence), -1, 2 * height, 2 * width)


FLUX = PipelineSpec(
    name="flux",
    pipelines=("FluxPipeline",),
    network="transformer",
    schedule=partial(flow_schedule, net_scale=1.0),  # the network's time is sigma itself
    decode=decode_vae,
    one_step=one_flow_step,
    few_steps=flow_steps,
    guidance=None,
    guidance_input="guidance",
    export_arguments={"num_inference_steps": 1},
    pack=lambda latents, _constant: pack(latents),
    unpack=lambda sequence, constant: unpack(sequence, constant["img_ids"]),
)
