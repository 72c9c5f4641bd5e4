"""The flow map: its identity in every process, its draws, its weights, and what a training makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs_helpers import ALONE, FAST, NULL_CLASS, Interruption, interrupt_at, same_state, teacher_folder
from torch import Tensor

import onestill
from onestill.core.tensors import broadcast
from onestill.diffusion.process import VE, CosineVP, DiscreteVP, FlowMatching, LogSigmaVP, Process
from onestill.diffusion.trajectory import STEPS, Trajectory
from onestill.objectives.boot import bounded_sigma
from onestill.objectives.flow_map import FlowMap, draw_levels, eulerian, lagrangian, step_share
from onestill.runs.build import build_run
from onestill.teachers.base import Teacher
from onestill.teachers.closed_form import GaussianTeacher, MixtureTeacher
from onestill.training.config import make_config
from onestill.training.loss import robust_factors, shares, squared_residuals
from onestill.training.trainer import Fingerprints, Trainer

SCALED_LINEAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
PROCESSES: dict[str, Process] = {
    "cosine": CosineVP(),
    "flow": FlowMatching(),
    "shifted flow": FlowMatching(3.0),
    "ve": VE(),
    "log-sigma": LogSigmaVP(),
    "scaled linear": DiscreteVP(SCALED_LINEAR),
}
ORDERS = {"ddim": 1, "heun": 2, "midpoint": 2}


def levels(trajectory: Trajectory, num: int = 64, delta: float = 0.04) -> tuple[Tensor, Tensor, Tensor]:
    u = torch.rand(2, num, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return draw_levels(u, torch.arange(num) < num // 3, delta, 0.0, trajectory)


def states(teacher: Teacher, t: Tensor) -> Tensor:
    noise = torch.randn(len(t), *teacher.spec.sample_shape, generator=torch.Generator().manual_seed(3)).double()
    alpha, sigma = teacher.spec.process.alpha_sigma(t)
    return broadcast((alpha**2 + sigma**2).sqrt(), noise) * noise


# The identity


@pytest.mark.parametrize("t_max", [1.0, 0.7])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("step", STEPS)
def test_the_target_is_the_map_of_the_whole_path(process: Process, t_max: float, step: str) -> None:
    # The map that goes by five steps of the teacher, asked at t', gives at t the map by that first step and those five.
    means = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = MixtureTeacher(means, 0.4, process, t_max)
    trajectory, denoised, of = teacher.spec.trajectory, teacher.denoiser({}), STEPS[step]
    t, m, r = levels(trajectory)
    x_t, zero = states(teacher, t), torch.zeros(len(t), 2, dtype=torch.float64)

    def onward(x: Tensor, y: Tensor, start: Tensor, a: Tensor) -> Tensor:
        for i in range(5):
            to = r if i == 4 else start + (r - start) * (i + 1) / 5
            y = of(trajectory, denoised, x, y, start if i == 0 else start + (r - start) * i / 5, to, a)
        return y

    found = eulerian(of, trajectory, denoised, lambda x, a, _: onward(x, zero, a, a), x_t, t, m, r)
    first = of(trajectory, denoised, x_t, zero, t, m, t)
    expected = torch.where((m > r)[:, None], onward(x_t, first, m, t), first)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # And with the step at the other end: the map by five steps to m, and one from there to r.
    m = torch.minimum(r + 0.04, t)

    def up_to(x: Tensor, a: Tensor, m: Tensor) -> Tensor:
        y = zero
        for i in range(5):
            y = of(trajectory, denoised, x, y, a + (m - a) * i / 5, m if i == 4 else a + (m - a) * (i + 1) / 5, a)
        return y

    rows = m < t
    found = lagrangian(of, trajectory, denoised, up_to, x_t, t, m, r)[rows]
    x_m = trajectory.state(y_m := up_to(x_t, t, m), x_t, m, t)
    mean = of(trajectory, denoised, x_m, zero, m, r, m)  # of f over the step alone
    part = broadcast(trajectory.rho(m, r, t), x_t)
    torch.testing.assert_close(found, ((1 - part) * y_m + part * mean)[rows], rtol=0, atol=1e-12)


def exact_map(teacher: GaussianTeacher, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return Y(x_t; t -> r) of the ODE's solution, eq. (17) with the start level t."""
    trajectory, mean = teacher.spec.trajectory, teacher.mean
    (alpha_t, sigma_t), (alpha_r, sigma_r) = (teacher.spec.process.alpha_sigma(level) for level in (t, r))
    spread = ((alpha_r * teacher.std) ** 2 + sigma_r**2).sqrt() / ((alpha_t * teacher.std) ** 2 + sigma_t**2).sqrt()
    x_r = alpha_r[:, None] * mean + spread[:, None] * (x_t - alpha_t[:, None] * mean)
    return trajectory.signal(x_r, x_t, r, t)


