"""Seeds to images: one seed is one image, whatever the batch."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from onestill.core.tensors import Cond, as_times, noise, to_device
from onestill.diffusion.process import VE, CosineVP, DiscreteVP, FlowMatching, Process
from onestill.diffusion.trajectory import CALLS_PER_STEP, STEPS, solve, uniform_times
from onestill.sampling.generate import generate_images, student_generator, teacher_generator
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.closed_form import GaussianTeacher
from onestill.teachers.guidance import Guided, Thresholded
from onestill.teachers.teacher_spec import Threshold


def gaussian(t_max: float = 1.0) -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([0.5, -0.3]), 0.6, CosineVP(), t_max)


# Noise


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (2,)])
def test_noise_is_diffusers_noise_for_a_list_of_generators(shape: tuple[int, ...]) -> None:
    seeds = [5, 0, 2**31 - 1, 5]
    theirs = randn_tensor((4, *shape), generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    assert torch.equal(noise(seeds, shape), theirs)


def test_one_seed_is_one_noise() -> None:
    together = noise(range(10, 16), (1, 8, 8))
    assert together.dtype == torch.float32 and together.shape == (6, 1, 8, 8)
    assert torch.equal(together[3:4], noise([13], (1, 8, 8)))
    assert len({row.sum().item() for row in together}) == 6
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(noise(range(10, 16), (1, 8, 8)), together)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is neither read nor moved"


def test_no_seeds_are_no_images() -> None:
    assert noise([], (1, 8, 8)).shape == (0, 1, 8, 8)
    assert generate_images(lambda eps, cond: eps, [], (1, 8, 8), {}).shape == (0, 1, 8, 8)


# Batches


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("place", "show", "num", "shown"),
    [(Terminal, True, 5, True), (Terminal, True, 2, False), (Terminal, False, 5, False), (io.StringIO, True, 5, False)],
)
def test_a_bar_is_for_several_batches_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, place: type[io.StringIO], show: bool, num: int, shown: bool
) -> None:
    said = place()
    monkeypatch.setattr("sys.stderr", said)
    images = generate_images(lambda eps, _: eps, range(num), (2,), {}, batch_size=2, show_progress=show)
    assert torch.equal(images, noise(range(num), (2,)))
    assert ("generating" in said.getvalue() and "/3" in said.getvalue()) is shown
    assert shown or not said.getvalue()


@pytest.mark.parametrize("name", ["ddpm-epsilon", "edm-euler", "class-null-last", "module-flow-velocity"])
def test_images_do_not_depend_on_the_batch(cases: dict[str, Any], name: str, labels_for: Callable[..., Cond]) -> None:
    teacher = cases[name].build()
    seeds, cond = range(100, 107), labels_for(teacher, 7)
    for generate in (student_generator(Student(teacher)), teacher_generator(teacher, num_steps=2)):
        whole = generate_images(generate, seeds, teacher.spec.sample_shape, cond, batch_size=7)
        parts = generate_images(generate, seeds, teacher.spec.sample_shape, cond, batch_size=3)
        one = generate_images(generate, [104], teacher.spec.sample_shape, {k: v[4:5] for k, v in cond.items()})
        # Float32 kernels of another batch size sum in another order; 1 / alpha is 20 for epsilon.
        size = whole.abs().max().clamp(min=1)
        assert float((whole - parts).abs().max() / size) < 1e-5
        assert float((whole[4:5] - one).abs().max() / size) < 1e-5
        assert float((whole[4] - whole[5]).abs().max()) > 1e-3, "other seeds are other images"


def test_batches_are_cut_as_asked() -> None:
    seen: list[tuple[Tensor, Cond]] = []

    def generate(eps: Tensor, cond: Cond) -> Tensor:
        seen.append((eps, cond))
        return eps + cond["class_labels"].reshape(-1, 1)

    labels = torch.arange(5)
    images = generate_images(generate, range(5), (2,), {"class_labels": labels}, batch_size=2)
    assert [len(eps) for eps, _ in seen] == [2, 2, 1]
    assert torch.equal(torch.cat([cond["class_labels"] for _, cond in seen]), labels)
    assert torch.equal(images, noise(range(5), (2,)) + labels[:, None])


# The student


def test_student_is_asked_at_its_target_time(cases: dict[str, Any]) -> None:
    teacher = cases["edm-euler"].build()
    student = Student(teacher)
    with torch.no_grad():
        student.target_embedding.mlp.linear_2.weight.normal_(0, 0.1)
    eps = noise(range(3), teacher.spec.sample_shape)
    x_a = teacher.spec.trajectory.start(eps)
    for t in (0.0, 0.4):
        found = student_generator(student, t=t)(eps, {})
        assert torch.equal(found, student(x_a, None, t, {})) and not found.requires_grad
    assert torch.equal(student_generator(student)(eps, {}), student_generator(student, t=0.0)(eps, {}))
    assert not torch.equal(student_generator(student, t=0.4)(eps, {}), student_generator(student)(eps, {}))


class ExactMap(Student):
    """The two-time map of Gaussian data N(m, c^2), eq. (17) with r for a; no network."""

    def __init__(self, teacher: GaussianTeacher) -> None:
        nn.Module.__init__(self)
        self.teacher = teacher  # type: ignore[assignment]
        self.seen: list[tuple[float, float]] = []

    def forward(self, x_r: Tensor, r: float | Tensor | None, s: float | Tensor, cond: Cond) -> Tensor:
        a, to = as_times(1.0 if r is None else r, len(x_r)), as_times(s, len(x_r))
        self.seen.append((float(a[0]), float(to[0])))
        (alpha_r, sigma_r), (alpha_s, sigma_s) = (self.spec.process.alpha_sigma(t) for t in (a, to))
        v_r, v_s = ((alpha**2 * C**2 + sigma**2).sqrt() for alpha, sigma in ((alpha_r, sigma_r), (alpha_s, sigma_s)))
        share = sigma_s / sigma_r
        gain = ((v_s / v_r - share) / (alpha_s - alpha_r * share))[:, None]
        return MEAN + gain * (x_r - alpha_r[:, None] * MEAN)


MEAN, C = torch.tensor([0.7, -0.4], dtype=torch.float64), 0.35


@pytest.mark.parametrize(
    "process", [CosineVP(), FlowMatching(3.0), VE(0.002, 80.0), DiscreteVP(DDPMScheduler().alphas_cumprod)]
)
def test_several_steps_of_the_exact_map_end_where_one_does(process: Process) -> None:
    eps = noise(range(6), (2,)).double()
    one, *others = [1, 2, 3, 4, 8]
    exact = ExactMap(GaussianTeacher(MEAN, C, process, 1.0))
    expected = student_generator(exact, num_steps=one)(eps, {})
    assert exact.seen == [(1.0, 0.0)]
    for num in others:
        exact = ExactMap(GaussianTeacher(MEAN, C, process, 1.0))
        torch.testing.assert_close(student_generator(exact, num_steps=num)(eps, {}), expected, atol=1e-9, rtol=1e-9)
        levels = [*uniform_times(1.0, num)[:-1], 0.0]
        assert exact.seen == list(pairwise(levels))


def test_several_steps_are_states_of_eq_5(cases: dict[str, Any]) -> None:
    teacher = cases["edm-euler"].build()
    student = Student(teacher)
    with torch.no_grad():
        student.target_embedding.mlp.linear_2.weight.normal_(0, 0.1)
    eps, sigma = noise(range(3), teacher.spec.sample_shape), lambda t: teacher.spec.process.level(t)[1]
    x = teacher.spec.trajectory.start(eps)
    y = student(x, 1.0, 0.5, {})
    x = sigma(0.5) / sigma(1.0) * x + (1 - sigma(0.5) / sigma(1.0)) * y
    expected = student(x, 0.5, 0.1, {})
    torch.testing.assert_close(student_generator(student, t=0.1, num_steps=2)(eps, {}), expected)
    assert torch.equal(student_generator(student, num_steps=1)(eps, {}), student_generator(student)(eps, {}))


# The teacher


@pytest.mark.parametrize("solver", STEPS)
@pytest.mark.parametrize("t_max", [1.0, 0.8])
def test_teacher_is_solved_on_uniform_times_from_its_start_level(solver: str, t_max: float) -> None:
    exact = gaussian(t_max)
    eps = noise(range(4), (2,))
    found = teacher_generator(exact, num_steps=5, solver=solver)(eps, {})
    times = uniform_times(t_max, 5)
    assert (times[0], times[-1], len(times)) == (t_max, 0.0, 6)
    x_a = exact.spec.trajectory.start(eps)
    assert torch.equal(found, solve(exact.spec.trajectory, exact.denoiser({}), x_a, times, STEPS[solver]))


def test_more_teacher_steps_come_closer_to_the_exact_map() -> None:
    exact, eps = gaussian(), noise(range(64), (2,))
    errors = [
        float((teacher_generator(exact, num_steps=num)(eps, {}) - exact.exact_state(eps, 0.0)).square().mean().sqrt())
        for num in (1, 4, 16, 64)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 10


def test_one_teacher_step_is_its_prediction_from_noise() -> None:
    exact, eps = gaussian(), noise(range(4), (2,))
    torch.testing.assert_close(teacher_generator(exact, num_steps=1)(eps, {}), exact.denoised(eps, 1.0, {}))


def test_exploding_noise_is_scaled_for_the_sampler() -> None:
    asked: list[Tensor] = []

    class Watching(Teacher):
        spec = replace(gaussian().spec, process=VE())

        def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
            asked.append(x_t)
            return x_t

    eps = noise(range(4), (2,))
    teacher_generator(Watching(), num_steps=1)(eps, {})
    torch.testing.assert_close(asked[0], eps * 6401**0.5)


@pytest.mark.parametrize("solver", STEPS)
def test_network_evaluations_are_what_is_said(
    cases: dict[str, Any], solver: str, labels_for: Callable[..., Cond]
) -> None:
    teacher = cases["class-null-last"].build()
    rows: list[int] = []
    kept = teacher.call
    teacher.call = lambda network, x, *rest: (rows.append(len(x)), kept(network, x, *rest))[1]
    wrapped = Thresholded(Guided(teacher, 3.0), Threshold("static"))
    images = teacher_generator(wrapped, num_steps=3, solver=solver)(
        noise(range(2), teacher.spec.sample_shape), labels_for(teacher, 2)
    )
    assert sum(rows) == 2 * 3 * CALLS_PER_STEP[solver] * wrapped.evaluations
    assert float(images.abs().max()) <= 1 + 1e-6, "thresholded predictions mix to images in range"


def test_conditions_move_together() -> None:
    cond = {"class_labels": torch.arange(3), "guidance_scale": torch.ones(3)}
    moved = to_device(cond, "cpu")
    assert moved.keys() == cond.keys() and all(torch.equal(moved[k], cond[k]) for k in cond)
