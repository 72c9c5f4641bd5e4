"""The teacher's ODE seen as a signal: y_t, the running mean of its denoised predictions.

From a start state x_a at level a, the state of the ODE at a cleaner time s is (eq. 5)

    x_s = (sigma_s / sigma_a) x_a + (alpha_s - alpha_a sigma_s / sigma_a) y_s,      y_a = f(x_a, a),

and with w = alpha / sigma the ODE is d/dw ((w - w_a) y) = f(x, t). One step of any order from t to s < t mixes
the old signal with a mean of f (eq. 7): y_s = (1 - rho) y_t + rho mean(f), rho = (w_s - w_t) / (w_s - w_a).
All coefficients are written without a division by alpha or by sigma_s: they are finite at alpha = 0 (pure
noise) and at sigma = 0 (clean). Any state x_a on the way may be started from: all takes a level a for each row, [B]
float64, where it is not `t_max`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from onestill.core.tensors import as_times, broadcast
from onestill.diffusion.names import SolverName, StepName
from onestill.diffusion.process import Process

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> the prediction of x_0 [B, ...]."""


@dataclass(frozen=True)
class Trajectory:
    """The teacher's ODE in a noise process, from a start level a = t_max in (0, 1]."""

    process: Process
    t_max: float

    def start(self, eps: Tensor, a: Tensor | None = None) -> Tensor:
        """Return the start state x_a = sqrt(alpha_a^2 + sigma_a^2) eps, eq. (4).

        This is what samplers start from: data of unit variance has that scale at level a. It is eps itself for
        variance-preserving processes, and for flow at t_max = 1.
        """
        alpha, sigma = self._level(a)
        scale = (alpha**2 + sigma**2) ** 0.5
        return eps * (broadcast(scale, eps) if isinstance(scale, Tensor) else scale)

    def state(self, y_s: Tensor, x_a: Tensor, s: Tensor, a: Tensor | None = None) -> Tensor:
        """Return the state x_s that belongs to the signal y_s, eq. (5)."""
        noise, signal = self._mix(s, a)
        return broadcast(noise, x_a) * x_a + broadcast(signal, x_a) * y_s

    def signal(self, x_s: Tensor, x_a: Tensor, s: Tensor, a: Tensor | None = None) -> Tensor:
        """Return the signal y_s that belongs to the state x_s; the inverse of `state`, for s < a."""
        noise, signal = self._mix(s, a)
        return (x_s - broadcast(noise, x_a) * x_a) / broadcast(signal, x_a)

    def rho(self, t: Tensor, s: Tensor, a: Tensor | None = None) -> Tensor:
        """Return the weight of the new prediction in a step t -> s, eq. (6); in (0, 1], and 1 from t = a.

        rho = sigma_a (alpha_s sigma_t - alpha_t sigma_s) / (sigma_t (alpha_s sigma_a - alpha_a sigma_s)).
        """
        alpha_a, sigma_a = self._level(a)
        alpha_t, sigma_t = self.process.alpha_sigma(t)
        alpha_s, sigma_s = self.process.alpha_sigma(s)
        rho = sigma_a * (alpha_s * sigma_t - alpha_t * sigma_s) / (sigma_t * (alpha_s * sigma_a - alpha_a * sigma_s))
        # From the start level everything known is f(x_a, a); s = t = a is 0 / 0 and means the same.
        return torch.where(t >= (self.t_max if a is None else a), torch.ones_like(rho), rho)

    def middle(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the time half-way between s and t in log-SNR; half-way in t where either end is infinite.

        Never below the process's `t_min`, where the network has not been trained.
        """
        halfway = (self.process.log_snr(t) + self.process.log_snr(s)) / 2
        middle = self.process.time_at_log_snr(torch.where(halfway.isfinite(), halfway, torch.zeros_like(halfway)))
        return torch.where(halfway.isfinite(), middle, (t + s) / 2).clamp(min=self.process.t_min)

    def _level(self, a: Tensor | None) -> tuple[float, float] | tuple[Tensor, Tensor]:
        return self.process.level(self.t_max) if a is None else self.process.alpha_sigma(a)

    def _mix(self, s: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
        alpha_a, sigma_a = self._level(a)
        alpha_s, sigma_s = self.process.alpha_sigma(s)
        return sigma_s / sigma_a, alpha_s - alpha_a * sigma_s / sigma_a


Step = Callable[[Trajectory, Denoiser, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(the ODE, the teacher, the start state x_a [B, ...], y_t [B, ...], t and s < t [B] float64) -> y_s: one step.

It may be given the start level of each row after these, t <= a, where that is not the trajectory's `t_max`.
"""


def _advance(trajectory: Trajectory, y_t: Tensor, mean: Tensor, t: Tensor, s: Tensor, a: Tensor | None) -> Tensor:
    return y_t + broadcast(trajectory.rho(t, s, a), y_t) * (mean - y_t)


def ddim_step(
    trajectory: Trajectory, denoised: Denoiser, x_a: Tensor, y_t: Tensor, t: Tensor, s: Tensor, a: Tensor | None = None
) -> Tensor:
    """Return y_s = y_t + rho (f(x_t, t) - y_t), eq. (7): DDIM (Song et al., 2010.02502); order 1."""
    return _advance(trajectory, y_t, denoised(trajectory.state(y_t, x_a, t, a), t), t, s, a)


def heun_step(
    trajectory: Trajectory, denoised: Denoiser, x_a: Tensor, y_t: Tensor, t: Tensor, s: Tensor, a: Tensor | None = None
) -> Tensor:
    """Return the step with the mean of f at both ends, eq. (8); order 2, two teacher calls.

    Below the network's smallest time f(x, s) is x / alpha itself, which makes the last step a DDIM step.
    """
    f_t = denoised(trajectory.state(y_t, x_a, t, a), t)
    euler = _advance(trajectory, y_t, f_t, t, s, a)
    t_min = trajectory.process.t_min
    f_s = denoised(trajectory.state(euler, x_a, s, a), s.clamp(min=t_min))
    f_s = torch.where(broadcast((s < t_min) | (s == 0), f_s).bool(), f_t, f_s)
    return _advance(trajectory, y_t, (f_t + f_s) / 2, t, s, a)


def midpoint_step(
    trajectory: Trajectory, denoised: Denoiser, x_a: Tensor, y_t: Tensor, t: Tensor, s: Tensor, a: Tensor | None = None
) -> Tensor:
    """Return the step with f at the log-SNR midpoint, reached by DDIM, eq. (9); order 2, two teacher calls."""
    m = trajectory.middle(t, s)
    y_m = ddim_step(trajectory, denoised, x_a, y_t, t, m, a)
    return _advance(trajectory, y_t, denoised(trajectory.state(y_m, x_a, m, a), m), t, s, a)


STEPS: dict[StepName, Step] = {"ddim": ddim_step, "heun": heun_step, "midpoint": midpoint_step}
CALLS_PER_STEP: dict[SolverName, int] = {"ddim": 1, "heun": 2, "midpoint": 2, "dpmsolver++": 1}


def uniform_times(t_max: float, num_steps: int, t_end: float = 0.0) -> list[float]:
    """Return num_steps + 1 falling times from t_max to t_end; for `DiscreteVP` diffusers' "trailing" spacing."""
    return [t_max + (t_end - t_max) * i / num_steps for i in range(num_steps + 1)]


def refined_times(process: Process, t_max: float, num_steps: int, t_end: float = 0.0) -> list[float]:
    """Return `uniform_times` with the last step cut at a quarter, eq. (36): num_steps + 2 falling times.

    Every solver ends with f itself, the mean of all that x_t may come from. From a whole step of noise that is a picture of too
    little variance; from a quarter of one, hardly. The others stay where they are, since students are trained there and drawn
    there. Of one step, or where the cut is below the network's smallest time, the grid is uniform.
    """
    times = uniform_times(t_max, num_steps, t_end)
    cut = t_end + (times[-2] - t_end) / 4
    return [*times[:-1], cut, t_end] if num_steps > 1 and cut >= process.t_min else times


def solve(trajectory: Trajectory, denoised: Denoiser, x_a: Tensor, times: Sequence[float], step: Step) -> Tensor:
    """Return the signal at the last of the falling `times`, the first of which is the start level.

    At the start y is unknown and unused: rho is 1 there, and the state is x_a whatever y.
    """
    y = torch.zeros_like(x_a)
    for t, s in pairwise(times):
        y = step(trajectory, denoised, x_a, y, as_times(t, len(x_a)), as_times(s, len(x_a)))
    return y


def dpm_solve(trajectory: Trajectory, denoised: Denoiser, x_a: Tensor, times: Sequence[float]) -> Tensor:
    """Return the signal at the last of the falling `times` by DPM-Solver++(2M) (Lu et al., 2211.01095), eq. (31).

    A step of eq. (7) with f extrapolated from the step before, half a step of log-SNR on: order 2, one teacher call.
    """
    y, before = torch.zeros_like(x_a), None
    for (t, s), kappa in zip(pairwise(times), _extrapolations(trajectory.process, times), strict=True):
        at_t = as_times(t, len(x_a))
        f = denoised(trajectory.state(y, x_a, at_t), at_t)
        mean = f if before is None else f + kappa * (f - before)
        y, before = _advance(trajectory, y, mean, at_t, as_times(s, len(x_a)), None), f
    return y


def _extrapolations(process: Process, times: Sequence[float]) -> list[float]:
    """Return kappa of eq. (31) for each step: 0 in the first, the last, and the one after an infinite step."""
    steps = process.log_snr(torch.tensor(times, dtype=torch.float64)).diff()
    kappa = torch.zeros_like(steps)
    kappa[1:-1] = steps[1:-1] / (2 * steps[:-2])
    return kappa.tolist()


Solver = Callable[[Trajectory, Denoiser, Tensor, Sequence[float]], Tensor]
"""(the ODE, the teacher, the start state x_a [B, ...], falling times from the start level) -> the signal at the last."""
SOLVERS: dict[SolverName, Solver] = {
    **{name: partial(solve, step=step) for name, step in STEPS.items()},
    "dpmsolver++": dpm_solve,
}


def times_called(trajectory: Trajectory, solver: SolverName, times: Sequence[float]) -> list[float]:
    """Return the time of each of the calls of the teacher that a solver makes."""
    called: list[float] = []

    def denoised(x_t: Tensor, t: Tensor) -> Tensor:
        called.append(float(t))
        return x_t

    SOLVERS[solver](trajectory, denoised, torch.zeros(1), times)
    return called
