"""Stable Audio: sound in one-dimensional latents, conditioned on a prompt and on its start and end in seconds.

Its `CosineDPMSolverMultistepScheduler` is written in EDM's terms: x = x_0 + sigma eps with unit sigma_data, the
input scaled by c_in = 1 / sqrt(1 + sigma^2), output c_skip = c_in^2, c_out = -sigma c_in, time 2 / pi atan(sigma).
What the network sees, c_in x, is a state of the cosine process, alpha = c_in = cos(pi t / 2) and
sigma c_in = sin(pi t / 2), and c_skip x + c_out out = alpha (c_in x) - sigma c_in out is its v-prediction.

The scheduler starts at sigma_max = 500, which is t = .9987; a student starts at t = 1, pure noise, unless t_max
says otherwise. It is stochastic at every order (SDE-DPM-Solver++), so the self-check runs the pipeline with the
deterministic `EDMEulerScheduler`, told this family's time. An exported student needs one step
from unit noise whose result is the head: DDIM with v-prediction at one level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from onestill.diffusion.process import CosineVP
from onestill.teachers.pipelines.families._vp import ddim_steps, one_ddim_step
from onestill.teachers.pipelines.spec import PipelineSpec, Schedule
from onestill.teachers.pipelines.vae import decode_vae

# Where the self-check starts. From 500, rounding x in float32 alone costs 1e-4 in the sound.
CHECKED_SIGMA = 20.0


class CosineEuler(EDMEulerScheduler):  # type: ignore[misc]  # diffusers is untyped
    """Euler steps of EDM with the cosine process's time."""

    def precondition_noise(self, sigma: Any) -> Tensor:
        """Return the network's time, 2 / pi atan(sigma)."""
        return torch.atan(torch.as_tensor(sigma)) * (2 / math.pi)


def schedule(pipeline: Any) -> Schedule:
    """Return the cosine process; ValueError if the scheduler is not Stable Audio's own, with its configuration."""
    name, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    if name != "CosineDPMSolverMultistepScheduler":
        raise ValueError(
            f"the scheduler {name} is not the one Stable Audio is trained with; save the pipeline with "
            "CosineDPMSolverMultistepScheduler"
        )
    if config.prediction_type != "v_prediction" or config.sigma_data != 1.0:
        raise ValueError(f"{name} is supported with prediction_type='v_prediction' and sigma_data=1")
    stock = CosineEuler(sigma_min=0.3, sigma_max=CHECKED_SIGMA, sigma_data=1.0, prediction_type="v_prediction")
    return Schedule(CosineVP(), "v_prediction", stock)


def trim(pipeline: Any, sound: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return the part of a sound that the pipeline returns: up to its argument `audio_end_in_s`."""
    end = arguments.get("audio_end_in_s")
    return sound if end is None else sound[:, :, : int(end * pipeline.vae.config.sampling_rate)]


STABLE_AUDIO = PipelineSpec(
    name="stable_audio",
    pipelines=("StableAudioPipeline",),
    network="transformer",
    schedule=schedule,
    decode=decode_vae,
    one_step=one_ddim_step,
    few_steps=ddim_steps,
    result=lambda output: output.audios,
    output_field="audios",
    trim=trim,
)
