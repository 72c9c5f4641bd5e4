"""BOOT's losses: zero at the exact student, gradient where the paper has it, and the draws of times."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from onestill.core.tensors import as_times, broadcast
from onestill.diffusion.process import VE, CosineVP, FlowMatching, Process
from onestill.diffusion.trajectory import STEPS, Trajectory
from onestill.objectives.boot import (
    BOOTSTRAP,
    BOUNDARY,
    TimeSampling,
    Weight,
    bootstrap_target,
    draw_times,
    row_weights,
)
from onestill.teachers.closed_form import GaussianTeacher, MixtureTeacher
from onestill.training.loss import regression, squared_residuals
from onestill.training.watch import residual_by_time

TIME_SAMPLINGS, WEIGHTS = get_args(TimeSampling), get_args(Weight)
PROCESSES: dict[str, Process] = {"cosine": CosineVP(), "flow": FlowMatching(), "ve": VE()}
ORDERS = {"ddim": 1, "heun": 2, "midpoint": 2}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(process: Process, t_max: float = 1.0) -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([0.5, -0.3], dtype=torch.float64), 0.6, process, t_max)


def exact_student(exact: GaussianTeacher, x_a: Tensor, t: Tensor) -> Tensor:
    """Return y_t = mean + gain (x_a - alpha_a mean), the signal of the ODE's solution, row by row."""
    rows = []
    for row, time in zip(x_a, t.tolist(), strict=True):
        if time == exact.spec.t_max:  # where the signal is the teacher's own prediction
            rows.append(exact.denoised(row[None], time, {}))
        else:
            state = exact.exact_state(row[None], time)
            rows.append(exact.spec.trajectory.signal(state, row[None], as_times(time, 1)))
    return torch.cat(rows)


def loss(residuals: Tensor, weights: Tensor, is_boundary: Tensor, boundary_weight: float) -> Tensor:
    """Return L_BS + beta L_BC of rows of both kinds, as `Boot.batch` weighs them."""
    weights = weights.float() * torch.where(is_boundary, boundary_weight, 1.0)
    return regression(residuals, weights.to(residuals), torch.where(is_boundary, BOUNDARY, BOOTSTRAP))


# Zero at the exact student


def exact_loss(exact: GaussianTeacher, step: str, delta: float, weight: str = "inverse_rho") -> float:
    trajectory, num = exact.spec.trajectory, 24
    x_a = trajectory.start(normal(num, 2))
    s = torch.linspace(0.2, 0.7, num, dtype=torch.float64) * trajectory.t_max
    t = s + delta * trajectory.t_max
    target = bootstrap_target(STEPS[step], trajectory, exact.denoiser({}), x_a, exact_student(exact, x_a, t), t, s)
    residuals = squared_residuals(exact_student(exact, x_a, s), target)
    return float(loss(residuals, row_weights(weight, trajectory, t, s), torch.zeros(num, dtype=torch.bool), 1.0))


@pytest.mark.parametrize("t_max", [1.0, 0.7])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("step", STEPS)
def test_loss_at_the_exact_student_shrinks_with_the_step(process: Process, step: str, t_max: float) -> None:
    # The local error of a step of order p is delta^(p + 1) in y, so delta^p over rho: the loss falls by 4^p when delta
    # halves. s stays between 0.2 and 0.7, away from the two ends that are infinitely far away in log-SNR.
    exact = gaussian(process, t_max)
    coarse, fine = (exact_loss(exact, step, delta) for delta in (0.02, 0.01))
    assert 0 < fine < coarse < 1e-2
    assert math.log(coarse / fine, 4) == pytest.approx(ORDERS[step], abs=0.15)