def exact_residual(process: Process, step: str, delta: float, identity: str) -> float:
    """Return the root of the mean squared residual in units of f, at the exact map of a Gaussian."""
    teacher = GaussianTeacher(torch.tensor([0.5, -0.3], dtype=torch.float64), 0.6, process)
    trajectory, num = teacher.spec.trajectory, 48
    t = torch.linspace(0.35, 0.9, num, dtype=torch.float64)
    r = t * torch.linspace(0.2, 0.7, num).double().flip(0)
    x_t, student = states(teacher, t), lambda x, a, s: exact_map(teacher, x, a, s)
    of, m = (eulerian, t - delta) if identity == "eulerian" else (lagrangian, r + delta)
    share = step_share(trajectory, t, m, r) if identity == "eulerian" else trajectory.rho(m, r, t)
    target = of(STEPS[step], trajectory, teacher.denoiser({}), student, x_t, t, m, r)
    return float((squared_residuals(student(x_t, t, r), target) / share**2).mean().sqrt())


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("identity", ["lagrangian", "eulerian"])
@pytest.mark.parametrize("step", STEPS)
def test_at_the_exact_map_the_residual_is_of_the_solvers_order(process: Process, step: str, identity: str) -> None:
    coarse, fine = (exact_residual(process, step, delta, identity) for delta in (0.02, 0.01))
    assert 0 < fine < coarse < 0.2
    assert math.log2(coarse / fine) == pytest.approx(ORDERS[step], abs=0.3)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_exact_map_samples_in_any_number_of_steps(num_steps: int) -> None:
    teacher = GaussianTeacher(torch.tensor([0.5, -0.3], dtype=torch.float64), 0.6, CosineVP())
    x = start = states(teacher, torch.ones(8, dtype=torch.float64))
    for k in range(num_steps):
        t, r = (torch.full((8,), 1 - (k + i) / num_steps, dtype=torch.float64) for i in (0, 1))
        x = teacher.spec.trajectory.state(exact_map(teacher, x, t, r), x, r, t)  # eq. (21)
    torch.testing.assert_close(x, teacher.exact_state(start, 0.0), rtol=0, atol=1e-12)


