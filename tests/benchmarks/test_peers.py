"""The peers of `benchmarks/peers.py` are what their papers say: on a Gaussian, whose maps are known, they reach them."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from onestill.core.tensors import as_times
from onestill.diffusion.process import CosineVP
from onestill.diffusion.trajectory import ddim_step, solve, uniform_times
from onestill.sampling.generate import teacher_generator
from onestill.teachers.closed_form import GaussianTeacher
from onestill.teachers.module import module_teacher

ROOT = Path(__file__).resolve().parent.parent.parent
MEAN, STD = torch.tensor([0.5, -0.3]), 0.6
EXACT = GaussianTeacher(MEAN, STD, CosineVP(1000.0))


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    """The benchmark as a module; its neighbours are found as when it runs as a script."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("peers")
    sys.path.pop(0)


class ExactNetwork(nn.Module):
    """The Gaussian's v, and beside it any v that is affine in x and smooth in t, nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(24, 2))

    def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
        t = net_time[:, None].double() / 1000
        alpha, sigma = (v.to(x) for v in EXACT.spec.process.alpha_sigma(t))
        given = alpha * x - EXACT.denoised(x, t[:, 0], {})
        bumps = torch.exp(-(((t - torch.linspace(0, 1, 24)) * 16) ** 2)).to(x)
        # As an error of x_0 it is divided by sigma: what is asked of it at the clean end would not be smooth.
        return given / sigma.clamp(min=1e-3) + bumps @ self.slope[:, None] * x + bumps @ self.shift


def job(peers: ModuleType, budget: int, rate: float = 1e-2, batch_size: int = 64) -> object:
    """A training on the Gaussian; `distance` is RMS to the exact map, whatever the samples' law."""
    from peers_parts.problems import Counter, Problem

    teacher = module_teacher(ExactNetwork(), CosineVP(1000.0), "v_prediction", (2,))
    images = MEAN + STD * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1))
    law = lambda x, _: {"distance": float((x.mean(0) - MEAN).norm() + (x.std(0) - STD).norm())}  # noqa: E731
    problem = Problem("mixture", teacher, images, None, law, "moments", 2000, batch_size, budget, (rate,), end_steps=64)
    return peers.Job(problem, rate, 0, budget, Counter(teacher))


def test_two_teacher_steps_are_one_step_of_the_progressive_target(peers: ModuleType) -> None:
    from peers_parts.methods import two_steps

    trajectory = EXACT.spec.trajectory
    x_t = torch.randn(5, 2, dtype=torch.float64)
    t, m, s = (torch.full((5,), value, dtype=torch.float64) for value in (0.8, 0.7, 0.6))
    target = two_steps(trajectory, EXACT.denoiser({}), x_t, t, m, s)
    x_m = trajectory.state(EXACT.denoised(x_t, t, {}), x_t, m, t)
    x_s = trajectory.state(EXACT.denoised(x_m, m, {}), x_m, s, m)
    assert torch.allclose(trajectory.state(target, x_t, s, t), x_s, atol=1e-12)
    # The paper's own words: (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha).
    (alpha, sigma), (alpha_s, sigma_s) = (trajectory.process.level(v) for v in (0.8, 0.6))
    assert torch.allclose(target, (x_s - sigma_s / sigma * x_t) / (alpha_s - sigma_s / sigma * alpha), atol=1e-12)


def test_the_consistency_step_stays_on_the_trajectory(peers: ModuleType) -> None:
    from peers_parts.methods import earlier_state

    trajectory = EXACT.spec.trajectory
    x_a = torch.randn(64, 2, dtype=torch.float64)
    errors = []
    for h in (0.1, 0.05):
        t, s = (as_times(value, 64) for value in (0.7, 0.7 - h))
        found = earlier_state(trajectory, EXACT.denoiser({}), EXACT.exact_state(x_a, 0.7), t, s)
        errors.append(float((found - EXACT.exact_state(x_a, 0.7 - h)).square().mean().sqrt()))
    assert errors[1] < 2e-4
    assert errors[0] / errors[1] > 6  # of third order in one step


def test_knowledge_distillation_reaches_the_map(peers: ModuleType) -> None:
    found = job(peers, 400_000)
    peers.METHODS["kd"].train(found)
    assert found.curve[0]["rms"] > 5 * found.steps[1]["rms"]
    assert found.steps[1]["rms"] < 0.02


def test_consistency_distillation_reaches_the_map(peers: ModuleType) -> None:
    found = job(peers, 250_000, batch_size=16)
    untrained = EXACT.denoised(torch.zeros(1, 2), 1.0, {})  # the mean, whatever the noise
    assert torch.allclose(untrained, MEAN[None], atol=1e-6)
    peers.METHODS["cd_data"].train(found)
    # That of Heun's 16 steps, which are its last ones: its error is not nothing, and little of its own is added.
    heun = found.problem.judge(teacher_generator(found.teacher, num_steps=16, solver="heun"), 0)["rms"]
    assert abs(found.steps[1]["rms"] - heun) < 0.015, (heun, found.steps)
    assert found.steps[4]["distance"] < 0.1  # its law, with fresh noise on the way


