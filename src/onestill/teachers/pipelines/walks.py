"""Schedulers of diffusers whose own plain call with K steps walks the levels of a student of K steps, eq. (28).

Each takes the step of eq. (5) exactly, for the prediction type that the network has; which times it tells the network
does not matter, as long as they differ: the student is baked for those, eq. (30).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from onestill.diffusion.process import VE, FlowMatching
from onestill.teachers.pipelines.schedulers import CLEAN_BETA
from onestill.teachers.teacher_spec import TeacherSpec, Threshold

INDICES = 1000
"""Training steps of such a schedule, about: the times that networks with sinusoids of 0 to 1000 tell apart best."""


def ddim_walk(spec: TeacherSpec, levels: Sequence[float]) -> DDIMScheduler:
    """Return DDIM on a schedule that has these levels of a variance-preserving process at its "trailing" times."""
    more = {"set_alpha_to_one": True, "steps_offset": 1, "clip_sample": False}
    return DDIMScheduler(**_schedule(spec, levels), prediction_type=spec.prediction_type, **more)


def dpm_walk(spec: TeacherSpec, levels: Sequence[float], threshold: Threshold) -> DPMSolverMultistepScheduler:
    """Return first-order DPM-Solver++ on that schedule, which steps from the thresholded prediction, eq. (15).

    ValueError if it does not know the thresholding: its quantile is kept in [1, limit], which for 1 is static.
    """
    if threshold.mode == "static" and threshold.limit != 1:
        raise ValueError(f"no stock scheduler of several steps clips its predictions to {threshold.limit:g}")
    given: dict[str, Any] = {"thresholding": threshold.mode != "none", "sample_max_value": threshold.limit}
    given |= {"dynamic_thresholding_ratio": threshold.ratio, "variance_type": "fixed_small", "solver_order": 1}
    return DPMSolverMultistepScheduler(**_schedule(spec, levels), prediction_type=spec.prediction_type, **given)


def edm_walk(spec: TeacherSpec, levels: Sequence[float]) -> EDMEulerScheduler:
    """Return Euler steps in EDM's units: its sigmas between two ends are those of times on a uniform grid."""
    process = spec.process
    assert isinstance(process, VE), "a network with EDM's preconditioning has its process"
    high, low = (process.level(t)[1] for t in (levels[0], levels[-1]))
    return EDMEulerScheduler(sigma_min=low, sigma_max=high, sigma_data=spec.sigma_data, rho=process.rho)


def flow_walks(spec: TeacherSpec, levels: Sequence[float]) -> list[FlowMatchEulerDiscreteScheduler]:
    """Return Euler steps of flow matching, for pipelines that pass their own uniform sigmas, and for those that do not.

    With sigmas 1, (K - 1) / K, ... from the pipeline the process's shift makes them its levels. Without, the scheduler's
    own are r from 1 to its last sigma m, shifted by s', then stretched so that the last is the one wanted. Shifts are
    projective: with 1 - r = q (1 - t), q = (1 - m) / (1 - 1 / K), stretched S_s'(r) is S_s(t) where (1 - 1 / s') q = 1 - 1 / s.
    """
    process, num = spec.process, len(levels)
    assert isinstance(process, FlowMatching)
    n, share = INDICES - 1, (1 - 1 / process.shift) * (1 - 1 / num)  # (1 - 1 / s') (1 - m) with m = s' / (n + s')
    shift = 2 * n / (n * (1 - share) + math.sqrt((n * (1 - share)) ** 2 - 4 * n * share))
    last = process.level(levels[-1])[1]
    return [
        FlowMatchEulerDiscreteScheduler(INDICES, shift=process.shift),
        FlowMatchEulerDiscreteScheduler(INDICES, shift=shift, shift_terminal=last),
    ]


def unipc_walk(spec: TeacherSpec, levels: Sequence[float]) -> UniPCMultistepScheduler:
    """Return first-order steps of flow matching for pipelines that cannot do with a scheduler of that alone."""
    process = spec.process
    assert isinstance(process, FlowMatching)
    shift = 1 / (1 - (1 - 1 / process.shift) / (1 - 1 / INDICES))  # as in `flow_walks`, with q = 1 - 1 / N
    flow: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    flow |= {"shift_terminal": process.level(levels[-1])[1], "solver_order": 1}
    return UniPCMultistepScheduler(INDICES, **flow, disable_corrector=list(range(len(levels))))


def walks(scheduler: Any, spec: TeacherSpec, levels: Sequence[float]) -> bool:
    """Return whether a scheduler, once a pipeline has set its steps, is at these levels; where sigmas do not say, True."""
    if not isinstance(spec.process, FlowMatching):
        return True
    wanted = spec.process.alpha_sigma(torch.tensor(levels, dtype=torch.float64))[1]
    found = torch.as_tensor(scheduler.sigmas[:-1], dtype=torch.float64).cpu()
    return len(found) == len(wanted) and bool((found - wanted).abs().max() < 1e-5)


def _schedule(spec: TeacherSpec, levels: Sequence[float]) -> dict[str, Any]:
    """Return betas with these levels at the "trailing" times of K steps."""
    num, wide = len(levels), float(spec.process.net_time(torch.tensor([levels[0]]))) > INDICES / 10
    # Networks with features of random frequencies, made for times of 0 to 1, see rounding where they are given 1000.
    each = INDICES // num if wide else 2
    alphas = [spec.process.level(t)[0] for t in reversed(levels)]
    betas = _betas([alpha**2 for alpha in alphas], each)
    return {"num_train_timesteps": len(betas), "trained_betas": betas, "timestep_spacing": "trailing"}


def _betas(squares: Sequence[float], each: int) -> list[float]:
    """Return betas that fall to each of the falling levels alpha^2 in turn, after `each` training steps.

    As 1 - beta is rounded to float32, the last of them mends what the one before loses of a level; between, levels
    fall as little as float32 keeps, or they were no schedule.
    """
    betas: list[float] = []
    product = 1.0
    for square in squares:
        for _ in range(each - 2):
            betas.append(2 * CLEAN_BETA)
            product *= 1 - betas[-1]
        betas.append(math.floor((1 - square / product) / CLEAN_BETA - 2) * CLEAN_BETA)
        product *= 1 - betas[-1]
        betas.append(1 - square / product)
        product = square
    return betas
