"""The signal form of the teacher's ODE: against DDIM on the state, against closed forms, and its steps' orders."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onestill.core.tensors import as_times, broadcast
from onestill.diffusion.prediction import preconditioning
from onestill.diffusion.process import VE, CosineVP, DiscreteVP, FlowMatching, Process
from onestill.diffusion.trajectory import (
    CALLS_PER_STEP,
    SOLVERS,
    STEPS,
    Trajectory,
    ddim_step,
    dpm_solve,
    heun_step,
    midpoint_step,
    refined_times,
    solve,
    times_called,
    uniform_times,
)
from onestill.teachers.closed_form import GaussianTeacher, MixtureTeacher

PROCESSES: dict[str, Process] = {
    "vp, linear": DiscreteVP(DDPMScheduler().alphas_cumprod),
    "vp, cosine": DiscreteVP(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod),
    "vp, zero SNR": DiscreteVP(DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod),
    "cosine": CosineVP(),
    "ve": VE(),
    "flow": FlowMatching(),
    "flow, shift 3": FlowMatching(shift=3.0),
}
START_LEVELS = (1.0, 0.7)
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_start = pytest.mark.parametrize("t_max", START_LEVELS)
every_step = pytest.mark.parametrize("step", STEPS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network_denoiser(process: Process, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the prediction of x_0 by a fixed random network of one layer, in float64."""
    weight = normal(6, 6) / 6**0.5

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        c_in, c_skip, c_out = (broadcast(c, x) for c in preconditioning(prediction, *process.alpha_sigma(t)))
        return c_skip * x + c_out * torch.tanh(c_in * x @ weight)

    return denoised


def gaussian(process: Process, t_max: float = 1.0) -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([0.5, -0.3], dtype=torch.float64), 0.6, process, t_max)


# The signal form is DDIM


@every_start
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction", "velocity", "edm"])
@every_process
def test_ddim_on_the_signal_is_ddim_on_the_state(process: Process, prediction: str, t_max: float) -> None:
    if prediction == "epsilon" and process.level(t_max)[0] == 0:
        t_max = 0.95  # an epsilon network says nothing of x_0 at pure noise
    denoised, trajectory = network_denoiser(process, prediction), Trajectory(process, t_max)
    x_a = trajectory.start(normal(4, 6, seed=1))
    times = uniform_times(t_max, 20)
    y, x = torch.full_like(x_a, math.nan), x_a
    for t, s in pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.level(t), process.level(s)
        # At the start the signal is unknown and multiplied by 0: nan would spread, a solver starts from zeros.
        y = torch.zeros_like(x_a) if t == t_max else y
        y = ddim_step(trajectory, denoised, x_a, y, as_times(t, 4), as_times(s, 4))
        f = denoised(x, as_times(t, 4))
        x = alpha_s * f + sigma_s * (x - alpha_t * f) / sigma_t
        ours = trajectory.state(y, x_a, as_times(s, 4))
        # Float64; 1 / alpha and the noise scale of "ve" cost digits, 1e-10 leaves five to spare.
        assert float((ours - x).abs().max() / x.abs().max()) <= 1e-10
    torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-10)  # at t = 0 the signal is the state


@pytest.mark.parametrize("name", ["vp, zero SNR", "cosine", "flow", "flow, shift 3"])
def test_step_from_pure_noise_is_the_textbook_form(name: str) -> None:
    # d = 1 - alpha_t sigma_s / (alpha_s sigma_t) in y_s = y_t + d (f - y_t), for processes with alpha = 0 at t = 1.
    process = PROCESSES[name]
    trajectory = Trajectory(process, 1.0)
    t, s = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.1, 0.0]).double()
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    torch.testing.assert_close(trajectory.rho(t, s), 1 - alpha_t * sigma_s / (alpha_s * sigma_t), rtol=1e-12, atol=0)


def test_step_of_flow_matching_is_euler_in_the_state() -> None:
    trajectory, t, s = Trajectory(FlowMatching(), 1.0), as_times(0.6, 3), as_times(0.45, 3)
    assert float(trajectory.rho(t, s)[0]) == pytest.approx((0.6 - 0.45) / (0.6 * (1 - 0.45)), rel=1e-12)
    eps, y_t, velocity = (normal(3, 2, seed=i) for i in range(3))
    x_t = trajectory.state(y_t, eps, t)
    y_s = ddim_step(trajectory, lambda x, u: x - broadcast(u, x) * velocity, eps, y_t, t, s)
    torch.testing.assert_close(trajectory.state(y_s, eps, s), x_t - 0.15 * velocity, rtol=0, atol=1e-14)


