"""Schedulers of diffusers in our terms: read for a teacher, sampled plainly for a check, written for a student."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from onestill.core.errors import SettingError
from onestill.diffusion.process import VE, DiscreteVP, FlowMatching, LogSigmaVP, Process
from onestill.teachers.teacher_spec import Threshold

LEVEL_STEPS = 16
"""Training steps of an exported student's schedule; a call with more is refused by diffusers."""
CLEAN_BETA = 2**-24
"""The smallest beta that float32 keeps: the first level of such a schedule is clean but for it."""
FLOW_SHIFT = 1e4
"""Time shift of an exported flow student: whatever the number of steps, all but the last stay at the noise."""
WRAP = "wrap the network with onestill.module_teacher(network, process, prediction_type, sample_shape)"


def scheduler_process(scheduler: Any) -> tuple[Process, str, float]:
    """Return (process, prediction type, sigma_data) of a constructed scheduler that is not one of flow matching.

    The schedule is read from `alphas_cumprod`, never from the betas' configuration, which may be overridden; where the
    scheduler runs in EDM's continuous sigmas instead, from those.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("EDM") and prediction == "epsilon":
        if config.get("sigma_schedule", "karras") != "karras":
            raise ValueError(f"{name} with prediction_type='epsilon' is supported with sigma_schedule='karras'")
        return VE(config.sigma_min, config.sigma_max, config.get("rho", 7.0)), "edm", float(config.sigma_data)
    if name.startswith("EDM") or (config.get("timestep_type") == "continuous" and prediction == "v_prediction"):
        return _log_sigma_process(scheduler), "v_prediction", 1.0
    if is_flow(scheduler):
        raise ValueError(
            f"the scheduler {name} is not supported for this pipeline: it is one of flow matching, which Stable Diffusion, "
            f"SDXL and the families made for it may have. Where the network is trained so, {WRAP}"
        )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"the scheduler {name} is not supported for this pipeline: it has no alphas_cumprod. "
            f"Save the pipeline with the DDPMScheduler or DDIMScheduler it was trained with, or {WRAP}"
        )
    if prediction not in ("epsilon", "sample", "v_prediction"):
        known = "epsilon, sample, v_prediction"
        raise ValueError(f"the scheduler's prediction_type {prediction!r} is not supported; known: {known}")
    return DiscreteVP(scheduler.alphas_cumprod), prediction, 0.5


def _log_sigma_process(scheduler: Any) -> LogSigmaVP:
    """Return the process of a scheduler of v-prediction whose network is told log(sigma) / 4."""
    name, config = type(scheduler).__name__, scheduler.config
    if (data := float(config.get("sigma_data", 1.0))) != 1:
        raise ValueError(f"{name} with prediction_type='v_prediction' is supported with sigma_data=1, not {data:g}")
    own = copy.deepcopy(scheduler)
    own.set_timesteps(config.num_train_timesteps)  # all of them: both ends, whatever the spacing
    return LogSigmaVP(float(own.sigmas[:-1].min()), float(own.sigmas.max()), config.get("rho", 7.0))


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler is one of flow matching."""
    config = scheduler.config
    flows = config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction"
    return bool(type(scheduler).__name__.startswith("FlowMatch") or flows)


def flow_process(scheduler: Any, *, net_scale: float = 1000.0, net_offset: float = 0.0) -> FlowMatching:
    """Return the linear path of a flow-matching scheduler, warped by its time shift; ValueError for any other one."""
    name, config = type(scheduler).__name__, scheduler.config
    if not is_flow(scheduler):
        raise ValueError(
            f"the scheduler {name} is not one of flow matching, which this family is trained on; "
            "save the pipeline with FlowMatchEulerDiscreteScheduler"
        )
    if not name.startswith("FlowMatch") and not (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    ):
        said = f"use_flow_sigmas={config.get('use_flow_sigmas')} and {config.get('prediction_type')!r}"
        need = "flow matching needs use_flow_sigmas=True and prediction_type='flow_prediction'"
        raise ValueError(f"the scheduler {name} says {said}: {need}")
    return FlowMatching(float(config.get("shift") or config.get("flow_shift") or 1.0), net_scale, net_offset)


def check_told(scheduler: Any, process: Process, told: float) -> None:
    """Compare the first time that a scheduler, once its steps are set, gives a network with that of our process there.

    Raises:
        ValueError: If they are further apart than two training steps, or the scheduler starts where the process does
            not reach: it runs another process than the one that was read.
    """
    name, log_snr = type(scheduler).__name__, _first_log_snr(scheduler, process, told)
    ends = torch.tensor([process.t_min, 1.0], dtype=torch.float64)
    span = float((process.net_time(ends)[1] - process.net_time(ends)[0]).abs())
    time = process.time_at_log_snr(torch.tensor([log_snr], dtype=torch.float64)).clamp(0, 1)
    here, last = float(process.net_time(time)), float(process.log_snr(ends)[1])
    # Such levels are spread from end to end, whatever times are told: those of training are in `alphas_cumprod`.
    spread = scheduler.config.get("interpolation_type") == "log_linear" and process.name == "vp"
    if not (spread or abs(told - here) <= 2e-3 * span + 1e-6) or log_snr < last - 0.02:
        ratio, reach = math.exp(-log_snr / 2), math.exp(-last / 2)
        begins = f"begins at sigma / alpha = {ratio:.4g} and tells the network {told:.6g} there"
        reads = f"the process that its configuration was read as ({process.name}) ends at {reach:.4g} and tells it {here:.6g}"
        raise ValueError(f"the scheduler {name} {begins}; {reads}. It is not supported with this configuration: {WRAP}")