def test_the_residual_is_that_of_average_velocities() -> None:
    # On a flow u + (t - r) du/dt - v = -(r / t^2) R, and of eq. (22) it is rho' R: eq. (23) makes the gradients equal.
    trajectory = Trajectory(FlowMatching(), 1.0)
    t, r = torch.tensor([0.9, 0.6, 0.5]).double(), torch.tensor([0.5, 0.3, 0.0]).double()
    m = t - 0.1
    expected = (t - r) / (t**2 * (t - m))
    found = 1 / (step_share(trajectory, t, m, r) * bounded_sigma(trajectory, t) ** 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# Times and weights


@given(
    u=st.lists(st.floats(0, 0.999999), min_size=2, max_size=20),
    delta=st.floats(0.002, 0.4),
    t_min=st.floats(0, 0.3),
    t_max=st.floats(0.75, 1),
)
def test_levels_are_in_range_and_weights_finite(u: list[float], delta: float, t_min: float, t_max: float) -> None:
    draws = torch.tensor([u, u[::-1]], dtype=torch.float64)
    for process in PROCESSES.values():
        trajectory = Trajectory(process, t_max)
        t, m, r = draw_levels(draws, torch.arange(len(u)) % 2 == 0, delta, t_min, trajectory)
        assert bool((r >= t_min).all()) and bool((r <= m).all()) and bool((m < t).all()) and bool((t <= t_max).all())
        assert bool((r[::2] == t_min).all()) and bool(((m == r) | (m >= process.t_min)).all())
        share = step_share(trajectory, t, m, r)
        assert bool((share > 0).all()) and bool((share <= 1 + 1e-9).all())


def test_the_share_is_one_where_one_step_is_all() -> None:
    for process in PROCESSES.values():
        t = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
        m = r = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
        assert step_share(Trajectory(process, 1.0), t, m, r).tolist() == [1, 1, 1]


# Rows of a run


def trainer_of(folder: Path, kind: str = "plain", **settings: Any) -> Trainer:
    values = {"teacher": str(teacher_folder(kind)), "output_dir": folder, **FAST, "flow_map_fraction": 0.5, **settings}
    prepared = build_run(make_config(values))
    trainer = Trainer(prepared.config, prepared.student, prepared.conditions, Fingerprints("x"))
    folder.mkdir(exist_ok=True)
    list(trainer.prepare())
    return trainer


ANCHORS = {"anchor_fraction": 0.25, "num_anchors": 5, "num_anchor_steps": 2}


@pytest.mark.parametrize("own", [{}, {"flow_map_states": "path"}, {"flow_map_states": "anchors", **ANCHORS}])
def test_an_untrained_student_solves_the_rows_that_end_where_they_start(tmp_path: Path, own: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path / "run", train_batch_size=16, thresholding="none", **own)
    flow_map = trainer.objectives[-1]
    assert isinstance(flow_map, FlowMap)
    batch = flow_map.batch(16)
    assert batch.r is not None and batch.share is not None and isinstance(batch.target, Tensor)
    same = batch.s == batch.r
    assert 7 <= int(same.sum()) <= 9 and 3 <= int((batch.s == 0).sum()) <= 5
    with torch.no_grad():
        y = trainer.student(batch.x, batch.r, batch.s, batch.cond)
    residuals = squared_residuals(y, batch.target)
    assert float(residuals[same].max()) < 1e-10 < float(residuals[~same].min())
    assert bool((batch.share[same] == 1).all()) and bool((batch.share[~same] < 1).any())


@pytest.mark.parametrize("identity", ["lagrangian", "mixed", "eulerian"])
def test_weights_are_first_powers_of_the_step_and_of_both_levels(tmp_path: Path, identity: str) -> None:
    trainer = trainer_of(tmp_path / "run", flow_map_identity=identity, flow_map_delta=0.1, flow_map_weight=3.0)
    batch, trajectory = trainer.objectives[-1].batch(200), trainer.student.spec.trajectory
    t, r = batch.r, batch.s
    assert t is not None
    moves = r < t
    is_eulerian = moves & ((r > 0) if identity == "mixed" else torch.tensor(identity == "eulerian"))
    near, far = torch.minimum(r + 0.1, t), torch.maximum(t - 0.1, r)
    kappa = step_share(trajectory, t, far, r)
    share = torch.where(is_eulerian, kappa, torch.where(moves, trajectory.rho(near, r, t), 1.0))
    noisy = torch.where(moves & ~is_eulerian, near, t)
    expected = 3 / (share * bounded_sigma(trajectory, t) * bounded_sigma(trajectory, noisy))
    torch.testing.assert_close(batch.weights, expected.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(batch.share, share, rtol=1e-12, atol=0)


def test_every_start_is_drawn_and_noise_is_one(tmp_path: Path) -> None:
    own: dict[str, Any] = {"flow_map_delta": 0.2, "flow_map_diagonal": 0.0, "flow_map_to_end": 1.0}
    trainer = trainer_of(tmp_path / "run", **own)
    batch = trainer.objectives[-1].batch(400)
    assert batch.r is not None
    # A share of delta / (t_max - t_min) starts at noise itself; the standard deviation is 2 %.
    at_noise = batch.r == 1
    assert float(at_noise.double().mean()) == pytest.approx(0.2, abs=0.07)
    assert float(batch.r.min()) == pytest.approx(0.2, abs=0.02) and bool((batch.s == 0).all())
    assert float(batch.x[at_noise].std()) == pytest.approx(1, abs=0.05)


def test_robust_factors_are_those_of_fixed_targets_only(tmp_path: Path) -> None:
    boot, flow_map = trainer_of(tmp_path / "run").objectives
    found = [boot.batch(6), flow_map.batch(4)]
    moving = type(found[0])(**{**vars(found[0]), "target": lambda y: y - 1.0})
    residuals = torch.linspace(0.1, 2, 16)
    factors = robust_factors([*found, moving], residuals, 0.5, 0.01)
    expected = (residuals[:10] / shares(found) ** 2 + 0.01) ** -0.5
    torch.testing.assert_close(factors[:10], expected.float(), rtol=1e-5, atol=0)
    assert factors[10:].tolist() == [1.0] * 6


def test_a_robust_loss_is_the_sum_of_relative_residuals(tmp_path: Path) -> None:
    # With 1 / rho^2, k = 1 and a constant that is nothing beside a residual, every row counts for its whole mean.
    common: dict[str, Any] = {"flow_map_fraction": 0, "boundary_weight": 0, "robust_constant": 1e-12}
    trainer = trainer_of(tmp_path / "run", bootstrap_weight="inverse_rho", robust_exponent=1, **common)
    for p in trainer.student.parameters():
        p.data += 0.01  # no row is 0
    assert float(trainer._losses()[0].detach()) == pytest.approx(1, rel=1e-3)


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {"robust_exponent": 0.5, "flow_map_identity": "lagrangian"}),
    "epsilon": ("epsilon", {"solver": "heun", "flow_map_states": "path", "flow_map_identity": "eulerian"}),
    "guided anchors": (
        "class",
        {"null_class": NULL_CLASS, "guidance_scale": 2.0, "flow_map_states": "anchors", **ANCHORS},
    ),
    "drawn scales, LoRA": (
        "class",
        {"null_class": NULL_CLASS, "guidance_scale_min": 1.0, "guidance_scale_max": 3.0, "lora_rank": 2},
    ),
}