def test_step_of_edm_is_euler_in_sigma() -> None:
    process = VE()
    trajectory, t, s = Trajectory(process, 1.0), as_times(0.8, 3), as_times(0.6, 3)
    x_a, y_t, f = (normal(3, 2, seed=i) for i in range(3))
    x_t, (sigma_t, sigma_s) = trajectory.state(y_t, x_a, t), (process.level(u)[1] for u in (0.8, 0.6))
    y_s = ddim_step(trajectory, lambda x, u: f, x_a, y_t, t, s)
    expected = x_t + (sigma_s - sigma_t) * (x_t - f) / sigma_t
    torch.testing.assert_close(trajectory.state(y_s, x_a, s), expected, rtol=1e-12, atol=1e-12)


# rho


@pytest.mark.parametrize("t_max", START_LEVELS)
@pytest.mark.parametrize("name", PROCESSES)
@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_rho_is_a_share(name: str, t_max: float, first: float, second: float) -> None:
    low, high = sorted((first * t_max, second * t_max))
    if high - low < 1e-6:  # closer than that the two levels are the same number in places
        return
    rho = float(Trajectory(PROCESSES[name], t_max).rho(as_times(high, 1), as_times(low, 1)))
    # 1e-12: the largest value is 1, reached from the start level and, at alpha_a = 0, never passed by more than an ulp.
    assert 0 < rho <= 1 + 1e-12


@every_start
@every_process
def test_rho_from_the_start_level_is_one(process: Process, t_max: float) -> None:
    s = torch.tensor([0.0, 0.3, t_max - 1e-9, t_max], dtype=torch.float64)
    assert torch.equal(Trajectory(process, t_max).rho(as_times(t_max, 4), s), torch.ones(4, dtype=torch.float64))


@every_start
@every_process
def test_rho_of_steps_multiplies_to_rho_of_the_whole(process: Process, t_max: float) -> None:
    # 1 - rho = (w_t - w_a) / (w_s - w_a): what is left of the old signal after two steps is the product.
    rho = Trajectory(process, t_max).rho
    t, m, s = (as_times(u * t_max, 1) for u in (0.9, 0.6, 0.2))
    assert float((1 - rho(t, m)) * (1 - rho(m, s))) == pytest.approx(float(1 - rho(t, s)), rel=1e-9)


# Signal and state


@every_start
@every_process
def test_state_and_signal_are_inverse(process: Process, t_max: float) -> None:
    trajectory = Trajectory(process, t_max)
    s = torch.linspace(0, 0.95 * t_max, 20, dtype=torch.float64)
    x_a, y = trajectory.start(normal(20, 3)), normal(20, 3, seed=1)
    back = trajectory.signal(trajectory.state(y, x_a, s), x_a, s)
    # Near the start level the signal's share of the state is small: of "ve" 6 % in a state of size 80.
    torch.testing.assert_close(back, y, rtol=1e-9, atol=1e-9)


@every_start
@every_process
def test_ends_of_the_trajectory(process: Process, t_max: float) -> None:
    trajectory = Trajectory(process, t_max)
    x_a, y = trajectory.start(normal(2, 3)), normal(2, 3, seed=1)
    torch.testing.assert_close(trajectory.state(y, x_a, as_times(0.0, 2)), y, rtol=0, atol=0)
    torch.testing.assert_close(trajectory.state(y, x_a, as_times(t_max, 2)), x_a, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("process", "t_max", "scale"),
    [
        (CosineVP(), 1.0, 1.0),
        (CosineVP(), 0.5, 1.0),
        (FlowMatching(), 1.0, 1.0),
        (FlowMatching(), 0.75, 0.625**0.5),
        (VE(), 1.0, 6401**0.5),
    ],
)
def test_start_has_the_scale_of_the_process(process: Process, t_max: float, scale: float) -> None:
    eps = normal(2, 3)
    torch.testing.assert_close(Trajectory(process, t_max).start(eps), scale * eps, rtol=1e-12, atol=0)


