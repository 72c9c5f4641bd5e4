"""The losses of BOOT (Gu et al., arXiv 2306.05544) as pure functions of tensors; no random number is drawn here.

One training batch has two kinds of rows, which differ in their times only: bootstrap rows with s < t, eq. (10),
and boundary rows with s = t = t_max, eq. (11), for which a step of any order gives f(x_a, t_max).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onestill.core.tensors import broadcast
from onestill.diffusion.trajectory import Denoiser, Step, Trajectory

TIME_SAMPLINGS = ("uniform", "s_first", "progressive")
WEIGHTS = ("inverse_rho", "velocity", "none")
SIGMA_FLOOR = 0.05


def draw_times(
    u: Tensor, strategy: str, delta: float, t_min: float, t_max: float, progress: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (t, s), the times of a bootstrap step from t to s = t - delta.

    uniform: t ~ U[t_min + delta, t_max], as reported of BOOT. s_first: s ~ U[t_min, t_max] and t = min(s + delta, t_max),
    which gives the last delta before t_max a target too. progressive: as s_first, from a window whose cleaner
    end moves from t_max to t_min with `progress`.

    Args:
        u: Uniform numbers in [0, 1), [B] float64.
        strategy: One of `TIME_SAMPLINGS`.
        delta: Step size in t.
        t_min: Cleanest target time.
        t_max: Start level.
        progress: Share of the training done, in [0, 1].

    Raises:
        ValueError: If the strategy is not one of `TIME_SAMPLINGS`.
    """
    if strategy == "uniform":
        t = t_min + delta + u * (t_max - t_min - delta)
        return t, t - delta
    if strategy not in TIME_SAMPLINGS:
        raise ValueError(f"unknown time sampling {strategy!r}; known: {', '.join(TIME_SAMPLINGS)}")
    low = t_min
    if strategy == "progressive":
        # The window reaches t_min at three quarters of the run; the last quarter covers everything.
        low = t_max - (t_max - t_min) * min(1.0, max(progress / 0.75, delta))
    s = low + u * (t_max - low)
    return (s + delta).clamp(max=t_max), s


@torch.no_grad()
def bootstrap_target(
    step: Step, trajectory: Trajectory, denoised: Denoiser, x_a: Tensor, y_t: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """Return sg[y_t + rho (mean of f - y_t)], the right side of eq. (10), [B, ...].

    Args:
        step: One of `onestill.diffusion.trajectory.STEPS`.
        trajectory: The teacher's ODE.
        denoised: The teacher, guided and thresholded as its sampler would.
        x_a: Start state, [B, ...].
        y_t: The student's signal at t, [B, ...].
        t: Times, [B] float64.
        s: Cleaner times, [B] float64; s = t = t_max on boundary rows.
    """
    return step(trajectory, denoised, x_a, y_t, t, s)


def row_weights(weight: str, trajectory: Trajectory, t: Tensor, s: Tensor) -> Tensor:
    """Return the weight of each row's squared residual, [B] float64.

    inverse_rho: 1 / rho^2 (known as BOOT's 1 / d^2), which turns the residual into units of f. velocity:
    1 / (rho min(1, max(sigma_s, 0.05)))^2, units of the ODE's velocity, which adds weight at the clean end, where detail
    forms. none: 1. On boundary rows rho is 1.

    Raises:
        ValueError: If the name is not one of `WEIGHTS`.
    """
    rho = trajectory.rho(t, s)
    match weight:
        case "none":
            return torch.ones_like(rho)
        case "inverse_rho":
            return rho**-2
        case "velocity":
            sigma = trajectory.process.alpha_sigma(s)[1]
            return (rho * sigma.clamp(min=SIGMA_FLOOR, max=1.0)) ** -2
    raise ValueError(f"unknown weight {weight!r}; known: {', '.join(WEIGHTS)}")


def squared_residuals(y_s: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each row, [B]."""
    return (y_s - target).square().flatten(1).mean(1)


def loss(residuals: Tensor, weights: Tensor, is_boundary: Tensor, boundary_weight: float) -> Tensor:
    """Return L = L_BS + beta L_BC, eqs. (10) and (11): means over the rows of each kind.

    Args:
        residuals: `squared_residuals`, [B].
        weights: `row_weights`, [B].
        is_boundary: Which rows are boundary rows, [B] bool.
        boundary_weight: beta.
    """
    weights = weights.to(residuals) * torch.where(is_boundary, boundary_weight, 1.0).to(residuals)
    counts = torch.where(is_boundary, is_boundary.sum(), (~is_boundary).sum()).to(residuals)
    return (broadcast(weights, residuals) * residuals / counts).sum()


def residual_by_time(residuals: Tensor, rho: Tensor, s: Tensor, num_bins: int, t_max: float) -> tuple[Tensor, Tensor]:
    """Return (sums, counts) of residual / rho^2 over equal bins of the target time s, [num_bins] each.

    In these units the residual is an error of f: a profile that grows towards the clean end says that errors
    accumulate along the trajectory.
    """
    bins = (s / t_max * num_bins).long().clamp(0, num_bins - 1)
    sums = torch.zeros(num_bins, dtype=torch.float64)
    sums.index_add_(0, bins, residuals.detach().double().cpu() / rho**2)
    return sums, torch.bincount(bins, minlength=num_bins).double()