@pytest.mark.parametrize("step", STEPS)
def test_loss_tells_the_exact_student_from_others(step: str) -> None:
    # The loss of the untrained student, f(x_a, t_max) at every time, is far above the step's own error.
    exact = gaussian(CosineVP())
    trajectory, num = exact.spec.trajectory, 24
    x_a = normal(num, 2)
    s = torch.linspace(0.2, 0.7, num, dtype=torch.float64)
    t = s + 0.02
    untrained = exact.denoised(x_a, 1.0, {})
    target = bootstrap_target(STEPS[step], trajectory, exact.denoiser({}), x_a, untrained, t, s)
    residuals = squared_residuals(untrained, target)
    weights = row_weights("inverse_rho", trajectory, t, s)
    found = float(loss(residuals, weights, torch.zeros(num, dtype=torch.bool), 1.0))
    assert found > 100 * exact_loss(exact, step, 0.02)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("t_max", [1.0, 0.7])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_boundary_rows_ask_for_the_teachers_prediction(process: Process, t_max: float, step: str) -> None:
    exact = gaussian(process, t_max)
    trajectory = exact.spec.trajectory
    x_a, at_start = trajectory.start(normal(4, 2)), torch.full((4,), t_max, dtype=torch.float64)
    y_t = normal(4, 2, seed=1)  # whatever the student says
    target = bootstrap_target(STEPS[step], trajectory, exact.denoiser({}), x_a, y_t, at_start, at_start)
    # Float64; the midpoint's way through the log-SNR costs digits.
    torch.testing.assert_close(target, exact.denoised(x_a, t_max, {}), rtol=1e-9, atol=1e-9)
    assert float(squared_residuals(exact_student(exact, x_a, at_start), target).max()) < 1e-16


def test_batch_of_both_kinds_is_two_batches() -> None:
    exact = gaussian(CosineVP())
    trajectory, x_a, y_t = exact.spec.trajectory, normal(4, 2), normal(4, 2, seed=1)
    t = torch.tensor([1.0, 1.0, 0.8, 0.3]).double()
    s = torch.tensor([1.0, 1.0, 0.7, 0.2]).double()
    for step in STEPS.values():
        together = bootstrap_target(step, trajectory, exact.denoiser({}), x_a, y_t, t, s)
        for rows in (slice(0, 2), slice(2, 4)):
            alone = bootstrap_target(step, trajectory, exact.denoiser({}), x_a[rows], y_t[rows], t[rows], s[rows])
            torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-14)


# The gradient