# Closed forms


@every_start
@every_process
def test_exact_map_solves_the_signal_ode(process: Process, t_max: float) -> None:
    # d((w - w_a) y) / dw = f, by central differences in w = alpha / sigma.
    exact = gaussian(process, t_max)
    trajectory = exact.spec.trajectory
    x_a = trajectory.start(normal(1, 2))
    w_a = process.level(t_max)[0] / process.level(t_max)[1]
    for s in (0.2 * t_max, 0.5 * t_max, 0.8 * t_max):
        moved = []
        for u in (s - 1e-5, s + 1e-5):
            alpha, sigma = process.level(u)
            y = trajectory.signal(exact.exact_state(x_a, u), x_a, as_times(u, 1))
            moved.append((alpha / sigma, (alpha / sigma - w_a) * y))
        slope = (moved[1][1] - moved[0][1]) / (moved[1][0] - moved[0][0])
        f = exact.denoised(exact.exact_state(x_a, s), s, {})
        # Central differences of step 1e-5: truncation 1e-10 of the third derivative, rounding 1e-16 / 1e-5 of w y.
        torch.testing.assert_close(slope, f, rtol=1e-5, atol=1e-5)


@every_start
@every_process
def test_solver_reaches_the_exact_gaussian_map(process: Process, t_max: float) -> None:
    exact = gaussian(process, t_max)
    x_a = exact.spec.trajectory.start(normal(8, 2))
    y = solve(exact.spec.trajectory, exact.denoiser({}), x_a, uniform_times(t_max, 64), midpoint_step)
    error = (y - exact.exact_state(x_a, 0.0)).abs().max()
    # Second order, but the first and the last step are of infinite length in log-SNR and the error is theirs: of
    # 64 steps, 6e-4 ("flow") to 6e-3 ("vp, linear"); of 64 DDIM steps ten times that.
    assert float(error) < 8e-3


def measured_order(step: str, process: Process, t_max: float) -> float:
    """Return log2 of the error's ratio from 64 to 128 uniform steps, from the exact signal at 0.8 to 0.2 (of t_max).

    Not from pure noise and not to t = 0: the step out of t_max has rho = 1 whatever its length, and the step to the
    clean end is infinitely long in log-SNR, so both have errors that no smaller step makes smaller at that order.
    """
    exact = gaussian(process, t_max)
    trajectory = exact.spec.trajectory
    x_a = trajectory.start(normal(16, 2))
    high, low = 0.8 * t_max, 0.2 * t_max
    start, end = (trajectory.signal(exact.exact_state(x_a, t), x_a, as_times(t, 16)) for t in (high, low))
    errors = []
    for num in (64, 128):
        y = start
        for t, s in pairwise(uniform_times(high, num, t_end=low)):
            y = STEPS[step](trajectory, exact.denoiser({}), x_a, y, as_times(t, 16), as_times(s, 16))
        errors.append(float((y - end).square().mean().sqrt()))
    assert errors[1] > 1e-12, "rounding, not truncation, would be measured"
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("step", "order", "margin"), [("ddim", 1, 0.1), ("heun", 2, 0.15), ("midpoint", 2, 0.15)])
@pytest.mark.parametrize(
    ("name", "t_max"), [("cosine", 1.0), ("cosine", 0.7), ("flow", 1.0), ("ve", 1.0), ("vp, cosine", 1.0)]
)
def test_order_of_the_steps(name: str, t_max: float, step: str, order: int, margin: float) -> None:
    assert measured_order(step, PROCESSES[name], t_max) == pytest.approx(order, abs=margin)


def test_second_order_beats_first_at_equal_cost() -> None:
    exact = gaussian(CosineVP())
    x_a = normal(64, 2)
    errors = {}
    for name, num in (("ddim", 32), ("heun", 16), ("midpoint", 16)):
        y = solve(exact.spec.trajectory, exact.denoiser({}), x_a, uniform_times(1.0, num), STEPS[name])
        errors[name] = float((y - exact.exact_state(x_a, 0.0)).square().mean().sqrt())
    assert errors["midpoint"] < errors["heun"] < errors["ddim"]