def _first_log_snr(scheduler: Any, process: Process, told: float) -> float:
    """Return log(alpha^2 / sigma^2) where a scheduler starts, by its own sigmas or, without, by its list of levels."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or not len(sigmas):
        square = float(scheduler.alphas_cumprod[round(told)])
        return math.log(square / (1 - square)) if 0 < square < 1 else math.inf * (1 if square else -1)
    sigma = float(sigmas[0])
    alpha = 1 - sigma if isinstance(process, FlowMatching) else 1.0
    if sigma == 0:  # such as one that runs from clean to noise
        return math.inf
    return 2 * math.log(alpha / sigma) if alpha > 0 else -math.inf


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


def plain_stock(scheduler: Any) -> Any:
    """Return a deterministic scheduler on the schedule of one that `scheduler_process` reads, for a check."""
    if not isinstance(scheduler_process(scheduler)[0], VE):
        return plain_ddim(scheduler)
    cls = EDMEulerScheduler if type(scheduler).__name__.startswith("EDM") else EulerDiscreteScheduler
    return cls.from_config(scheduler.config)


class FlowMatchEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # diffusers is untyped
    """Euler steps of flow matching for pipelines that were made for other schedulers."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """Return the network's input, which is the state itself."""
        return sample


def plain_euler(scheduler: Any) -> FlowMatchEuler:
    """Return Euler steps on a flow-matching scheduler's own shift, dynamic if that is."""
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEuler.from_config(config, stochastic_sampling=False)
    return FlowMatchEuler(shift=float(config.get("flow_shift") or 1.0))


def times_of(stock: Any, process: Process) -> list[float]:
    """Return our times of a stock scheduler's steps, once those are set, and of the end."""
    if not isinstance(process, DiscreteVP):
        sigma = torch.as_tensor(stock.sigmas[:-1], dtype=torch.float64).cpu()
        alpha = 1 - sigma if isinstance(process, FlowMatching) else torch.ones_like(sigma)
        return [float(t) for t in process.time_at_log_snr(2 * (alpha.log() - sigma.log()))] + [0.0]
    return [process.time_of(int(t)) for t in stock.timesteps] + [0.0]


def one_level(alpha: float, prediction_type: str, *, clip_sample: bool, stochastic: bool = False) -> Any:
    """Return the scheduler whose one step from unit noise is the head at a single level.

    "epsilon" gives (eps - sigma output) / alpha, "v_prediction" alpha eps - sigma output and "sample" the output.
    More steps than one stay at that level, up to the last, and so draw the same; with more than `LEVEL_STEPS` the
    call is refused. `stochastic` writes a `DDPMScheduler`, for pipelines that ask it for its variance; its last step
    adds none.
    """
    cls = DDPMScheduler if stochastic else DDIMScheduler
    betas = _level_betas(0.0064 if prediction_type == "sample" else alpha)  # any level does for that one
    # The offset means nothing with this spacing, but Stable Diffusion's pipeline warns of any other.
    more: dict[str, Any] = (
        {"variance_type": "fixed_small"} if stochastic else {"set_alpha_to_one": True, "steps_offset": 1}
    )
    more |= {"num_train_timesteps": len(betas), "trained_betas": betas}
    return cls(prediction_type=prediction_type, timestep_spacing="trailing", clip_sample=clip_sample, **more)


def _level_betas(alpha: float) -> list[float]:
    """Return betas that fall from clean to a level at once and stay there, for `LEVEL_STEPS` training steps.

    The first index is clean, for schedulers that end there. As 1 - beta is rounded to float32, a second factor mends
    what the first loses of a small alpha^2; the last beta is 1 where alpha is 0, with levels near it before.
    """
    stay = [2 * CLEAN_BETA] * (LEVEL_STEPS - 3)  # levels fall strictly, or they were no schedule
    if alpha == 0:
        return [CLEAN_BETA, 1 - CLEAN_BETA, 1 - CLEAN_BETA, *stay[1:], 1.0]
    square = alpha**2 / (1 - CLEAN_BETA) / math.prod(1 - beta for beta in stay)
    # As float32 has it, a multiple of 2^-24, and low enough that there is something left to mend.
    first = math.floor((1 - square) / CLEAN_BETA - 2) * CLEAN_BETA
    return [CLEAN_BETA, first, 1 - square / (1 - first), *stay]


def one_euler_step(alpha: float) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler whose one step from pure noise is eps - output; SettingError for another start.

    Its shift keeps all of several steps but the last at the noise.
    """
    _check_pure_noise(alpha)
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)


def one_flow_level(alpha: float) -> DPMSolverMultistepScheduler:
    """Return the same for pipelines that cannot do with a scheduler of flow matching alone."""
    _check_pure_noise(alpha)
    flow = {"use_flow_sigmas": True, "flow_shift": FLOW_SHIFT, "prediction_type": "flow_prediction"}
    # It rounds the times of its steps, which it tells apart by them.
    return DPMSolverMultistepScheduler(num_train_timesteps=10**6, solver_order=1, **flow)


def _check_pure_noise(alpha: float) -> None:
    if alpha != 0:
        raise SettingError("t_max", why="a flow-matching student starts from pure noise", todo="leave it at 1")