@pytest.mark.parametrize(("kind", "own"), RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_uninterrupted_bit_by_bit(tmp_path: Path, kind: str, own: dict[str, Any]) -> None:
    settings = {**FAST, "flow_map_fraction": 0.5, "train_batch_size": 8, "checkpointing_steps": 2, **own}
    onestill.distill(teacher_folder(kind), tmp_path / "one", show_progress=False, **settings)
    with pytest.raises(Interruption):
        onestill.distill(
            teacher_folder(kind), tmp_path / "two", on_step=interrupt_at(3), show_progress=False, **settings
        )
    onestill.distill(
        teacher_folder(kind), tmp_path / "two", resume_from_checkpoint="latest", show_progress=False, **settings
    )
    assert same_state(tmp_path / "one" / "checkpoint-4", tmp_path / "two" / "checkpoint-4")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flow_map_diagonal": 0.8, "flow_map_to_end": 0.3}, "are more than all of the rows"),
        ({**ALONE, "flow_map_fraction": 0.5, "flow_map_states": "anchors"}, "needs some: anchor_fraction is 0"),
        ({"flow_map_fraction": 0.9, "train_batch_size": 4}, "2 rows too many are asked for"),
        ({"flow_map_fraction": 0.5, "flow_map_delta": 0.95, "t_min": 0.1}, "flow_map_delta=0.95: must be below t_max"),
        ({"robust_exponent": 3}, "robust_exponent=3: must be at most 2"),
        ({"robust_constant": 0}, "robust_constant=0: must be above 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config({"teacher": "digits", "output_dir": "run", **settings})


def test_a_step_below_the_teachers_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flow_map_delta=0.0001: is below 0.001, one time step of the teacher"):
        trainer_of(tmp_path / "run", flow_map_delta=1e-4)