# Ends


@every_step
@every_start
@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "velocity", "edm"])
@every_process
def test_steps_are_finite_from_pure_noise_to_clean(process: Process, prediction: str, t_max: float, step: str) -> None:
    denoised, trajectory = network_denoiser(process, prediction), Trajectory(process, t_max)
    x_a = trajectory.start(normal(4, 6))
    y = solve(trajectory, denoised, x_a, uniform_times(t_max, 3), STEPS[step])
    assert bool(y.isfinite().all())
    whole = STEPS[step](trajectory, denoised, x_a, torch.zeros_like(x_a), as_times(t_max, 4), as_times(0.0, 4))
    assert bool(whole.isfinite().all())


@every_step
@every_start
@every_process
def test_standing_still_at_the_start_gives_the_teachers_prediction(process: Process, t_max: float, step: str) -> None:
    # The boundary rows of a batch, s = t = t_max, whatever signal they hold.
    denoised, trajectory = network_denoiser(process, "sample"), Trajectory(process, t_max)
    x_a, times = trajectory.start(normal(4, 6)), as_times(t_max, 4)
    y = STEPS[step](trajectory, denoised, x_a, normal(4, 6, seed=1), times, times)
    # The midpoint goes through the log-SNR and back, which costs some digits of the time.
    torch.testing.assert_close(y, denoised(x_a, times), rtol=1e-9, atol=1e-9)


def test_heun_ends_with_a_ddim_step() -> None:
    # Below the network's smallest time there is nothing to average with.
    process = PROCESSES["vp, linear"]
    denoised, trajectory = network_denoiser(process, "sample"), Trajectory(process, 1.0)
    x_a, y = normal(4, 6), normal(4, 6, seed=1)
    for s in (0.0, process.t_min / 2):
        args = (trajectory, denoised, x_a, y, as_times(0.1, 4), as_times(s, 4))
        assert torch.equal(heun_step(*args), ddim_step(*args))
    args = (trajectory, denoised, x_a, y, as_times(0.1, 4), as_times(0.05, 4))
    assert not torch.equal(heun_step(*args), ddim_step(*args))


@pytest.mark.parametrize("name", SOLVERS)
def test_calls_per_step_are_what_the_solvers_make(name: str) -> None:
    trajectory, x_a, times, calls = Trajectory(CosineVP(), 1.0), normal(2, 3), uniform_times(1.0, 5), []
    SOLVERS[name](trajectory, lambda x, t: (calls.append(float(t[0])), x)[1], x_a, times)
    assert len(calls) == 5 * CALLS_PER_STEP[name] and set(SOLVERS) == set(CALLS_PER_STEP)
    assert times_called(trajectory, name, times) == calls


# A solver with a memory


@pytest.mark.parametrize("num", [1, 2, 4, 10, 20, 50])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_dpm_solver_is_that_of_diffusers(schedule: str, num: int) -> None:
    # For numbers of steps whose times are whole indices.
    how = {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "timestep_spacing": "trailing",
        "final_sigmas_type": "zero",
    }
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample", beta_schedule=schedule, **how)
    scheduler.set_timesteps(num)
    process, x = DiscreteVP(scheduler.alphas_cumprod), normal(4, 6, seed=1)
    denoised = network_denoiser(process, "sample")
    ours = dpm_solve(Trajectory(process, 1.0), denoised, x, uniform_times(1.0, num))
    for index in scheduler.timesteps:
        f = denoised(x, as_times((float(index) + 1) / 1000, 4))
        x = scheduler.step(f, index, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 3, 8])
def test_dpm_solver_from_pure_noise_is_that_of_diffusers(num: int) -> None:
    # A flow's first level has alpha = 0; the scheduler is told our levels, since its own grid is another.
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero", lower_order_final=True
    )
    scheduler.set_timesteps(num)
    times = uniform_times(1.0, num)
    scheduler.sigmas, velocity = torch.tensor(times, dtype=torch.float64), normal(6, 6) / 6**0.5
    denoised = lambda x, t: x - broadcast(t, x) * torch.tanh(x @ velocity)  # noqa: E731 - of a flow, eq. (3)
    x = normal(4, 6, seed=1)
    ours = dpm_solve(Trajectory(FlowMatching(), 1.0), denoised, x, times)
    for index in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x @ velocity), index, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "flow", "ve"])
