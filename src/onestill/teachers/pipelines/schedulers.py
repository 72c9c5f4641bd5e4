"""Schedulers of diffusers in our terms: read for a teacher, sampled plainly for a check, written for a student."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from onestill.core.errors import SettingError
from onestill.diffusion.process import VE, DiscreteVP, FlowMatching, Process
from onestill.teachers.teacher_spec import Threshold

# A single level is written as the product of this many equal factors: 1 - beta is rounded to float32, and for
# alpha^2 near 0 one factor would lose its digits.
LEVEL_FACTORS = 8


def scheduler_process(scheduler: Any) -> tuple[Process, str, float]:
    """Return (process, prediction type, sigma_data) of a constructed scheduler.

    The schedule is read from `alphas_cumprod`, never from the betas' configuration, which may be overridden.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("EDM"):
        if prediction != "epsilon" or config.get("sigma_schedule", "karras") != "karras":
            raise ValueError(f"{name} is supported with prediction_type='epsilon' and sigma_schedule='karras'")
        return VE(config.sigma_min, config.sigma_max, config.get("rho", 7.0)), "edm", float(config.sigma_data)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"the scheduler {name} is not supported for this pipeline: it has no alphas_cumprod. "
            "Save the pipeline with the DDPMScheduler or DDIMScheduler it was trained with, or wrap the network "
            "with onestill.module_teacher(network, process, prediction_type, sample_shape)"
        )
    if prediction not in ("epsilon", "sample", "v_prediction"):
        known = "epsilon, sample, v_prediction"
        raise ValueError(f"the scheduler's prediction_type {prediction!r} is not supported; known: {known}")
    return DiscreteVP(scheduler.alphas_cumprod), prediction, 0.5


def flow_process(scheduler: Any, *, net_scale: float = 1000.0, net_offset: float = 0.0) -> FlowMatching:
    """Return the linear path of a flow-matching scheduler, warped by its time shift; ValueError for any other one."""
    name, config = type(scheduler).__name__, scheduler.config
    if not (name.startswith("FlowMatch") or config.get("use_flow_sigmas", False)):
        raise ValueError(
            f"the scheduler {name} is not one of flow matching, which this family is trained on; "
            "save the pipeline with FlowMatchEulerDiscreteScheduler"
        )
    return FlowMatching(float(config.get("shift") or config.get("flow_shift") or 1.0), net_scale, net_offset)


def scheduler_threshold(scheduler: Any) -> Threshold:
    """Return what the scheduler's own `step` does to the predicted x_0."""
    config = scheduler.config
    if config.get("thresholding", False):
        limit, ratio = config.get("sample_max_value", 1.0), config.get("dynamic_thresholding_ratio", 0.995)
        return Threshold("dynamic", limit, ratio)
    if config.get("clip_sample", False):
        return Threshold("static", config.get("clip_sample_range", 1.0))
    return Threshold()


def plain_ddim(scheduler: Any) -> DDIMScheduler:
    """Return DDIM on the scheduler's constructed schedule, without clipping."""
    betas = 1 - scheduler.alphas_cumprod.double() / torch.cat([torch.ones(1), scheduler.alphas_cumprod[:-1]]).double()
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        clip_sample=False,
    )


def plain_euler(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """Return Euler steps on a flow-matching scheduler's own shift, dynamic if that is."""
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
    return FlowMatchEulerDiscreteScheduler(shift=float(config.get("flow_shift") or 1.0))


def times_of(stock: Any, process: Process) -> list[float]:
    """Return our times of a stock scheduler's steps, once those are set, and of the end."""
    if not isinstance(process, DiscreteVP):
        sigma = torch.as_tensor(stock.sigmas[:-1], dtype=torch.float64).cpu()
        alpha = 1 - sigma if isinstance(process, FlowMatching) else torch.ones_like(sigma)
        return [float(t) for t in process.time_at_log_snr(2 * (alpha.log() - sigma.log()))] + [0.0]
    num = stock.config.num_train_timesteps
    return [(int(t) + 1) / num for t in stock.timesteps] + [0.0]


def one_level(alpha: float, prediction_type: str, *, clip_sample: bool, stochastic: bool = False) -> Any:
    """Return the scheduler whose one step from unit noise is the head at a single level.

    "epsilon" gives (eps - sigma output) / alpha, "v_prediction" alpha eps - sigma output and "sample" the output.
    The former two have few training steps, so that a call with many is refused. `stochastic` writes a
    `DDPMScheduler`, for pipelines that ask it for its variance; its last step adds none.
    """
    cls = DDPMScheduler if stochastic else DDIMScheduler
    level: dict[str, Any] = {}
    if prediction_type != "sample":
        # With one training step it could not be loaded as a teacher, which is watched in calls of two.
        betas = [1 - (alpha**2) ** (1 / LEVEL_FACTORS)] * LEVEL_FACTORS if alpha else [0.5, 1.0]
        level = {"num_train_timesteps": len(betas), "trained_betas": betas}
    # The offset means nothing with this spacing, but Stable Diffusion's pipeline warns of any other.
    level |= {"variance_type": "fixed_small"} if stochastic else {"set_alpha_to_one": True, "steps_offset": 1}
    return cls(prediction_type=prediction_type, timestep_spacing="trailing", clip_sample=clip_sample, **level)


def one_euler_step(alpha: float) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler whose one step from pure noise is eps - output; SettingError for another start."""
    if alpha != 0:
        raise SettingError("t_max", why="a flow-matching student starts from pure noise", todo="leave it at 1")
    return FlowMatchEulerDiscreteScheduler(shift=1.0)