def test_progressive_distillation_halves_the_teachers_steps(peers: ModuleType) -> None:
    from peers_parts.methods import FIRST_TEACHER

    found = job(peers, 250_000, batch_size=32)
    peers.METHODS["pd_samples"].train(found)
    begun = found.problem.judge(teacher_generator(found.teacher, num_steps=FIRST_TEACHER), 0)["rms"]
    direct = found.problem.judge(teacher_generator(found.teacher, num_steps=1), 0)["rms"]
    assert direct > 10 * begun
    for num in (1, 2, 4, 8):
        # Every student ends where the first teacher does: its error, which is not nothing, and little of its own.
        assert abs(found.steps[num]["rms"] - begun) < 0.3 * begun, (num, begun, found.steps)


def test_every_method_spends_what_it_is_given(peers: ModuleType, tmp_path: Path) -> None:
    from peers_parts.problems import Counter, Problem
    from toys import PointNetwork

    torch.manual_seed(0)
    teacher = module_teacher(PointNetwork(2), CosineVP(1000.0), "v_prediction", (2,))
    law = lambda x, _: {"distance": float(x.square().mean())}  # noqa: E731
    for name, method in peers.METHODS.items():
        counter = Counter(teacher)
        problem = Problem("mixture", teacher, torch.randn(100, 2), None, law, "moments", 50, 8, 8_000, (1e-3,))
        found = peers.Job(problem, 1e-3, 0, 8_000, counter)
        method.train(found)
        counter.close()
        assert abs(counter.spent / 8_000 - 1) < 0.03, (name, counter.spent)
        assert found.curve[-1]["evaluations"] == counter.spent
        assert 1 in found.steps


def test_the_count_is_of_rows_and_of_backward_passes(peers: ModuleType) -> None:
    from peers_parts.problems import Counter

    teacher = module_teacher(nn.Linear(2, 2).forward, CosineVP(1000.0), "v_prediction", (2,))
    network = nn.Linear(2, 2)
    teacher.network = lambda x, t: network(x)
    counter = Counter(teacher)
    teacher.denoised(torch.zeros(5, 2), 0.5, {})
    assert counter.spent == 15
    with torch.no_grad():
        teacher.denoised(torch.zeros(5, 2), 0.5, {})
    assert counter.spent == 20
    with counter.counting(False), torch.no_grad():
        solve(teacher.spec.trajectory, teacher.denoiser({}), torch.zeros(5, 2), uniform_times(1.0, 4), ddim_step)
    assert counter.spent == 20
    counter.close()
    teacher.denoised(torch.zeros(5, 2), 0.5, {})
    assert counter.spent == 20


def test_energy_distance_is_that_of_draws(peers: ModuleType) -> None:
    from peers_parts.problems import energy_distance
    from toys import mixture

    exact = mixture()
    x, y, z = (exact.draw(4000, torch.Generator().manual_seed(seed)).double() for seed in range(3))
    shifted = x + torch.tensor([0.3, -0.1])
    distance = torch.cdist
    by_draws = 2 * distance(shifted, y).mean() - distance(shifted, z + (shifted - x)).mean() - distance(y, z).mean()
    assert energy_distance(shifted, exact) == pytest.approx(float(by_draws), abs=0.01)
    assert abs(energy_distance(x, exact)) < 1e-3 < energy_distance(shifted, exact) / 30


def test_a_learning_rate_at_the_grids_end_widens_it(peers: ModuleType) -> None:
    problem = job(peers, 1000).problem
    problem.rates = (1e-3, 3e-3)

    def tried(distances: dict[float, float]) -> list[float]:
        tasks = {rate: peers.Task("tuning", "mixture", "kd", peers.TUNING_SEED, 250, rate) for rate in distances}
        found = {
            task.key: {"key": task.key, **vars(task), "steps": {"1": {"distance": distances[rate]}}}
            for rate, task in tasks.items()
        }
        return peers.rates_to_try(found, problem, "kd", 250)

    assert tried({}) == [1e-3, 3e-3]
    assert tried({1e-3: 2.0, 3e-3: 1.0}) == [9.5e-3]
    assert tried({1e-3: 1.0, 3e-3: math.inf}) == [3.2e-4]
    assert tried({1e-3: 2.0, 3e-3: 1.0, 9.5e-3: 3.0}) == []


def test_what_is_finished_is_not_done_again(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def done(task: object, _folder: str) -> dict[str, object]:
        calls.append(task)
        steps = {str(num): {"distance": 1.0 / num, "rms": 0.1, "nfe": num} for num in (1, 2, 4, 8, 50)}
        about = {"spent": 1000, "core_seconds": 1.0, "curve": [{"evaluations": 1000, **steps["1"]}], "steps": steps}
        return {"key": task.key, **vars(task), **about}  # type: ignore[attr-defined]

    monkeypatch.setattr(peers, "done", done)
    monkeypatch.setattr(peers, "problem_of", lambda *_: job(peers, 1000).problem)
    arguments = ["peers.py", "--output_dir", str(tmp_path), "--teachers", "mixture", "--methods", "kd", "boot"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--evaluations", "1000"])
    peers.main()
    first = len(calls)
    assert first > 6
    table = capsys.readouterr().out
    assert "| KD on pairs | no | 1,000 |" in table
    peers.main()
    assert len(calls) == first
    assert (tmp_path / "mixture.png").stat().st_size > 10_000
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines)[:-20])  # as a kill leaves it
    peers.main()
    assert len(calls) == first + 1
    lost = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert lost["key"] == json.loads(lines[-1])["key"]


def test_intervals_are_of_students_t(peers: ModuleType) -> None:
    assert peers.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert math.isnan(peers.interval([1.0]))
    assert peers.shown([0.123, 0.125, 0.127]) == "0.1250 ± 0.0050"