def test_dpm_solver_is_of_order_two(name: str) -> None:
    # Above the clean end, where every solver's last step is infinitely long; 500 midpoint steps are the truth.
    means = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], dtype=torch.float64)
    exact = MixtureTeacher(means, 0.3, PROCESSES[name], 1.0)
    trajectory, denoised = exact.spec.trajectory, exact.denoiser({})
    x_a = trajectory.start(normal(64, 2))
    truth = SOLVERS["midpoint"](trajectory, denoised, x_a, uniform_times(1.0, 500, 0.2))
    errors = [
        float((dpm_solve(trajectory, denoised, x_a, uniform_times(1.0, n, 0.2)) - truth).square().mean().sqrt())
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


@every_start
@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "velocity", "edm"])
@every_process
def test_dpm_solver_is_finite_from_pure_noise_to_clean(process: Process, prediction: str, t_max: float) -> None:
    denoised, trajectory = network_denoiser(process, prediction), Trajectory(process, t_max)
    x_a = trajectory.start(normal(4, 6))
    for num in (1, 2, 3, 7):
        assert bool(dpm_solve(trajectory, denoised, x_a, uniform_times(t_max, num)).isfinite().all())
    # What has no step before it, or none after it, is DDIM's.
    for num in (1, 2):
        ddim = SOLVERS["ddim"](trajectory, denoised, x_a, uniform_times(t_max, num))
        torch.testing.assert_close(
            dpm_solve(trajectory, denoised, x_a, uniform_times(t_max, num)), ddim, rtol=0, atol=0
        )


# Times


@every_process
def test_middle_is_halfway_in_log_snr(process: Process) -> None:
    t, s = torch.tensor([0.9, 0.4]).double(), torch.tensor([0.6, 0.1]).double()
    middle = Trajectory(process, 1.0).middle(t, s)
    halfway = (process.log_snr(t) + process.log_snr(s)) / 2
    torch.testing.assert_close(process.log_snr(middle), halfway, rtol=1e-9, atol=1e-9)


def test_middle_is_halfway_in_time_where_an_end_is_infinite() -> None:
    trajectory = Trajectory(CosineVP(), 1.0)
    middle = trajectory.middle(torch.tensor([1.0, 0.4]).double(), torch.tensor([0.5, 0.0]).double())
    assert middle.tolist() == pytest.approx([0.75, 0.2])


def test_uniform_times_are_diffusers_trailing_spacing() -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for num in (1, 4, 10, 50):
        scheduler.set_timesteps(num)
        ours = [round(t * 1000) - 1 for t in uniform_times(1.0, num)]
        assert ours == [*scheduler.timesteps.tolist(), -1]
    assert uniform_times(0.8, 2, t_end=0.2) == pytest.approx([0.8, 0.5, 0.2])


def test_refined_times_cut_the_last_step() -> None:
    process = FlowMatching()
    assert refined_times(process, 1.0, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0.0625, 0])
    assert refined_times(process, 0.8, 3, 0.2) == pytest.approx([0.8, 0.6, 0.4, 0.25, 0.2])
    assert refined_times(process, 1.0, 1) == uniform_times(1.0, 1)
    # The levels that students of few steps are drawn from are among them.
    assert set(uniform_times(1.0, 8)) <= set(refined_times(process, 1.0, 16))


def test_refined_times_ask_no_network_below_its_smallest_time() -> None:
    process = PROCESSES["vp, linear"]
    assert refined_times(process, 1.0, 249)[-2] >= process.t_min == 1e-3
    assert refined_times(process, 1.0, 251) == uniform_times(1.0, 251)


def test_rows_may_have_their_own_times() -> None:
    process = PROCESSES["vp, cosine"]
    denoised, trajectory = network_denoiser(process, "v_prediction"), Trajectory(process, 1.0)
    x_a, y = normal(3, 6), normal(3, 6, seed=1)
    t, s = torch.tensor([1.0, 0.6, 0.2]).double(), torch.tensor([0.9, 0.5, 0.0]).double()
    for step in STEPS.values():
        together = step(trajectory, denoised, x_a, y, t, s)
        for i in range(3):
            alone = step(trajectory, denoised, x_a[i : i + 1], y[i : i + 1], t[i : i + 1], s[i : i + 1])
            # A matrix product of one row sums in another order.
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


