"""The losses of BOOT (Gu et al., arXiv 2306.05544): bootstrap rows, eq. (10), and boundary rows, eq. (11).

The two kinds of rows differ in their times only. Bootstrap rows step from t to s < t: y_s is regressed on
sg[y_t + rho (mean of f - y_t)], the student's own signal at t moved on by one step of the teacher's ODE. Boundary rows
have s = t = t_max, for which a step of any order gives f(x_a, t_max).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from onestill.core.settings import Settings, setting
from onestill.diffusion.names import StepName
from onestill.objectives.base import Batch, Cost, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from onestill.diffusion.trajectory import Denoiser, Step, Trajectory

OBJECTIVE = "Objective"
TimeSampling = Literal["uniform", "s_first", "progressive"]
Weight = Literal["inverse_rho", "velocity", "inverse_rho_sigma", "none"]
SIGMA_FLOOR = 0.05
BOOTSTRAP, BOUNDARY = 0, 1  # the two means


class BootSettings(Settings):
    """Times, steps and weights of the bootstrap, and the boundary."""

    time_sampling: TimeSampling = setting("s_first", OBJECTIVE, "How step times are drawn.")
    delta: float = setting(1 / 25, OBJECTIVE, "Step size in t.", gt=0, lt=1)
    t_min: float = setting(0.0, OBJECTIVE, "Cleanest target time; 0 is the finished image.", ge=0, lt=1)
    solver: StepName = setting("midpoint", OBJECTIVE, "Step that makes the bootstrap target.")
    bootstrap_weight: Weight = setting("none", OBJECTIVE, "Weight of the residuals.")
    robust_exponent: float = setting(
        0.0, OBJECTIVE, "k of a factor (residual + c)^-k on each row's weight; 0 is none, 1 the most usual.", ge=0, le=2
    )
    robust_constant: float = setting(
        1e-3, OBJECTIVE, "c of that factor, in squared units of the teacher's samples.", gt=0, le=1e6
    )
    boundary_weight: float = setting(
        0.0, OBJECTIVE, "beta, the weight of the boundary loss; 0 leaves it out.", ge=0, le=1e6
    )
    boundary_fraction: float = setting(0.125, OBJECTIVE, "Share of the batch for the boundary loss.", gt=0, lt=1)
    ema_target_decay: float = setting(
        0.0, OBJECTIVE, "Decay of an EMA student used in the target; 0 is the student itself.", ge=0, lt=1
    )


def num_boundary_rows(settings: Any, batch_size: int) -> int:
    """Return how many rows of a batch go to the boundary loss."""
    return max(1, round(settings.boundary_fraction * batch_size)) if settings.boundary_weight > 0 else 0


class Boot(Objective[BootSettings]):
    """L_BS + beta L_BC, eqs. (10) and (11), in one batch: the boundary rows come first."""

    name = "boot"
    turn = 2
    Settings = BootSettings

    @classmethod
    def num_rows(cls, settings: Any, batch_size: int, left: int) -> int:
        return left

    @classmethod
    def in_words(cls, settings: Any) -> str:
        return f"BOOT (arXiv 2306.05544): {settings.time_sampling} times, delta {settings.delta:g}, {settings.solver} targets"

    @classmethod
    def cost(cls, settings: Any, batch_size: int) -> Cost:
        from onestill.diffusion.trajectory import CALLS_PER_STEP

        return Cost(student=1, teacher=CALLS_PER_STEP[settings.solver])

    def batch(self, num: int) -> Batch:
        import torch

        from onestill.core.tensors import to_device
        from onestill.diffusion.trajectory import STEPS

        context, settings = self.context, self.settings
        generator, spec = context.generator, context.teacher.spec
        eps = torch.randn(num, *spec.sample_shape, generator=generator)
        u = torch.rand(num, generator=generator, dtype=torch.float64)
        chosen = context.conditions.choose(num, generator)
        cond = to_device(context.conditions.rows(chosen), context.device)
        t, s = draw_times(u, settings.time_sampling, settings.delta, settings.t_min, spec.t_max, context.progress())
        is_boundary = torch.arange(num) < num_boundary_rows(settings, context.batch_size)
        t[is_boundary] = s[is_boundary] = spec.t_max

        x_a = spec.trajectory.start(eps.to(context.device))
        with torch.no_grad(), context.autocast():
            y_t = context.target_student(x_a, None, t, cond)
            denoised = context.teacher.denoiser(cond)
            target = bootstrap_target(STEPS[settings.solver], spec.trajectory, denoised, x_a, y_t, t, s)
        rho = spec.trajectory.rho(t, s)
        weights = row_weights(settings.bootstrap_weight, spec.trajectory, t, s).float()
        weights = weights * torch.where(is_boundary, settings.boundary_weight, 1.0)
        mean = torch.where(is_boundary, BOUNDARY, BOOTSTRAP)
        return Batch(x_a, s, cond, target, weights, mean, share=rho, is_profiled=~is_boundary)


def bootstrap_target(
    step: Step, trajectory: Trajectory, denoised: Denoiser, x_a: Tensor, y_t: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """Return sg[y_t + rho (mean of f - y_t)], the right side of eq. (10), [B, ...].

    `x_a` are start states and `y_t` the student's signal at t, [B, ...]; `t` and the cleaner `s`, [B] float64, are both
    t_max on boundary rows. `denoised` is the teacher, guided and thresholded as its sampler would.
    """
    import torch

    with torch.no_grad():
        return step(trajectory, denoised, x_a, y_t, t, s)


def draw_times(
    u: Tensor, strategy: TimeSampling, delta: float, t_min: float, t_max: float, progress: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (t, s), the times of a bootstrap step from t to s = t - delta.

    uniform: t ~ U[t_min + delta, t_max], as reported of BOOT. s_first: s ~ U[t_min, t_max], t = min(s + delta, t_max),
    which gives the last delta before t_max a target too. progressive: as s_first, from a window whose cleaner
    end moves from t_max to t_min with `progress`, the share of the training done. `u` are uniform numbers in [0, 1),
    [B] float64.
    """
    if strategy == "uniform":
        t = t_min + delta + u * (t_max - t_min - delta)
        return t, t - delta
    low = t_min
    if strategy == "progressive":
        # The window reaches t_min at three quarters of the run; the last quarter covers everything.
        low = t_max - (t_max - t_min) * min(1.0, max(progress / 0.75, delta))
    s = low + u * (t_max - low)
    return (s + delta).clamp(max=t_max), s


def row_weights(weight: Weight, trajectory: Trajectory, t: Tensor, s: Tensor) -> Tensor:
    """Return the weight of each row's squared residual, [B] float64.

    inverse_rho: 1 / rho^2 (known as BOOT's 1 / d^2), which turns the residual into units of f. velocity:
    1 / (rho min(1, max(sigma_s, 0.05)))^2, units of the ODE's velocity, more weight at the clean end, where detail
    forms. inverse_rho_sigma: 1 / (rho min(1, max(sigma_t, 0.05))), whose gradient is the residual in that unit. none: 1.
    On boundary rows rho is 1.
    """
    rho = trajectory.rho(t, s)
    if weight == "none":
        return rho.new_ones(rho.shape)
    if weight == "inverse_rho":
        return rho**-2
    if weight == "inverse_rho_sigma":
        return (rho * bounded_sigma(trajectory, t)) ** -1
    return (rho * bounded_sigma(trajectory, s)) ** -2


def bounded_sigma(trajectory: Trajectory, t: Tensor) -> Tensor:
    """Return sigma_t between 0.05 and 1, [B] float64: what an error of f is divided by to be one of the velocity."""
    return trajectory.process.alpha_sigma(t)[1].clamp(min=SIGMA_FLOOR, max=1.0)
