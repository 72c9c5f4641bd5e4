"""Noise processes and the conversions between what a network may predict, all in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onestill.diffusion.prediction import PREDICTION_TYPES, output_coefficients, preconditioning
from onestill.diffusion.process import EPSILON_MIN_ALPHA, VE, CosineVP, DiscreteVP, FlowMatching, LogSigmaVP, Process

SCHEDULERS = {
    "linear": DDPMScheduler(),
    "scaled linear": DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero SNR": DDIMScheduler(rescale_betas_zero_snr=True),
    "euler": EulerDiscreteScheduler(),
    "100 steps": DDPMScheduler(num_train_timesteps=100),
}
PROCESSES: dict[str, Process] = {
    **{f"vp, {name}": DiscreteVP(scheduler.alphas_cumprod) for name, scheduler in SCHEDULERS.items()},
    "vp, clean first": DiscreteVP(
        DDIMScheduler(trained_betas=[0.0, *torch.linspace(1e-4, 0.02, 999).tolist()]).alphas_cumprod
    ),
    "log sigma": LogSigmaVP(sigma_max=120.0),
    "cosine": CosineVP(),
    "ve": VE(),
    "ve, narrow": VE(sigma_min=0.02, sigma_max=5.0, rho=3.0, time_input="sigma"),
    "flow": FlowMatching(),
    "flow, shift 3": FlowMatching(shift=3.0),
}
CONVERTIBLE = ("sample", "epsilon", "v_prediction", "velocity")
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(num: int = 2001) -> Tensor:
    return torch.linspace(0, 1, num, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Levels


@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_at_the_indices_are_the_schedulers_own(name: str) -> None:
    squares = SCHEDULERS[name].alphas_cumprod.double()
    num = len(squares)
    process = DiscreteVP(SCHEDULERS[name].alphas_cumprod)
    alpha, sigma = process.alpha_sigma(torch.arange(1, num + 1, dtype=torch.float64) / num)
    # (i + 1) / N * N is not exactly i + 1: one ulp of the index times the steepest cell's log-slope.
    torch.testing.assert_close(alpha, squares.sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sigma, (1 - squares).sqrt(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_network_time_at_the_indices_is_the_index(name: str) -> None:
    num = len(SCHEDULERS[name].alphas_cumprod)
    process = DiscreteVP(SCHEDULERS[name].alphas_cumprod)
    net_time = process.net_time(torch.arange(1, num + 1, dtype=torch.float64) / num)
    # What the network is handed is float32, where the index must be a whole number again.
    assert torch.equal(net_time.float(), torch.arange(num, dtype=torch.float32))
    assert float(process.net_time(torch.zeros(1, dtype=torch.float64))) == 0


@every_process
def test_clean_end_has_no_noise(process: Process) -> None:
    assert process.level(0.0) == (1.0, 0.0)
    assert float(process.log_snr(torch.zeros(1, dtype=torch.float64))) == math.inf


@pytest.mark.parametrize("name", ["vp, zero SNR", "cosine", "flow", "flow, shift 3"])
def test_zero_terminal_snr_is_exact(name: str) -> None:
    assert PROCESSES[name].level(1.0) == (0.0, 1.0)
    assert float(PROCESSES[name].log_snr(torch.ones(1, dtype=torch.float64))) == -math.inf


@every_process
def test_log_snr_falls_strictly(process: Process) -> None:
    log_snr = process.log_snr(times())
    assert bool((log_snr[1:] < log_snr[:-1]).all())


@every_process
def test_levels_are_continuous(process: Process) -> None:
    # Between the knots, where no scheduler says anything: neighbours 1e-7 apart are alike at any t.
    t = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (1 - 1e-7)
    for here, there in zip(process.alpha_sigma(t), process.alpha_sigma(t + 1e-7), strict=True):
        assert float(((there - here).abs() / (1 + here.abs())).max()) < 1e-4


@pytest.mark.parametrize("name", [name for name in PROCESSES if name.startswith("vp") or name == "cosine"])
def test_variance_is_preserved(name: str) -> None:
    alpha, sigma = PROCESSES[name].alpha_sigma(times())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)


def test_interpolation_is_linear_in_log_snr_between_indices() -> None:
    process = PROCESSES["vp, linear"]
    t = torch.tensor([0.5, 0.5005, 0.501], dtype=torch.float64)
    low, middle, high = process.log_snr(t)
    assert float(middle) == pytest.approx(float(low + high) / 2, rel=1e-12)


def test_ends_are_linear_in_the_ratio_that_is_finite() -> None:
    process = PROCESSES["vp, zero SNR"]
    (a_1, s_1), (a_2, s_2) = process.level(0.0005), process.level(0.001)
    assert s_1 / a_1 == pytest.approx(s_2 / a_2 / 2, rel=1e-12)
    (a_1, s_1), (a_2, s_2) = process.level(0.9995), process.level(0.999)
    # 1e-9: 1 - 0.9995 has lost three of its sixteen digits before it is multiplied by 1000.
    assert a_1 / s_1 == pytest.approx(a_2 / s_2 / 2, rel=1e-9)


def test_shifted_flow_is_diffusers_shift() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    num = len(scheduler.sigmas)
    _, sigma = FlowMatching(shift=3.0).alpha_sigma(torch.arange(num, 0, -1, dtype=torch.float64) / num)
    # The scheduler's sigmas are float32.
    torch.testing.assert_close(sigma.float(), scheduler.sigmas.cpu(), rtol=1e-6, atol=1e-7)


def test_exploding_levels_are_the_karras_grid_of_diffusers() -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(12)
    process = VE(scheduler.config.sigma_min, scheduler.config.sigma_max)
    t = 1 - torch.arange(12, dtype=torch.float64) / 11 * (1 - process.t_min)
    # The scheduler's sigmas and timesteps are float32.
    torch.testing.assert_close(process.alpha_sigma(t)[1].float(), scheduler.sigmas[:-1], rtol=1e-5, atol=0)
    torch.testing.assert_close(process.net_time(t).float(), scheduler.timesteps, rtol=1e-5, atol=1e-6)


def test_network_times_of_the_continuous_processes() -> None:
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert CosineVP(net_scale=1000).net_time(t).tolist() == [250, 1000]
    assert FlowMatching().net_time(t).tolist() == [250, 1000]
    assert FlowMatching(shift=3.0, net_scale=1.0).net_time(t).tolist() == pytest.approx([0.5, 1.0])
    assert VE(time_input="sigma").net_time(t)[1] == pytest.approx(80)
    assert VE().net_time(t)[1] == pytest.approx(math.log(80) / 4)
    assert VE(time_input="sigma").net_time(t * 0).tolist() == pytest.approx([0.002, 0.002]), "sigma_min, never 0"


# The inverse


@pytest.mark.parametrize("name", PROCESSES)
@given(t=st.floats(0, 1))
def test_time_at_log_snr_inverts_log_snr(name: str, t: float) -> None:
    process = PROCESSES[name]
    time = torch.tensor([t], dtype=torch.float64)
    log_snr = process.log_snr(time)
    back = process.time_at_log_snr(log_snr)
    # In t where t is well conditioned; near the clean end of "cosine" and the noisy end of "flow" sigma or alpha
    # loses the digits of 1 - t, so 1e-9 and not machine precision.
    assert float(back) == pytest.approx(t, abs=1e-9)


@every_process
def test_log_snr_inverts_time_at_log_snr(process: Process) -> None:
    low, high = (float(process.log_snr(torch.tensor([t], dtype=torch.float64))) for t in (0.999, 0.001))
    log_snr = torch.linspace(low, high, 500, dtype=torch.float64)
    torch.testing.assert_close(process.log_snr(process.time_at_log_snr(log_snr)), log_snr, rtol=1e-7, atol=1e-7)


@every_process
def test_infinite_log_snr_is_the_clean_end(process: Process) -> None:
    assert float(process.time_at_log_snr(torch.tensor([math.inf], dtype=torch.float64))) == 0
    if process.level(1.0)[0] == 0:
        assert float(process.time_at_log_snr(torch.tensor([-math.inf], dtype=torch.float64))) == 1


# Heads and conversions


def states(process: Process, t: float, num: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    alpha, sigma = process.alpha_sigma(torch.full((num, 1), t, dtype=torch.float64))
    x_0, eps = normal(num, 3), normal(num, 3, seed=1)
    return x_0, eps, alpha * x_0 + sigma * eps, alpha, sigma


@pytest.mark.parametrize("prediction", CONVERTIBLE)
@every_process
def test_head_gives_x_0_from_the_true_output(process: Process, prediction: str) -> None:
    x_0, eps, x_t, alpha, sigma = states(process, 0.6)
    output = {"sample": x_0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "velocity": eps - x_0}
    c_in, c_skip, c_out = preconditioning(prediction, alpha, sigma)
    assert bool((c_in == 1).all())
    # sigma reaches 9 for "ve" at this time: its rounding is that much larger.
    torch.testing.assert_close(c_skip * x_t + c_out * output[prediction], x_0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("prediction", "alpha", "sigma", "c_skip", "c_out"),
    [
        ("sample", 0.3, 0.7, 0.0, 1.0),
        ("epsilon", 0.5, 0.8, 2.0, -1.6),
        ("v_prediction", 0.6, 0.8, 0.6, -0.8),  # alpha^2 + sigma^2 = 1: alpha x - sigma v
        ("velocity", 0.75, 0.25, 1.0, -0.25),  # alpha + sigma = 1: x - sigma v
        ("v_prediction", 0.0, 1.0, 0.0, -1.0),  # pure noise: no division by alpha
        ("velocity", 0.0, 1.0, 1.0, -1.0),
        ("sample", 0.0, 1.0, 0.0, 1.0),
    ],
)
def test_heads_are_the_known_formulas(prediction: str, alpha: float, sigma: float, c_skip: float, c_out: float) -> None:
    found = preconditioning(prediction, *(torch.tensor([level], dtype=torch.float64) for level in (alpha, sigma)))
    assert [float(c) for c in found] == pytest.approx([1.0, c_skip, c_out], rel=1e-12)


def test_edm_preconditioning_is_diffusers_own() -> None:
    scheduler = EDMEulerScheduler(sigma_data=0.7)
    for sigma in (0.002, 0.5, 7.0, 80.0):
        level = torch.tensor([sigma], dtype=torch.float64)
        x, output = normal(1, 4), normal(1, 4, seed=1)
        c_in, c_skip, c_out = preconditioning("edm", torch.ones_like(level), level, sigma_data=0.7)
        torch.testing.assert_close(c_in * x, scheduler.precondition_inputs(x, level), rtol=1e-12, atol=0)
        theirs = scheduler.precondition_outputs(x, output, level)
        torch.testing.assert_close(c_skip * x + c_out * output, theirs, rtol=1e-12, atol=1e-15)


def test_edm_preconditioning_keeps_unit_variance() -> None:
    # Karras et al., appendix B.6: input and training target of the network have variance 1 for any sigma.
    sigma = torch.logspace(-3, 2, 30, dtype=torch.float64)
    c_in, c_skip, c_out = preconditioning("edm", torch.ones_like(sigma), sigma, sigma_data=0.5)
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.25), torch.ones_like(sigma))
    target_variance = ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_variance, torch.ones_like(sigma))


@pytest.mark.parametrize("prediction", CONVERTIBLE)
def test_outputs_are_what_their_coefficients_say(prediction: str) -> None:
    x_0, eps, _, alpha, sigma = states(CosineVP(), 0.4)
    output = {"sample": x_0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "velocity": eps - x_0}
    a, b = output_coefficients(prediction, alpha, sigma)
    torch.testing.assert_close(a * x_0 + b * eps, output[prediction], rtol=0, atol=1e-13)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "velocity"])
def test_heads_at_pure_noise_are_finite(prediction: str) -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert all(bool(c.isfinite().all()) for c in preconditioning(prediction, zero, one))
    # And at the clean end, where x_0 is x_t itself.
    _, c_skip, c_out = preconditioning(prediction, one, zero)
    assert (float(c_skip), float(c_out)) in ((1.0, 0.0), (0.0, 1.0))


# The start level


@every_process
@pytest.mark.parametrize("prediction", [p for p in PREDICTION_TYPES if p != "epsilon"])
def test_bounded_heads_start_at_pure_noise(process: Process, prediction: str) -> None:
    t_max, reason = process.start_level(prediction)
    assert t_max == 1.0
    assert prediction in reason and "bounded" in reason


@pytest.mark.parametrize("name", ["vp, linear", "vp, cosine", "cosine", "flow", "flow, shift 3", "vp, euler"])
def test_epsilon_starts_where_the_signal_is_large_enough(name: str) -> None:
    process = PROCESSES[name]
    t_max, reason = process.start_level("epsilon")
    assert process.level(1.0)[0] < EPSILON_MIN_ALPHA, "the case must need an earlier start"
    assert 0 < t_max < 1
    assert process.level(t_max)[0] == pytest.approx(EPSILON_MIN_ALPHA, rel=1e-9)
    assert "divides by alpha" in reason and f"{process.level(1.0)[0]:.2g}" in reason


@pytest.mark.parametrize("name", ["vp, scaled linear", "vp, 100 steps"])
def test_epsilon_starts_at_the_end_where_it_can(name: str) -> None:
    t_max, reason = PROCESSES[name].start_level("epsilon")
    assert t_max == 1.0
    assert f"alpha = {PROCESSES[name].level(1.0)[0]:.3f}" in reason and "large enough" in reason


def test_epsilon_on_a_variance_exploding_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiplies every error by sigma.*prediction_type 'edm', or 'sample'"):
        PROCESSES["ve"].start_level("epsilon")


def test_epsilon_with_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zero terminal SNR.*v_prediction or sample.*rescale_betas_zero_snr"):
        PROCESSES["vp, zero SNR"].start_level("epsilon")


# Bad inputs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.tensor([0.5, 0.9]), "index 0 holds 0.5 and index 1 0.8999"),  # rising
        (torch.tensor([1.0, 0.9, 0.9]), "index 1 holds 0.8999.* and index 2 0.8999.*beta_2 a value above 6e-8"),  # flat
        (torch.tensor([1.5, 0.5]), "index 0 holds 1.5"),
        (torch.tensor([0.5, -0.25]), "index 1 holds -0.25"),
        (torch.tensor([0.9, float("nan")]), "index 1 holds nan"),
        (torch.tensor([1.0, 0.0]), "no level between the clean image and pure noise"),
        (torch.tensor([1.0, 1.0]), "no level between"),
        (torch.tensor([[0.9, 0.5]]), r"its shape is \[1, 2\]"),
        (torch.tensor([]), r"its shape is \[0\]"),
        (torch.tensor([0.5]), r"its shape is \[1\]"),  # one level is no process
    ],
)
def test_impossible_schedules_are_refused(values: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=f"falling sequence in .*{words}"):
        DiscreteVP(values)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("num_clean", [1, 3])
def test_clean_first_indices_are_the_clean_image(num_clean: int, zero_snr: bool) -> None:
    squares = torch.cos(torch.linspace(0, 1.5, 50, dtype=torch.float64)) ** 2
    squares = torch.cat([torch.ones(num_clean - 1, dtype=torch.float64), squares])
    if zero_snr:
        squares = torch.cat([squares, torch.zeros(1, dtype=torch.float64)])
    process, last = DiscreteVP(squares), len(squares) - 1
    index = torch.arange(num_clean - 1, last + 1, dtype=torch.float64)
    t = (index - num_clean + 1) / (last - num_clean + 1)
    torch.testing.assert_close(process.alpha_sigma(t)[0] ** 2, squares[num_clean - 1 :], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(process.net_time(t), index, rtol=1e-12, atol=0)
    assert process.level(0.0) == (1.0, 0.0) and process.t_min == pytest.approx(float(t[1]))
    assert (process.level(1.0) == (0.0, 1.0)) == zero_snr
    torch.testing.assert_close(process.time_at_log_snr(process.log_snr(t)), t, rtol=0, atol=1e-12)
    assert [process.time_of(int(i)) for i in index] == pytest.approx(t.tolist())


@pytest.mark.parametrize(("low", "high"), [(0.0, 80.0), (-1.0, 80.0), (80.0, 80.0), (90.0, 80.0)])
def test_impossible_noise_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        VE(low, high)


def test_unknown_time_input_is_refused() -> None:
    with pytest.raises(ValueError, match="'log_sigma' or 'sigma'.*'sigmas'"):
        VE(time_input="sigmas")


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_impossible_shift_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="shift must be positive"):
        FlowMatching(shift=shift)


def test_unknown_prediction_type_is_refused() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"unknown prediction type 'noise'; known: .*epsilon"):
        output_coefficients("noise", one, one)
    with pytest.raises(ValueError, match="unknown prediction type"):
        preconditioning("noise", one, one)