# A start level for each row


LEVELS = torch.tensor([1.0, 0.8, 0.55, 0.3], dtype=torch.float64)


@every_process
def test_a_level_for_each_row_is_one_trajectory_for_each_level(process: Process) -> None:
    together, eps, y = Trajectory(process, 1.0), normal(4, 6), normal(4, 6, seed=1)
    t, s = LEVELS * 0.9, LEVELS * torch.tensor([0.7, 0.5, 0.2, 0.0], dtype=torch.float64)
    x = together.start(eps, LEVELS)
    for i, level in enumerate(LEVELS.tolist()):
        alone, row = Trajectory(process, level), slice(i, i + 1)
        pairs = [
            (x, alone.start(eps[row])),
            (together.state(y, x, s, LEVELS), alone.state(y[row], x[row], s[row])),
            (together.signal(y, x, s, LEVELS), alone.signal(y[row], x[row], s[row])),
            (together.rho(t, s, LEVELS), alone.rho(t[row], s[row])),
            (together.rho(LEVELS, s, LEVELS), torch.ones(1, dtype=torch.float64)),
        ]
        for found, expected in pairs:
            torch.testing.assert_close(found[row], expected, rtol=1e-14, atol=0)


@every_step
@every_process
def test_steps_from_a_level_for_each_row(process: Process, step: str) -> None:
    denoised, together = network_denoiser(process, "v_prediction"), Trajectory(process, 1.0)
    x, y = together.start(normal(4, 6), LEVELS), normal(4, 6, seed=1)
    t, s = LEVELS * torch.tensor([1.0, 0.9, 1.0, 0.5]).double(), LEVELS * torch.tensor([0.8, 0.4, 1.0, 0.0]).double()
    found = STEPS[step](together, denoised, x, y, t, s, LEVELS)
    for i, level in enumerate(LEVELS.tolist()):
        row = slice(i, i + 1)
        alone = STEPS[step](Trajectory(process, level), denoised, x[row], y[row], t[row], s[row])
        # A matrix product of one row sums in another order.
        torch.testing.assert_close(found[row], alone, rtol=1e-11, atol=1e-11)


@every_process
def test_the_default_level_is_that_of_the_trajectory(process: Process) -> None:
    trajectory, eps, y, t, s = Trajectory(process, 0.7), normal(4, 6), normal(4, 6, seed=1), LEVELS / 2, LEVELS / 4
    level = as_times(0.7, 4)
    for named, by_default in (
        (trajectory.start(eps, level), trajectory.start(eps)),
        (trajectory.state(y, eps, s, level), trajectory.state(y, eps, s)),
        (trajectory.rho(t, s, level), trajectory.rho(t, s)),
    ):
        torch.testing.assert_close(named, by_default, rtol=1e-14, atol=0)


@every_process
def test_every_level_of_the_exact_ode_is_a_start(process: Process) -> None:
    # (5) with a = r: from the state at any level on the way, the signal that leads to the state at s is a mean of f
    # between the two, and two means mix to the mean of the whole.
    exact, whole = gaussian(process), Trajectory(process, 1.0)
    x_1 = whole.start(normal(1, 2)).expand(4, 2)
    r, s = LEVELS, LEVELS * 0.4
    state = lambda u: torch.cat([exact.exact_state(x_1[:1], float(v)) for v in u])  # noqa: E731 - of each row's time
    y = whole.signal(state(s), state(r), s, r)
    torch.testing.assert_close(whole.state(y, state(r), s, r), state(s), rtol=1e-9, atol=1e-9)
    m = LEVELS * 0.7
    first, second = whole.signal(state(m), state(r), m, r), whole.signal(state(s), state(m), s, m)
    mixed = first + broadcast(whole.rho(m, s, r), first) * (second - first)
    torch.testing.assert_close(mixed, y, rtol=1e-9, atol=1e-9)


def test_number_of_times_must_fit() -> None:
    with pytest.raises(ValueError, match="2 times were given for 3 images"):
        as_times(torch.tensor([0.1, 0.2]), 3)