class Blind(nn.Module):
    """A student of two numbers for each coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, 0.6], dtype=torch.float64))
        self.drift = nn.Parameter(torch.tensor([0.1, -0.2], dtype=torch.float64))

    def forward(self, x_a: Tensor, t: Tensor) -> Tensor:
        return self.gain * x_a + broadcast(t, x_a) * self.drift


@pytest.mark.parametrize("step", STEPS)
def test_gradient_flows_through_y_s_only(step: str) -> None:
    mean = torch.tensor([[0.5, -0.3], [-1.0, 0.2]], dtype=torch.float64, requires_grad=True)
    teacher, student = MixtureTeacher(mean, 0.4, CosineVP()), Blind()
    trajectory, x_a = teacher.spec.trajectory, normal(6, 2)
    t, s = torch.linspace(0.4, 1.0, 6).double(), torch.linspace(0.3, 0.9, 6).double()
    y_t = student(x_a, t)
    assert y_t.requires_grad
    target = bootstrap_target(STEPS[step], trajectory, teacher.denoiser({}), x_a, y_t, t, s)
    assert not target.requires_grad, "the target is a constant"
    weights, none = row_weights("inverse_rho", trajectory, t, s), torch.zeros(6, dtype=torch.bool)
    loss(squared_residuals(student(x_a, s), target), weights, none, 1.0).backward()
    assert mean.grad is None, "the teacher learns nothing"
    # By hand: mean over rows of w mean over coordinates of (y_s - target)^2.
    with torch.no_grad():
        slope = weights[:, None] * (student(x_a, s) - target) / 6
    torch.testing.assert_close(student.gain.grad, (slope * x_a).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(student.drift.grad, (slope * s[:, None]).sum(0), rtol=1e-6, atol=0)


def test_descent_on_the_loss_finds_the_exact_map() -> None:
    # A student that can hold the exact Gaussian signal, an offset and a gain at each of 17 times, finds it by these
    # losses alone, each time learning from the next noisier one and the noisiest from the boundary.
    exact, num = gaussian(CosineVP()), 17
    trajectory, grid = exact.spec.trajectory, torch.linspace(0, 1, num, dtype=torch.float64)
    s_rows = torch.arange(num).repeat(4)
    t_rows = (s_rows + 1).clamp(max=num - 1)
    t, s, is_boundary = grid[t_rows], grid[s_rows], s_rows == num - 1
    weights = row_weights("inverse_rho", trajectory, t, s)
    table = nn.Parameter(torch.zeros(num, 2, dtype=torch.float64))
    optimizer = torch.optim.Adam([table], 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        x_a = torch.randn(len(s), 2, generator=generator, dtype=torch.float64)
        y_t, y_s = (table[rows, :1] * exact.mean + table[rows, 1:] * x_a for rows in (t_rows, s_rows))
        target = bootstrap_target(STEPS["midpoint"], trajectory, exact.denoiser({}), x_a, y_t, t, s)
        optimizer.zero_grad()
        loss(squared_residuals(y_s, target), weights, is_boundary, 1.0).backward()
        optimizer.step()
        schedule.step()
    x_a, (offset, gain) = normal(200, 2, seed=7), table.detach()[0]
    rms = (offset * exact.mean + gain * x_a - exact.exact_state(x_a, 0.0)).square().mean().sqrt()
    # 16 midpoint steps end 0.01 off; untrained the RMS is 0.7.
    assert float(rms) < 0.03


# Weights


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_weights_are_the_formulas(process: Process) -> None:
    trajectory = Trajectory(process, 1.0)
    t, s = torch.tensor([0.9, 0.5, 0.1]).double(), torch.tensor([0.8, 0.3, 0.0]).double()
    rho, sigma = trajectory.rho(t, s), process.alpha_sigma(s)[1]
    assert torch.equal(row_weights("none", trajectory, t, s), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(row_weights("inverse_rho", trajectory, t, s), 1 / rho**2)
    bounded = torch.tensor([min(max(float(value), 0.05), 1.0) for value in sigma]).double()
    torch.testing.assert_close(row_weights("velocity", trajectory, t, s), 1 / (rho * bounded) ** 2)
    noisy = process.alpha_sigma(t)[1].clamp(0.05, 1)
    torch.testing.assert_close(row_weights("inverse_rho_sigma", trajectory, t, s), 1 / (rho * noisy))


def test_inverse_rho_is_the_papers_weight() -> None:
    # 1 / d^2 with d = 1 - alpha_t sigma_s / (alpha_s sigma_t), from pure noise.
    process = CosineVP()
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.level(0.6), process.level(0.5)
    d = 1 - alpha_t * sigma_s / (alpha_s * sigma_t)
    found = row_weights("inverse_rho", Trajectory(process, 1.0), as_times(0.6, 1), as_times(0.5, 1))
    assert float(found) == pytest.approx(1 / d**2, rel=1e-12)


@pytest.mark.parametrize("t_max", [1.0, 0.7])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_rho_is_one_in_the_weight_of_boundary_rows(process: Process, t_max: float) -> None:
    trajectory, at_start = Trajectory(process, t_max), as_times(t_max, 2)
    found = {weight: float(row_weights(weight, trajectory, at_start, at_start)[0]) for weight in WEIGHTS}
    sigma = min(max(process.level(t_max)[1], 0.05), 1.0)
    expected = {"inverse_rho": 1.0, "velocity": sigma**-2, "inverse_rho_sigma": 1 / sigma, "none": 1.0}
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
@given(s=st.floats(0, 0.99), delta=st.floats(0.005, 0.5))
def test_weights_are_finite_and_positive(weight: str, s: float, delta: float) -> None:
    for process in PROCESSES.values():
        found = float(row_weights(weight, Trajectory(process, 1.0), as_times(min(s + delta, 1), 1), as_times(s, 1)))
        assert 0 < found < math.inf


# Times


@pytest.mark.parametrize("strategy", TIME_SAMPLINGS)
@given(
    u=st.lists(st.floats(0, 0.999999), min_size=1, max_size=20),
    delta=st.floats(0.001, 0.4),
    t_min=st.floats(0, 0.3),
    t_max=st.floats(0.75, 1),
    progress=st.floats(0, 1),
)
def test_times_are_in_range(
    strategy: str, u: list[float], delta: float, t_min: float, t_max: float, progress: float
) -> None:
    t, s = draw_times(torch.tensor(u, dtype=torch.float64), strategy, delta, t_min, t_max, progress)
    ulp = 1e-15  # (t_min + delta) - delta
    assert bool((s >= t_min - ulp).all()) and bool((t <= t_max + ulp).all())
    assert bool((s < t).all())
    assert bool((t - s <= delta + ulp).all())
    # Shorter steps only where they would begin before the start level.
    assert bool(((t - s >= delta - ulp) | (t == t_max)).all())


def test_uniform_leaves_the_last_step_without_a_target_and_s_first_does_not() -> None:
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta, t_max = 0.04, 0.9
    _, s = draw_times(u, "uniform", delta, 0.1, t_max)
    assert float(s.max()) <= t_max - delta
    t, s = draw_times(u, "s_first", delta, 0.1, t_max)
    late = s > t_max - delta
    # A share of delta / (t_max - t_min) = 5 % of the draws; the standard deviation of that share is 0.15 %.
    assert float(late.double().mean()) == pytest.approx(0.05, abs=0.01)
    assert bool((t[late] == t_max).all())
    assert float(s.max()) == pytest.approx(t_max, abs=1e-3) and float(s.min()) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(("strategy", "drawn"), [("uniform", 0), ("s_first", 1)])
def test_draws_are_uniform(strategy: str, drawn: int) -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    times = draw_times(u, strategy, 0.04, 0.1, 1.0)[drawn]
    # Linear in u, between the ends that the name says.
    low = 0.14 if strategy == "uniform" else 0.1
    torch.testing.assert_close(times, low + u * (1 - low), rtol=0, atol=1e-14)


def test_progressive_window_moves_from_noise_to_data() -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    ends = [float(draw_times(u, "progressive", 0.04, 0.1, 1.0, share)[1].min()) for share in (0, 0.2, 0.375, 0.75, 1)]
    # Linear until three quarters of the training; at its beginning one step wide, not empty.
    assert ends == pytest.approx([1 - 0.9 * 0.04, 1 - 0.9 * 0.2 / 0.75, 0.55, 0.1, 0.1])
    for share in (0.75, 1.0):
        for progressive, s_first in zip(
            draw_times(u, "progressive", 0.04, 0.1, 1.0, share), draw_times(u, "s_first", 0.04, 0.1, 1.0), strict=True
        ):
            torch.testing.assert_close(progressive, s_first, rtol=0, atol=1e-15)


# The sum


def test_loss_is_the_mean_of_each_kind() -> None:
    residuals, weights = torch.tensor([1.0, 3.0, 10.0, 20.0, 60.0]), torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5]).double()
    is_boundary = torch.tensor([True, True, False, False, False])
    found = loss(residuals, weights, is_boundary, 0.25)
    assert float(found) == pytest.approx((20 + 20 + 30) / 3 + 0.25 * (1 + 3) / 2)
    assert float(loss(residuals, weights, is_boundary, 0.0)) == pytest.approx((20 + 20 + 30) / 3)


def test_loss_does_not_depend_on_the_share_of_boundary_rows() -> None:
    for num in (1, 3, 7):
        is_boundary = torch.arange(8) < num
        residuals = torch.where(is_boundary, 2.0, 5.0)
        assert float(loss(residuals, torch.ones(8).double(), is_boundary, 1.0)) == pytest.approx(7.0)


@pytest.mark.parametrize("boundary", [True, False])
def test_loss_of_one_kind_alone(boundary: bool) -> None:
    residuals = torch.tensor([1.0, 2.0, 6.0])
    found = loss(residuals, torch.ones(3).double(), torch.full((3,), boundary), 0.5)
    assert float(found) == pytest.approx(1.5 if boundary else 3.0)


def test_residuals_are_means_over_each_sample() -> None:
    y, target = torch.zeros(2, 1, 2, 2), torch.stack([torch.ones(1, 2, 2), 3 * torch.ones(1, 2, 2)])
    assert squared_residuals(y, target).tolist() == [1.0, 9.0]


def test_residual_by_time_sums_in_bins() -> None:
    residuals, rho = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True), torch.tensor([1.0, 0.5, 1.0, 0.5]).double()
    s = torch.tensor([0.0, 0.1, 0.44, 0.8]).double()
    sums, counts = residual_by_time(residuals, rho, s, num_bins=4, t_max=0.8)
    # The last time is the start level itself and belongs to the last bin.
    assert sums.tolist() == [1 + 2 / 0.25, 0, 3, 4 / 0.25]
    assert counts.tolist() == [2, 0, 1, 1]
    assert not sums.requires_grad


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 12))
def test_every_residual_is_in_one_bin(times: list[float], num_bins: int) -> None:
    s = torch.tensor(times, dtype=torch.float64)
    sums, counts = residual_by_time(torch.ones(len(s)), torch.ones(len(s)).double(), s, num_bins, 1.0)
    assert len(sums) == len(counts) == num_bins
    assert float(sums.sum()) == float(counts.sum()) == len(s)
