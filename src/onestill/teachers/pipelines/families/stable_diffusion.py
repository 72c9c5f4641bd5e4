"""Stable Diffusion 1.x and 2.x, and Stable Diffusion XL: latents, a `UNet2DConditionModel`, CLIP prompts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from onestill.teachers.pipelines import vae as codec
from onestill.teachers.pipelines.schedulers import one_level, plain_ddim, scheduler_process
from onestill.teachers.pipelines.spec import PipelineSpec, Schedule

SCALE_FEATURES = 256  # of the guidance scale, as in the latent consistency models of diffusers


def vp_schedule(pipeline: Any) -> Schedule:
    """Return the schedule of a pipeline whose scheduler has `alphas_cumprod`; latents are never thresholded.

    Raises:
        ValueError: If the scheduler is of another kind.
    """
    process, prediction, _ = scheduler_process(pipeline.scheduler)
    if prediction == "edm":
        raise ValueError(
            f"a {type(pipeline).__name__} with {type(pipeline.scheduler).__name__} is not supported: EDM's "
            "preconditioning is known for pixel networks (UNet2DModel) only"
        )
    return Schedule(process, prediction, plain_ddim(pipeline.scheduler))


def decode_vae(pipeline: Any, latents: Tensor) -> Tensor:
    """Return the images of latents by the pipeline's own autoencoder."""
    return codec.decode(pipeline.vae, latents)


def one_ddim_step(_pipeline: Any, prediction_type: str, alpha: float) -> Any:
    """Return the scheduler of an exported student: its one step is the head."""
    return one_level(alpha, prediction_type, clip_sample=False)


def any_size(network: Any, size: tuple[int, int]) -> bool:
    """Make (height, width) of the latents the default size of the pipeline around a network."""
    height, width = size
    network.register_to_config(sample_size=height if height == width else [height, width])
    return True


def square_size(network: Any, size: tuple[int, int]) -> bool:
    """Make a size the default of a pipeline that multiplies its network's `sample_size`, which must be one number."""
    return size[0] == size[1] and any_size(network, size)


def guide_once(network: Any) -> None:
    """Keep the pipeline from guiding a student, whose guidance is distilled in, at its default scale a second time.

    It guides no network that takes the scale as an input, so the student is given that input, with weight zero.
    """
    embedding = network.time_embedding
    weight = embedding.linear_1.weight
    embedding.cond_proj = nn.Linear(SCALE_FEATURES, weight.shape[1], bias=False).to(weight.device, weight.dtype)
    nn.init.zeros_(embedding.cond_proj.weight)
    network.register_to_config(time_cond_proj_dim=SCALE_FEATURES)


STABLE_DIFFUSION = PipelineSpec(
    name="stable_diffusion",
    pipelines=("StableDiffusionPipeline",),
    network="unet",
    schedule=vp_schedule,
    decode=decode_vae,
    one_step=one_ddim_step,
    adapt=guide_once,
    set_size=any_size,
)
STABLE_DIFFUSION_XL = PipelineSpec(
    name="stable_diffusion_xl",
    pipelines=("StableDiffusionXLPipeline",),
    network="unet",
    schedule=vp_schedule,
    decode=decode_vae,
    one_step=one_ddim_step,
    adapt=guide_once,
    set_size=square_size,
)
